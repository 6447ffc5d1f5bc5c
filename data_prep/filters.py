"""Cleaning filters that users of RedPajama, OSCAR and MassiveText's rules expect; all of them off by default.

Repetition and symbols follow Rae et al. 2021 (Gopher, arXiv 2112.11446), appendix A.1.1 and table A1; `GOPHER` has
their limits. Words are what stands between white space; in scripts without spaces give limits in characters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_prep.errors import UserError

# Where corpora put the language: RedPajama, OSCAR 22 and 23, OSCAR's converted forms, FineWeb, plain ones
LANGUAGE_KEYS = ("meta.language", "metadata.identification.label", "metadata.language", "language", "lang")
# Beside the language, or after its own name: OSCAR's metadata.identification.prob, FineWeb's language_score
SCORE_NAMES = ("prob", "score", "probability", "language_score", "lang_score", "language_probability")
LONG = 5  # words from which an n-gram counts as repeated wherever it comes again
_PARAGRAPH = re.compile(r"\n{2,}")


@dataclass(frozen=True)
class Filters:
    """Limits that a document must keep; None or empty: no such limit. Shares are from 0 to 1.

    min_chars, max_chars, min_words, max_words: length of the text, both ends allowed.
    languages: tags that are allowed; "en" allows en-US too. language_key: where the tag is, as "meta.language"; None:
    the first of LANGUAGE_KEYS that a record has. min_language_score: of records that give a probability.
    max_symbol_share: "#" or ellipses for each word (Gopher: 0.1 for either).
    max_line_repetition, max_paragraph_repetition: share of lines or paragraphs that were there before (0.3);
    max_line_repetition_chars, max_paragraph_repetition_chars: the characters in these, of all (0.2).
    max_ngram_repetition: (n, share) pairs over n words. Up to 4 the characters of the most frequent n-gram, of all;
    from 5 on the characters in any n-gram that was there before (table A1: 2: .20, 3: .18, 4: .16, 5: .15 ... 10: .10).
    """

    min_chars: int | None = None
    max_chars: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    languages: tuple[str, ...] = ()
    language_key: str | None = None
    min_language_score: float | None = None
    max_symbol_share: float | None = None
    max_line_repetition: float | None = None
    max_paragraph_repetition: float | None = None
    max_line_repetition_chars: float | None = None
    max_paragraph_repetition_chars: float | None = None
    max_ngram_repetition: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for kind in ("chars", "words"):
            low, high = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if low is not None and high is not None and low > high:
                raise UserError(f"--min-{kind} {low} is more than --max-{kind} {high}: no document would pass", 2)
        if (self.language_key or self.min_language_score is not None) and not self.languages:
            raise UserError("--language-key and --min-language-score need --language", 2)

    @cached_property
    def active(self) -> bool:
        """Whether any limit is set."""
        return self != Filters()

    @cached_property
    def needs_record(self) -> bool:
        """Whether `reject` wants the whole record, not only the text."""
        return bool(self.languages)

    def reject(self, text: str, record: Any = None) -> str | None:
        """Why this document goes, in a few words to count by; None when it stays. The cheap limits come first.

        record: the parsed line, where `needs_record` says so.
        """
        if self.min_chars is not None and len(text) < self.min_chars:
            return "too short"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "too long"
        if self.languages and (cause := self._language(record)):
            return cause
        if self._counts_words:
            words = len(text.split())
            if self.min_words is not None and words < self.min_words:
                return "too few words"
            if self.max_words is not None and words > self.max_words:
                return "too many words"
            if self.max_symbol_share is not None:
                signs = max(text.count("#"), text.count("…") + text.count("..."))
                if signs > self.max_symbol_share * words:
                    return "too many symbols"
        for unit, limit, limit_chars in self._repeats:
            parts = [
                part for part in (text.splitlines() if unit == "lines" else _PARAGRAPH.split(text)) if part.strip()
            ]
            count, characters = _repeated([part.strip() for part in parts])
            if limit is not None and count > limit * len(parts):
                return f"repeated {unit}"
            if limit_chars is not None and characters > limit_chars * len(text):
                return f"repeated {unit} by characters"
        if self.max_ngram_repetition:
            parts = text.split()
            total = sum(map(len, parts))
            limits = sorted(self.max_ngram_repetition)
            for at, (n, limit) in enumerate(limits):
                characters = _ngram_characters(parts, n)
                if characters > limit * total:
                    return f"repeated {n}-grams"
                # what a longer n-gram repeats, its shorter ones repeat too: most texts need no second look
                if n >= LONG and characters <= min(limit for _, limit in limits[at:]) * total:
                    break
        return None

    @cached_property
    def _counts_words(self) -> bool:
        return any(limit is not None for limit in (self.min_words, self.max_words, self.max_symbol_share))

    @cached_property
    def _repeats(self) -> list[tuple[str, float | None, float | None]]:
        """(unit, limit of the count, limit of the characters), only what is set."""
        every = [
            ("lines", self.max_line_repetition, self.max_line_repetition_chars),
            ("paragraphs", self.max_paragraph_repetition, self.max_paragraph_repetition_chars),
        ]
        return [one for one in every if one[1] is not None or one[2] is not None]

    @cached_property
    def _allowed(self) -> frozenset[str]:
        return frozenset(_plain_tag(tag) for tag in self.languages)

    def _language(self, record: Any) -> str | None:
        """Why the record's language tag does not do."""
        for key in (self.language_key,) if self.language_key else LANGUAGE_KEYS:
            *path, last = key.split(".")
            holder = record
            for name in path:
                holder = holder.get(name) if isinstance(holder, dict) else None
            tag = holder.get(last) if isinstance(holder, dict) else None
            if isinstance(tag, str) and tag:
                break
        else:
            return "no language tag"
        plain = _plain_tag(tag)
        if plain not in self._allowed and plain.split("-")[0] not in self._allowed:
            return f"language {plain[:20]}"
        if self.min_language_score is not None:
            scores = (holder.get(name) for name in (f"{last}_score", f"{last}_prob", *SCORE_NAMES))
            score = next((s for s in scores if isinstance(s, int | float) and not isinstance(s, bool)), None)
            if score is not None and score < self.min_language_score:
                return "language uncertain"
        return None


