"""Bookkeeping of what lives: tensors by name, and the moment at which most bytes did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["weights", "gradients", "optimizer", "gathered", "activations"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimizer", "gathered", "activations")
Bytes = tuple[int, ...]
"""Of each of PARTS."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a step, such as a block's forward: what it adds at its worst moment, and what it leaves behind."""

    most: Bytes
    left: Bytes


class Tape:
    """What lives while a stretch of a step runs. Starts from nothing, so its sums are what the stretch adds."""

    def __init__(self) -> None:
        self.live: dict[str, tuple[int, int]] = {}
        self.now = [0] * len(PARTS)
        self.total = self.peak = 0
        self.most: Bytes = tuple(self.now)
        self.held: frozenset[str] = frozenset()
        """Names that stay though they are freed, and are not made twice: what selective checkpointing keeps."""

    def make(self, part: Part = "activations", /, **sizes: int) -> None:
        """Tensors come into being, one after another."""
        place = PARTS.index(part)
        for name, size in sizes.items():
            if name in self.held and name in self.live:
                continue
            assert name not in self.live, f"{name} is there already"
            self.live[name] = place, size
            self.now[place] += size
            self.total += size
        if self.total > self.peak:
            self.peak, self.most = self.total, tuple(self.now)

    def free(self, *names: str) -> None:
        """Tensors go; one that was never made is none."""
        for name in names:
            place, size = (0, 0) if name in self.held else self.live.pop(name, (0, 0))
            self.now[place] -= size
            self.total -= size

    def rename(self, old: str, new: str) -> None:
        """The same tensor under another name."""
        if old in self.held:
            self.live[new] = 0, 0
        else:
            self.live[new] = self.live.pop(old)

    def run(self, piece: Piece) -> None:
        """A stretch worked out before: its worst moment on top of what lives now."""
        if self.total + sum(piece.most) > self.peak:
            self.most = tuple(a + b for a, b in zip(self.now, piece.most, strict=True))
            self.peak = sum(self.most)
        for place, size in enumerate(piece.left):
            self.now[place] += size
            self.total += size

    def piece(self) -> Piece:
        return Piece(self.most, tuple(self.now))
