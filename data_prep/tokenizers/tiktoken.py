"""Llama-3's tokenizer.model: 128,000 lines of "base64 rank", and 256 special tokens that the file does not hold."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.tokenizers import build
from data_prep.tokenizers.base import Flat, damaged, flat, in_range, transformers_config, whole, write_json

# Llama-3's rules for cutting text into words before BPE (Meta's llama-models, models/llama3/tokenizer.py, `pat_str`).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
_LLAMA3_NAMED = {  # places after the ranks that have a name of their own since Llama-3.1; the others are reserved
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
# tiktoken's regex overflows its stack on nearly a million spaces in a row; long runs are cut, as Meta's own code does.
SPACE_RUN, SPACE_CUT = 100_000, 25_000
_SOLID = re.compile(r"\S")


class Tiktoken:
    """Llama-3's ranks, loaded. Meanings of methods: see `base.Tokenizer`."""

    kind = "tiktoken"
    symbols: tuple[str, ...] = ()

    def __init__(self, path: Path, data: bytes) -> None:
        import tiktoken

        self.path = path
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines(), 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise damaged(path, f"line {number} is not 'base64 rank'") from None
        if len(ranks) != LLAMA3_RANKS:
            # Another count is another model's (Llama-4: 200,000), whose split rules and special tokens are not these
            raise damaged(
                path, f"{len(ranks):,} ranks where Llama-3 has {LLAMA3_RANKS:,} (other kinds: use tokenizer.json)"
            )
        if set(ranks.values()) != set(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise damaged(path, "ranks are not 0 to 127,999, or a single byte has none")
        self._ranks = ranks
        names = [_LLAMA3_NAMED.get(i) for i in range(256)]
        reserved = iter(range(256))
        self.control = {
            name or f"<|reserved_special_token_{next(reserved)}|>": LLAMA3_RANKS + i for i, name in enumerate(names)
        }
        self._model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.control
        )
        self.vocab_size = LLAMA3_RANKS + len(self.control)
        self.bos: int | None = self.control["<|begin_of_text|>"]
        self.eod: int | None = self.control["<|end_of_text|>"]

    def encode(self, text: str, special: bool = False) -> list[int]:
        ids: list[int] = self._encode(text, special).tolist()
        return ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        return [self.encode(text, special) for text in texts]

    def encode_flat(self, texts: Sequence[str], special: bool = False) -> Flat:
        return flat([self._encode(text, special) for text in texts])

    def _encode(self, text: str, special: bool) -> NDArray[np.uint32]:
        allowed = self._model.special_tokens_set if special else set()
        parts = [
            self._model.encode_to_numpy(part, allowed_special=allowed, disallowed_special=())
            for part in cut_spaces(whole(text))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(in_range(self.path, ids, self.vocab_size))

    def as_json(self, special: bool = False) -> str:
        text: str = build.from_ranks(self._ranks, LLAMA3_SPLIT, self.control if special else {}).to_str()
        return text

    def save_for_transformers(self, directory: str | Path, add_bos: bool = True) -> None:
        """A tokenizer.json built from the ranks."""
        begin, end = "<|begin_of_text|>", "<|end_of_text|>"
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        built = build.from_ranks(self._ranks, LLAMA3_SPLIT, self.control, begin if add_bos else None)
        built.save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", transformers_config(begin, end, add_bos))


def long_spaces(text: str) -> Iterator[tuple[int, int]]:
    """Where runs of SPACE_RUN and more characters of white space begin and end."""
    end = 0
    # Every such run holds one of these characters, so the others need no look.
    for at in range(SPACE_RUN - 1, len(text), SPACE_RUN):
        if at < end or not text[at].isspace():
            continue
        found = _SOLID.search(text, at)
        start, end = run_start(text, at), found.start() if found else len(text)
        if end - start >= SPACE_RUN:
            yield start, end


def run_start(text: str, at: int) -> int:
    """Where the run of white space begins that ends before `at`; in time that depends on the run alone."""
    size = 64
    while True:
        first = max(0, at - size)
        kept = text[first:at].rstrip()
        if kept or first == 0:
            return first + len(kept)
        size *= 4


def cut_spaces(text: str) -> Iterator[str]:
    """The text in parts, cut inside runs of white space longer than tiktoken's regex can take."""
    start = 0
    for first, last in long_spaces(text):
        for cut in range(first + SPACE_CUT, last, SPACE_CUT):
            yield text[start:cut]
            start = cut
    yield text[start:]
