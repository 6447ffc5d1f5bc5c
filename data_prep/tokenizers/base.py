"""What the three kinds of tokenizer share: the protocol, checks of ids and text, the files transformers reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

Flat = tuple[NDArray[np.uint32], NDArray[np.int64]]  # ids of all texts end to end, and how many each text has
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(Protocol):
    """What the rest of herd may ask of a tokenizer. Ids run from 0 to vocab_size - 1, special tokens included.

    `special`: control tokens spelled in the text become their ids, as they do in transformers and in tiktoken with
    allowed_special="all". Without it they stay text.
    """

    kind: str  # sentencepiece | tiktoken | huggingface
    path: Path
    vocab_size: int
    bos: int | None
    eod: int | None  # the id that ends a document; None where the tokenizer names none
    control: dict[str, int]  # what `special` makes ids of

    @property
    def symbols(self) -> Sequence[str]:
        """What `as_json` cannot express: texts that hold one of these are not for other engines."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, without BOS or EOD."""

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of each text."""

    def encode_flat(self, texts: Sequence[str], special: bool = False) -> Flat:
        """`encode` of all texts end to end, and the length of each."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Raises UserError for an id outside the vocabulary."""

    def as_json(self, special: bool = False) -> str:
        """A tokenizer.json that encodes as `encode` does, and adds nothing, for other engines.

        Raises UserError when tokenizer.json cannot say what this tokenizer does.
        """

    def save_for_transformers(self, directory: str | Path, add_bos: bool = True) -> None:
        """Write what AutoTokenizer.from_pretrained(directory) needs to give the same ids.

        `add_bos`: whether transformers puts BOS before each text by itself, as the official Llama tokenizers do.
        """


def damaged(path: Path, cause: str) -> UserError:
    return UserError(f"{path}: damaged or unknown tokenizer: {cause}; fetch it again or name another")


def in_range(path: Path, ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as plain ints, or UserError: the libraries answer a wrong id by KeyError, by nothing or by a crash."""
    checked = [int(i) for i in ids]
    if checked and (min(checked) < 0 or max(checked) >= vocab_size):
        wrong = next(i for i in checked if not 0 <= i < vocab_size)
        raise UserError(
            f"id {wrong} is outside the vocabulary (0 to {vocab_size - 1}) of {path}; is it another tokenizer's?"
        )
    return checked


def whole(text: str) -> str:
    """The text with lone surrogates (halves of characters, which UTF-8 cannot hold) replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def flat(encoded: Sequence[Sequence[int] | NDArray[Any]]) -> Flat:
    """Ids of several texts end to end, and how many each has."""
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ids = np.empty(int(lengths.sum()), np.uint32)
    start = 0
    for part in encoded:
        ids[start : start + len(part)] = part
        start += len(part)
    return ids, lengths


def joined(parts: Sequence[Flat]) -> Flat:
    """Several flats as one."""
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def transformers_config(bos: str | None, eos: str | None, add_bos: bool, **more: object) -> dict[str, object]:
    """tokenizer_config.json that makes transformers take tokenizer.json as it stands (any release since 4.0)."""
    names = {"bos_token": bos, "eos_token": eos}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: name for key, name in names.items() if name is not None},
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,  # True would drop spaces before punctuation when decoding
        "model_max_length": int(1e30),  # transformers' own spelling of "no limit"
        **more,
    }
