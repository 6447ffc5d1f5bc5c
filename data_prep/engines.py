"""Engines that encode text faster than the official tokenizers, used only where they give the same ids.

An engine is a library that reads a tokenizer.json: fastokens, or gigatoken where it is installed. `choose` certifies
each on a sample of the real text and on texts that are made to be hard; whoever uses one goes on checking a share of
its work with `check`. "official" is the tokenizer itself. Every engine works on one thread: processes are the
parallelism.
"""

from __future__ import annotations

import bisect
import importlib
import itertools
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep import tokenizers
from data_prep.errors import UserError
from data_prep.probes import probes
from data_prep.tokenizers import Tokenizer, build
from data_prep.tokenizers.base import Flat, whole
from data_prep.tokenizers.tiktoken import SPACE_RUN, cut_spaces

ENOUGH = 1_000_000  # bytes of a sample below which speeds are noise
SHOWN = 60  # characters of a text that stand in a message


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


class _Fast:
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

    def _load(self, json: str) -> None:
        raise NotImplementedError

    def _encode(self, texts: list[str]) -> Flat:
        raise NotImplementedError

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        symbol = self._symbol
        if symbol is None or not any(map(symbol.search, texts)):
            return self._encode_cut(list(texts))
        return _joined(
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
        except Exception:
            if len(texts) == 1:
                return self._official.encode_flat(texts)
        half = len(texts) // 2
        return _joined([self._encode_some(texts[:half]), self._encode_some(texts[half:])])


class Fastokens(_Fast):
    """https://pypi.org/project/fastokens"""

    name = "fastokens"

    def _load(self, json: str) -> None:
        self._model: Any = importlib.import_module("fastokens").Tokenizer.from_json_str(json)

    def _encode(self, texts: list[str]) -> Flat:
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
    except BaseException as error:  # Rust's panics are no Exception
        _raise_if_asked(error)
        raise UserError(f"{name} cannot take {tokenizer.path}: {_first_line(error)}; use another engine") from None


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


@dataclass
class Choice:
    """Which engine to use, and why not the others."""

    name: str
    speeds: dict[str, float]  # MB (10**6 bytes) of text a second on the sample, of those that gave the right ids
    refused: dict[str, str] = field(default_factory=dict)  # engine -> reason
    sample_bytes: int = 0


def choose(
    tokenizer: Tokenizer,
    sample: Sequence[str],
    folder: Path,
    wanted: str = "auto",
    refused: Collection[str] = (),
    special: bool = False,
) -> Choice:
    """The fastest engine whose ids are the official tokenizer's on the sample and on all probes.

    sample: texts of the corpus, tens of megabytes at most. folder: see `load_engine`. wanted: an engine's name, or
    "auto". refused: engines that were found wrong before. Raises UserError when the one that is wanted cannot be had.
    """
    if wanted not in ("auto", *ENGINES):
        raise UserError(f"no engine {wanted!r}; there are auto, {', '.join(ENGINES)}", 2)
    official, hard, sample = Official(tokenizer, special), probes(tokenizer), list(sample)
    sizes = [len(whole(text).encode()) for text in sample]
    half = bisect.bisect_left(list(itertools.accumulate(sizes)), sum(sizes) // 2)
    start = time.perf_counter()
    right = official.encode_flat(sample)
    speeds = {Official.name: _speed(sizes, start)}
    choice = Choice(Official.name, speeds, dict.fromkeys(refused, "was wrong before"), sum(sizes))
    if wanted == Official.name:
        return choice
    right_hard = official.encode_flat(hard)
    for name in [engine.name for engine in FAST] if wanted == "auto" else [wanted]:
        try:
            if name in refused:
                raise UserError(f"{name} was wrong before; use another engine")
            engine = load_engine(name, tokenizer, folder, special)
            _must_equal(name, hard, _encode(engine, hard), right_hard)
            # Engines remember words: the first half of the sample is for that, the second is measured.
            got = _encode(engine, sample[:half])
            start = time.perf_counter()
            rest = _encode(engine, sample[half:])
            speed = _speed(sizes[half:], start)
            _must_equal(name, sample, _joined([got, rest]), right)
            choice.speeds[name] = speed
        except UserError as error:
            if wanted == name:
                raise
            choice.refused[name] = str(error)
    fast = [name for name in choice.speeds if name != Official.name]
    if choice.sample_bytes >= ENOUGH and wanted == "auto":
        choice.name = max(choice.speeds, key=choice.speeds.__getitem__)
    elif fast:
        choice.name = fast[0]
    return choice


def check(engine: Engine, tokenizer: Tokenizer, texts: Sequence[str]) -> int | None:
    """Which text is the first whose ids are not the official tokenizer's; None when all are right."""
    return _first_wrong(engine.encode_flat(texts), Official(tokenizer, engine.special).encode_flat(texts))


def _first_wrong(got: Flat, right: Flat) -> int | None:
    if np.array_equal(got[1], right[1]) and np.array_equal(got[0], right[0]):
        return None
    start = 0  # up to the first that differs, both begin their texts at the same place
    for i, (a, b) in enumerate(zip(got[1].tolist(), right[1].tolist(), strict=True)):
        if a != b or not np.array_equal(got[0][start : start + a], right[0][start : start + b]):
            return i
        start += a
    raise AssertionError("lengths do not sum to the number of ids")


def _must_equal(name: str, texts: Sequence[str], got: Flat, right: Flat) -> None:
    """Raise a UserError that shows the first text that differs, from where its ids do."""
    wrong = _first_wrong(got, right)
    if wrong is None:
        return
    start = int(right[1][:wrong].sum())
    a, b = (ids[start : start + int(lengths[wrong])].tolist() for ids, lengths in (got, right))
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    text = texts[wrong]
    shown = repr(text if len(text) <= SHOWN else text[:SHOWN]) + ("…" if len(text) > SHOWN else "")
    raise UserError(
        f"{name} differs from the official tokenizer on {shown}: from id {same} on {a[same : same + 8]}, "
        f"not {b[same : same + 8]}; use another engine"
    )


def _encode(engine: Engine, texts: Sequence[str]) -> Flat:
    try:
        return engine.encode_flat(texts)
    except BaseException as error:  # Rust's panics are no Exception
        _raise_if_asked(error)
        raise UserError(f"{engine.name} failed: {_first_line(error)}; use another engine") from None


def _raise_if_asked(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _joined(parts: Sequence[Flat]) -> Flat:
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])


def _lengths(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return ends[1:] - ends[:-1]


def _speed(sizes: Sequence[int], start: float) -> float:
    return sum(sizes) / 1e6 / max(1e-9, time.perf_counter() - start)


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
