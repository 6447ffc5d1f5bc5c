"""Which storages live while a step runs, what each is for, and what they are at the moment when they are most."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from llama.plan.counts import Memory

Use = Literal["weights", "gradients", "optimizer", "gathered", "activations"]


class _Storage:
    __slots__ = ("born", "bytes", "reference", "use")

    def __init__(self, reference: weakref.ref[Any], size: int, use: Use, born: int):
        self.reference, self.bytes, self.use, self.born = reference, size, use, born


class Live:
    """The storages that were noted and still live, real or without memory; each counts once, however many views it has.

    A storage is an activation until something says what else it is. That may come later: what is known of it then goes
    for the peak too, if the storage lived already at that moment.
    """

    def __init__(self) -> None:
        self.storages: dict[int, _Storage] = {}
        self.bytes: dict[Use, int] = dict.fromkeys(("weights", "gradients", "optimizer", "gathered", "activations"), 0)
        self.total = 0
        self.clock = 0
        self.restart()

    def restart(self) -> None:
        """Look for the peak from now on."""
        self.peak, self.peak_clock, self.at_peak = self.total, self.clock, dict(self.bytes)

    def _change(self, use: Use, size: int) -> None:
        self.bytes[use] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.peak_clock, self.at_peak = self.total, self.clock, dict(self.bytes)

    def note(self, tensor: torch.Tensor, use: Use = "activations") -> None:
        """A tensor that exists now."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        self.clock += 1
        size = storage.nbytes()

        def gone(_: Any) -> None:
            entry = self.storages.pop(key)
            self._change(entry.use, -entry.bytes)

        self.storages[key] = _Storage(weakref.ref(storage, gone), size, use, self.clock)
        self._change(use, size)

    def use(self, tensor: torch.Tensor, use: Use) -> None:
        """What a tensor is for, a weight being one for good. A DTensor stands for this rank's part."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        self.note(tensor, use)
        entry = self.storages[tensor.untyped_storage()._cdata]
        if entry.use == use or entry.use == "weights":
            return
        if entry.born <= self.peak_clock:
            self.at_peak[entry.use] -= entry.bytes
            self.at_peak[use] += entry.bytes
        self.bytes[entry.use] -= entry.bytes
        self.bytes[use] += entry.bytes
        entry.use = use

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """See storages that are emptied and filled again, as FSDP does with gathered weights."""
        resize = torch.UntypedStorage.resize_

        def seen(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            if (entry := self.storages.get(storage._cdata)) is not None:
                self.clock += 1
                before, entry.bytes = entry.bytes, size
                self._change(entry.use, size - before)
            return out

        torch.UntypedStorage.resize_ = seen  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def memory(self, besides: int = 0) -> Memory:
        """What lived at the peak, with `besides` bytes that lived all the time."""
        found = self.at_peak
        return Memory(
            found["weights"], found["gradients"], found["optimizer"], found["gathered"], found["activations"] + besides
        )