def _plain_tag(tag: str) -> str:
    return tag.strip().lower().replace("_", "-")


def _repeated(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts were there before, and their characters."""
    count = characters = 0
    for part, times in Counter(parts).items():
        count += times - 1
        characters += (times - 1) * len(part)
    return count, characters


def _ngram_characters(words: Sequence[str], n: int) -> int:
    """Characters, without spaces, of the most frequent n-gram in all its places (n up to 4, 0 if none comes twice), or
    of all words in an n-gram that was there before, each word once (n from 5)."""
    grams = list(zip(*(words[k:] for k in range(n)), strict=False))
    if len(set(grams)) == len(grams):
        return 0
    if n < LONG:
        counts = Counter(grams)
        most = max(counts.values())
        return most * max(sum(map(len, gram)) for gram, times in counts.items() if times == most)
    seen: set[tuple[str, ...]] = set()
    characters = end = 0  # words before `end` are counted already
    for at, gram in enumerate(grams):
        if gram in seen:
            characters += sum(map(len, words[max(at, end) : at + n]))
            end = at + n
        seen.add(gram)
    return characters


# Limits of table A1 (repetition) and of the symbol rule of A.1.1
GOPHER: dict[str, Any] = {
    "max_symbol_share": 0.1,
    "max_line_repetition": 0.3,
    "max_paragraph_repetition": 0.3,
    "max_line_repetition_chars": 0.2,
    "max_paragraph_repetition_chars": 0.2,
    "max_ngram_repetition": (
        (2, 0.20), (3, 0.18), (4, 0.16), (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10),
    ),
}  # fmt: skip
