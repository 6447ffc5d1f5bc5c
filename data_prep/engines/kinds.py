"""The engines: fastokens, gigatoken, and the official tokenizer, all on one thread."""

from __future__ import annotations

import importlib
import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep import tokenizers
from data_prep.engines.spaces import ESCAPE, with_spaces
from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer, build
from data_prep.tokenizers.base import Flat, joined
from data_prep.tokenizers.tiktoken import SPACE_RUN, cut_spaces


class Engine(Protocol):
    """Something that encodes as one tokenizer does."""

    name: str  # one of ENGINES
    special: bool  # control tokens spelled in a text become their ids; else they are text like any other

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Ids of all texts end to end, without BOS or EOD, and the length of each; on one thread."""


class Official:
    """The tokenizer's own library."""

    name = "official"

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.special, self._tokenizer = special, tokenizer

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        return self._tokenizer.encode_flat(texts, self.special)


class _Fast(ABC):
    """What the fast engines share: text as the official tokenizer takes it, and one thread.

    Texts that an engine cannot take go to the official tokenizer: those with a symbol that tokenizer.json cannot
    express (Mistral has twenty), or with a byte that the vocabulary lacks (SmolLM2's lacks a few control characters).
    """

    name = ""

    def __init__(self, tokenizer: Tokenizer, json: str, special: bool = False) -> None:
        self.special, self._official = special, Official(tokenizer, special)
        self._cuts_spaces = tokenizer.kind == "tiktoken"
        self._symbol = re.compile("|".join(map(re.escape, tokenizer.symbols))) if tokenizer.symbols else None
        with _one_cpu():
            self._load(json)
            self._encode(["a", "b"])

    @abstractmethod
    def _load(self, json: str) -> None:
        """Make the library's model of a tokenizer.json."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> Flat:
        """The library's own ids of each text, end to end, and their counts."""

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        symbol = self._symbol
        if symbol is None or not any(map(symbol.search, texts)):
            return self._encode_cut(list(texts))
        return joined(
            [
                self._official.encode_flat(list(group)) if found else self._encode_cut(list(group))
                for found, group in itertools.groupby(texts, lambda text: symbol.search(text) is not None)
            ]
        )

    def _encode_cut(self, texts: list[str]) -> Flat:
        """With long runs of spaces cut where the official tokenizer cuts them."""
        if not (self._cuts_spaces and any(len(text) >= SPACE_RUN for text in texts)):
            return self._encode_some(texts)
        cut = [list(cut_spaces(text)) for text in texts]
        ids, lengths = self._encode_some([part for parts in cut for part in parts])
        return ids, np.add.reduceat(lengths, np.cumsum([0, *map(len, cut[:-1])]))

    def _encode_some(self, texts: list[str]) -> Flat:
        # Looking for what an engine refuses would take longer than encoding: half by half, the text itself is found.
        try:
            return self._encode(texts)
        except BaseException as error:
            raise_if_asked(error)
            if len(texts) == 1:
                return self._official.encode_flat(texts)
        half = len(texts) // 2
        return joined([self._encode_some(texts[:half]), self._encode_some(texts[half:])])


class Fastokens(_Fast):
    """https://pypi.org/project/fastokens"""

    name = "fastokens"

    def _load(self, json: str) -> None:
        spaced = with_spaces(json)
        self._spaced = spaced is not None
        self._model: Any = importlib.import_module("fastokens").Tokenizer.from_json_str(spaced or json)

    def _encode(self, texts: list[str]) -> Flat:
        if self._spaced:
            texts = [text.replace(ESCAPE, " ") for text in texts]
        ids, ends = self._model.encode_batch_flat(
            texts, add_special_tokens=False, split_special_tokens=not self.special
        )
        return np.frombuffer(ids, np.uint32), _lengths(np.frombuffer(ends, np.int64))


class Gigatoken(_Fast):
    """https://pypi.org/project/gigatoken"""

    name = "gigatoken"

    def _load(self, json: str) -> None:
        self._model: Any = importlib.import_module("gigatoken.gigatoken_rs").load_hf_json(json)

    def _encode(self, texts: list[str]) -> Flat:
        rows = self._model.encode_batch(texts, parallel=False).layout  # a list array of awkward: offsets and content
        ends = np.asarray(rows.offsets.data, np.int64)
        return np.asarray(rows.content.data, np.uint32)[ends[0] : ends[-1]], _lengths(ends)


FAST: tuple[type[_Fast], ...] = (Fastokens, Gigatoken)
ENGINES = (*(engine.name for engine in FAST), Official.name)


def load_engine(name: str, tokenizer: Tokenizer, folder: Path, special: bool = False) -> Engine:
    """The engine of that name for a tokenizer; `folder` keeps the tokenizer.json it reads, for the next to load it.

    Raises UserError: no such engine, not installed, or it cannot take this tokenizer.
    """
    if name == Official.name:
        return Official(tokenizer, special)
    kind = next((engine for engine in FAST if engine.name == name), None)
    if kind is None:
        raise UserError(f"no engine {name!r}; there are {', '.join(ENGINES)}", 2)
    try:
        return kind(tokenizer, _json(tokenizer, folder, special), special)
    except ImportError as error:
        raise UserError(f"{name} is not installed ({error}); pip install {name}, or use another engine", 2) from None
    except UserError:
        raise
    except BaseException as error:
        raise_if_asked(error)
        raise UserError(f"{name} cannot take {tokenizer.path}: {first_line(error)}; use another engine") from None


def _json(tokenizer: Tokenizer, folder: Path, special: bool) -> str:
    """The tokenizer.json for engines: built once, then read from `folder`, where it has its origin's hash as name."""
    ending = "-special" if special else ""
    path = folder / f"tokenizer-{tokenizers.sha256(tokenizer.path)[:32]}-v{build.VERSION}{ending}.json"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    text = tokenizer.as_json(special)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there, or write elsewhere") from error
    finally:
        aside.unlink(missing_ok=True)
    return text


def raise_if_asked(error: BaseException) -> None:
    """Raise again what is no failure of an engine. Their failures may be any class: Rust's panics are no Exception."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _lengths(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return ends[1:] - ends[:-1]


@contextmanager
def _one_cpu() -> Iterator[None]:
    """Only one CPU to be seen by libraries that start a thread for each.

    fastokens does so at its first batch, once in a process, and heeds no RAYON_NUM_THREADS.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
