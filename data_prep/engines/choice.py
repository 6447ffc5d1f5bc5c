"""Which engine to use: the fastest whose ids are the official tokenizer's."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.engines.kinds import ENGINES, FAST, Engine, Official, first_line, load_engine, raise_if_asked
from data_prep.engines.probes import probes
from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer
from data_prep.tokenizers.base import Flat, joined, whole

ENOUGH = 1_000_000  # bytes of a sample below which speeds are noise
SHOWN = 60  # characters of a text that stand in a message


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
    compare: bool = True,
) -> Choice:
    """The fastest engine whose ids are the official tokenizer's on the sample and on all probes.

    sample: texts of the corpus, tens of megabytes at most. folder: see `load_engine`. wanted: an engine's name, or
    "auto". refused: engines that were found wrong before. compare: try them all; else the first that is right does, for
    a corpus that is done sooner than others are loaded. Raises UserError when the one that is wanted cannot be had.
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
        if len(choice.speeds) > 1 and not compare:
            break
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
            _must_equal(name, sample, joined([got, rest]), right)
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
    except BaseException as error:
        raise_if_asked(error)
        raise UserError(f"{engine.name} failed: {first_line(error)}; use another engine") from None


def _speed(sizes: Sequence[int], start: float) -> float:
    return sum(sizes) / 1e6 / max(1e-9, time.perf_counter() - start)
