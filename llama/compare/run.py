"""A run to compare: its curves, and what its recipe says about how it starts."""

from __future__ import annotations

from collections.abc import Mapping
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
