"""Where a long text may be cut so that its pieces, encoded one by one, give the ids of the whole.

A cut lies between two characters, and only those two decide whether it may: then it holds whatever stands before and
whatever may follow, and a text of any size can be encoded block by block. Two kinds of tokenizer allow it, for reasons
that stand with `_GPT2`, `_LLAMA3` and `_spaced`. Others get no cutter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from data_prep.engines import Engine
from data_prep.tokenizers import LLAMA3_SPLIT, HuggingFace, SentencePiece, Tokenizer
from data_prep.tokenizers.base import Flat
from data_prep.tokenizers.sentencepiece_rules import BPE
from data_prep.tokenizers.spec import are
from data_prep.tokenizers.spec import steps as steps_of
from data_prep.tokenizers.tiktoken import SPACE_CUT, SPACE_RUN, run_start

# White space and its opposite in every library's tables: Python's \s holds all that theirs do, but for three oddities.
_SOLID, _BLANK, _BREAK = r"[^\s\u180e\u200b\ufeff]", r"[ \t\xa0\u3000]", r"[\r\n]"
_LETTER, _MARK = r"[A-Za-z一-龥ぁ-ゖァ-ヺ가-힣]", r"[,.;:!?()、。，；：！？（）「」]"  # likewise, a few of many

# GPT-2: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
#
# A text falls into matches from left to right. A cut is safe when no match can hold both characters beside it, and when
# what stands before it is matched alike whether or not anything follows: only the lookahead of \s+(?!\S) could tell.
# - solid|white: white space comes first in a match or fills it. The text before ends in a match that holds no white
#   space behind it, so no lookahead is asked.
# - letter|mark: no alternative has anything behind a letter but letters. The same for the lookahead.
_GPT2 = rf"(?<={_SOLID})(?=[ \t\r\n\xa0\u3000])"
# Llama-3 (LLAMA3_SPLIT) differs: marks take the line breaks behind them, so solid|break is no cut. In exchange:
# - break|solid: behind a line break a match ends, or holds more white space. The text before ends in white space whose
#   last is a line break: marks took all of it, or \s*[\r\n]+ does, which comes before the alternative that looks ahead.
_LLAMA3 = rf"(?<={_SOLID})(?={_BLANK})|(?<={_BREAK})(?={_SOLID})"
_WORDS = rf"|(?<={_LETTER})(?={_MARK})"

_GPT2_STEP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_LLAMA3_STEPS = [
    {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]


class Cutter:
    """Finds cuts, and says how what follows one is encoded."""

    def __init__(self, places: str, drops_space: bool = False, cuts_spaces: bool = False) -> None:
        """`places`: a pattern of no width. `drops_space`, `cuts_spaces`: see `continuation`, `last_cut`."""
        self._places, self._drops_space, self._cuts_spaces = re.compile(places), drops_space, cuts_spaces

    def last_cut(self, text: str) -> int:
        """The largest i, so that the ids of text[:i] and of continuation(text[i:] + anything) are those of the whole.

        0 where there is none. `text` may itself be the rest of a longer one.
        """
        if self._cuts_spaces and text[-1:].isspace():
            run = len(text) - run_start(text, len(text))
            # The tokenizer cuts runs from SPACE_RUN on every SPACE_CUT, from their beginning. So that it does the same
            # in the pieces, what is left is a long run, and what is taken is one stretch or a long run too.
            stretches = (run - SPACE_RUN) // SPACE_CUT
            if stretches > 0:
                return len(text) - run + SPACE_CUT * (stretches if stretches * SPACE_CUT >= SPACE_RUN else 1)
        size = 256
        while True:
            start, cut = max(1, len(text) - size), 0
            for found in self._places.finditer(text, start):
                cut = found.start()
            if cut or start == 1:
                return cut
            size *= 4

    def continuation(self, text: str) -> str:
        """What to encode for the text behind a cut, of which at least two characters must be there."""
        return text[1:] if self._drops_space else text


def cutter(tokenizer: Tokenizer, special: bool = False) -> Cutter | None:
    """The cutter of a tokenizer; None where nothing proves that pieces give the ids of the whole.

    `special`: control tokens spelled in the text become their ids, so that no cut may touch them.
    """
    if special and any(re.search(r"[\s▁]", name) for name in tokenizer.control):
        return None  # else every cut at white space is beside them at most
    if tokenizer.kind == "tiktoken":
        return Cutter(_LLAMA3 if special else _LLAMA3 + _WORDS, cuts_spaces=True)
    control = tokenizer.control if special else {}
    if isinstance(tokenizer, SentencePiece):
        rules = tokenizer.rules
        plain = not (rules.charsmap or rules.remove_extra_whitespaces or rules.treat_whitespace_as_suffix)
        if rules.model_type != BPE or not rules.escape_whitespaces or not plain:
            return None
        return _spaced(tokenizer.pieces, bool(rules.add_dummy_prefix), control)
    return _of_json(tokenizer, special) if isinstance(tokenizer, HuggingFace) else None


def _spaced(pieces: Collection[str], prefixed: bool, control: Collection[str]) -> Cutter | None:
    """A cutter for BPE over a whole text in which each space is written ▁, with one more ▁ before the text if `prefixed`.

    Merges make pieces of neighbours, in an order that for two merges far apart depends on nothing between them. If no
    piece holds ▁ behind another character, then nothing is ever merged over the place before a ▁: both sides are encoded
    as if alone. The ▁ that begins what follows need not be given, it is the one that the tokenizer puts there: but only
    where something stands behind it, since an empty text gets none. ▁ must be a piece, or it could be unknown and fuse
    with an unknown character before it.
    """
    if "▁" not in pieces or any(re.search("[^ ▁][ ▁]", piece) for piece in pieces):
        return None
    if not prefixed:
        return Cutter("(?<=[^ ▁])(?=[ ▁])")
    # With control tokens, a text is encoded stretch by stretch between them, each with a ▁ of its own: a cut keeps off.
    last, first = (re.escape("".join(sorted({name[i] for name in control}))) for i in (-1, 0))
    return Cutter(rf"(?<=[^ ▁{last}])(?=[ ▁][^{first}])" if control else r"(?<=[^ ▁])(?=[ ▁][\s\S])", drops_space=True)


def _of_json(tokenizer: HuggingFace, special: bool) -> Cutter | None:
    """A cutter for the rules of GPT-2, of Llama-3, and of SentencePiece models written as tokenizer.json."""
    spec: dict[str, Any] = json.loads(tokenizer.as_json(special=True))
    model, added = spec["model"], spec.get("added_tokens") or ()
    if model.get("type") != "BPE" or model.get("dropout"):
        return None
    if any(not token["special"] or token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None  # they may take the white space beside them
    steps, before = (
        steps_of(spec.get("pre_tokenizer"), "pretokenizers"),
        steps_of(spec.get("normalizer"), "normalizers"),
    )
    if not before and steps and steps[-1].get("type") == "ByteLevel":
        # Digits(individual) parts the text before the pattern sees it, at places that a digit alone decides.
        digits = {"type": "Digits", "individual_digits": True}
        if are(steps, [_GPT2_STEP]) or are(steps, [digits, _GPT2_STEP]):
            return Cutter(_GPT2 if special else _GPT2 + _WORDS)
        return Cutter(_LLAMA3 if special else _LLAMA3 + _WORDS) if are(steps, _LLAMA3_STEPS) else None
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ())
    if model.get("ignore_merges") or any(right.startswith("▁") and left.strip("▁") for left, right in merges):
        return None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    control = tokenizer.control if special else {}
    if not steps and (are(before, [{"type": "Prepend", "prepend": "▁"}, replace]) or are(before, [replace])):
        return _spaced(model["vocab"], len(before) == 2, control)
    # Metaspace, not split, puts ▁ only before text that does not begin with one: none behind a cut.
    if not before and are(steps, [{"type": "Metaspace", "replacement": "▁", "split": False}]):
        return _spaced(model["vocab"], False, control)
    return None


def encode_long(engine: Engine, cutter: Cutter, text: str, block: int = 1 << 20) -> Flat:
    """`engine.encode_flat([text])`, a block of about `block` characters at a time where the text lets itself be cut."""
    parts, start = [], 0
    while start < len(text):
        size, cut = block, 0
        while start + size < len(text) and not (cut := cutter.last_cut(text[start : start + size])):
            size *= 2
        piece = text[start : start + cut] if cut else text[start:]
        parts.append(engine.encode_flat([cutter.continuation(piece) if start else piece])[0])
        start += len(piece)
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint32)
    return ids, np.array([len(ids)], np.int64)
