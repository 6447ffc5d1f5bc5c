"""Which runs a sweep is: KEY=V1,V2 become axes, and each combination of their values a point. Needs no torch."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.errors import UserError

ALIASES = {"lora.r": "lora.rank"}
"""What people call keys."""
OPENING, CLOSING = "[{(", "]})"
LONGEST = 40
"""Characters of a value in a point's name."""


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes, as YAML writes them."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Of its folder: rank=8_targets=attention."""
    chosen: tuple[tuple[str, str], ...]
    """Key and value of each axis."""
    fixed: tuple[str, ...]
    """Overrides that all points share."""

    @property
    def overrides(self) -> list[str]:
        return [*self.fixed, *(f"{key}={value}" for key, value in self.chosen)]


def values_of(text: str) -> list[str]:
    """`text` cut at commas, but not inside brackets, braces or quotes: 8,[q,v] is two values."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in OPENING + CLOSING:
            depth += 1 if character in OPENING else -1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def read(words: Sequence[str], fixed: Sequence[str] = ()) -> tuple[list[Axis], tuple[str, ...]]:
    """Axes among KEY=VALUE words, and the words that all points share; `fixed` ones are never cut at commas.

    Raises UserError for a word that is no KEY=VALUE, an empty or repeated value, a key given twice, and no axis at all.
    """
    axes, shared = [], []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{word!r} is not KEY=VALUE or KEY=V1,V2, such as lora.rank=8,16", 2)
        values = values_of(text)
        if len(values) == 1:
            shared.append(f"{ALIASES.get(key, key)}={text}")
            continue
        if not all(values):
            raise UserError(
                f"{word!r} has an empty value between its commas; null is written null, a list in brackets", 2
            )
        if len(set(values)) < len(values):
            again = next(value for value, count in Counter(values).items() if count > 1)
            raise UserError(f"{word!r} gives {again} twice", 2)
        axes.append(Axis(ALIASES.get(key, key), tuple(values)))
    shared += fixed
    named = [axis.key for axis in axes] + [word.partition("=")[0] for word in shared]
    twice = [key for key, count in Counter(named).items() if count > 1 and key in {axis.key for axis in axes}]
    if twice:
        raise UserError(f"{twice[0]} is given twice; put all its values behind one {twice[0]}=", 2)
    if not axes:
        raise UserError(
            "nothing to sweep: give a key several values, such as lora.rank=8,16; behind -- commas are part of a value",
            2,
        )
    return axes, tuple(shared)


def points(axes: Sequence[Axis], fixed: tuple[str, ...], sample: int | None = None, seed: int = 0) -> list[Point]:
    """Every combination, the last axis changing fastest; or `sample` of them drawn by `seed`, in the same order."""
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    if sample is not None and sample < len(combinations):
        drawn = sorted(random.Random(seed).sample(range(len(combinations)), sample))
        combinations = [combinations[i] for i in drawn]
    short = _short([axis.key for axis in axes])
    found = []
    for values in combinations:
        name = "_".join(f"{key}={_plain(value)}" for key, value in zip(short, values, strict=True))
        chosen = tuple(zip((axis.key for axis in axes), values, strict=True))
        found.append(Point(name, chosen, fixed))
    alike = {name for name, count in Counter(point.name for point in found).items() if count > 1}
    return [Point(f"{p.name}-{_digest(repr(p.chosen))}", p.chosen, p.fixed) if p.name in alike else p for p in found]


def _short(keys: Sequence[str]) -> list[str]:
    """Last parts of dotted keys, whole keys where those are alike."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return [key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2] for key in keys]


def _plain(value: str) -> str:
    """A value as part of a folder's name: [q, v] as q+v."""
    text = re.sub(r"[^\w.+-]+", "_", re.sub(r"\s*,\s*", "+", value.strip("[]{}()\"' "))).strip("_") or "none"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 7]}-{_digest(value)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
