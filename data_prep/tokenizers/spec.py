"""Reading the steps of a tokenizer.json."""

from __future__ import annotations

from typing import Any


def steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list; `inner` is where a Sequence keeps its parts."""
    if not step:
        return []
    return [each for part in step[inner] for each in steps(part, inner)] if step["type"] == "Sequence" else [step]


def are(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Do the steps say what is wanted, whatever they say besides?"""
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(
        step.get(key) == value for step, need in pairs for key, value in need.items()
    )
