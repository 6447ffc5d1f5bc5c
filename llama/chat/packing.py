"""Packing: examples of many lengths into sequences of one length, hardly anything left over.

Best-fit decreasing: the longest example first, each into the fullest sequence that still has room (Johnson 1973). Over a
whole set at once this fills more than .999 of chat-like data. Sequences with the same room left are alike, so they are
kept in stacks by room and the tightest stack is found in the bits of one integer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Packs:
    """Which examples make each sequence: `members[starts[k] : starts[k + 1]]` are those of sequence k."""

    def __init__(self, packs: Sequence[Sequence[int]]):
        self.starts: NDArray[np.int64] = np.zeros(len(packs) + 1, np.int64)
        np.cumsum([len(pack) for pack in packs], out=self.starts[1:])
        self.members: NDArray[np.int64] = np.fromiter(
            (i for pack in packs for i in pack), np.int64, int(self.starts[-1])
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        return self.members[self.starts[k] : self.starts[k + 1]]


def pack(lengths: ArrayLike, room: int, seed: int) -> Packs:
    """Examples of `lengths` positions (each 1 to `room`) into sequences of `room`; the same for the same seed.

    The seed decides which of the examples of one length meet, and how examples lie inside a sequence.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= room:
        raise ValueError(f"lengths {sizes.min()}..{sizes.max()} do not fit into sequences of {room}")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    packs: list[list[int]] = []
    stacks: list[list[int]] = [[] for _ in range(room + 1)]  # sequences by the room that they have left
    open_rooms = 0  # bit r: stack r is not empty
    for example, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        wide_enough = open_rooms >> size
        if wide_enough:
            left = size + (wide_enough & -wide_enough).bit_length() - 1
            stack = stacks[left]
            chosen = stack.pop()
            if not stack:
                open_rooms &= ~(1 << left)
            packs[chosen].append(example)
        else:
            left, chosen = room, len(packs)
            packs.append([example])
        left -= size
        if left:
            stacks[left].append(chosen)
            open_rooms |= 1 << left
    for members in packs:
        random.shuffle(members)
    return Packs(packs)


def apart(lengths: ArrayLike) -> Packs:
    """Each example in a sequence of its own."""
    return Packs([[i] for i in range(len(np.asarray(lengths)))])
