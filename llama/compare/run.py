"""A run to compare: its curves, and what its recipe says about how it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llama.compare.events import Curve, read_run


@dataclass(frozen=True)
class Run:
    """A run to compare: its name, where it lies, its scalars by tag."""

    name: str
    path: Path
    curves: Mapping[str, Curve]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Of our own run folders."""


def open_run(path: Path, name: str | None = None) -> Run:
    """Read a run from where it lies. Raises UserError."""
    recipe: dict[str, Any] = {}
    file = path / "recipe.yaml"
    if path.is_dir() and file.is_file():
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
            recipe = found if isinstance(found, dict) else {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            recipe = {}
    return Run(name or path.name, path, read_run(path), recipe)


ASIDE = ("name", "run_dir", "checkpoint", "resilience", "log", "validation")
"""Sections of a recipe that train nothing."""


def differing(a: Run, b: Run) -> list[str]:
    """Keys in which the recipes of two run folders differ, with both values; of what trains alone."""
    if not a.recipe or not b.recipe:
        return []
    ours, theirs = dict(_flat(a.recipe)), dict(_flat(b.recipe))
    return [
        f"{key} ({ours.get(key)} | {theirs.get(key)})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and key.split(".")[0] not in ASIDE
    ]


def _flat(keys: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys as a.b.c."""
    for key, value in keys.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def same_start(a: Run, b: Run) -> bool:
    """Whether the recipes of both runs give the same first weights and the same batches in the same order."""
    if not a.recipe or not b.recipe:
        return False

    def start(recipe: Mapping[str, Any]) -> list[Any]:
        train, data = recipe.get("train", {}), recipe.get("data", {})
        order = data.get("order_samples") or train.get("steps", 0) * train.get("global_batch_size", 0)
        kept = {key: value for key, value in data.items() if key not in ("prefetch", "tokenizer", "order_samples")}
        weights = [train.get(key) for key in ("seed", "init_from", "global_batch_size")]
        return [weights, recipe.get("model"), recipe.get("chat"), recipe.get("lora"), kept, order]

    return start(a.recipe) == start(b.recipe)
