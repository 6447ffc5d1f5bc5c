"""Sees every operator that a step calls, under autograd, and counts: products, bytes moved, collectives, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from llama.parallel.mesh import AXES, Mesh
from llama.plan.counts import Collective, Counts, Kind, Memory, Product
from llama.plan.dry_memory import Live

aten = torch.ops.aten
# name of a product's operator -> where its operands stand
_PRODUCTS = {
    "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1,
}  # fmt: skip
_ATTENTION = "_scaled_dot_product_"
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("allgather", "all_gather"), ("all_gather", "all_gather"), ("reduce_scatter", "reduce_scatter"),
    ("allreduce", "all_reduce"), ("all_reduce", "all_reduce"), ("broadcast", "broadcast"), ("alltoall", "all_to_all"),
    ("all_to_all", "all_to_all"), ("isend", "send"), ("send", "send"), ("irecv", "recv"), ("recv", "recv"),
)  # fmt: skip
_NOTHING = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view",
    "_local_scalar_dense",
)  # fmt: skip
"""Operators beside views that touch no memory of the device."""
_FOUND = ("embedding", "index_select", "gather", "index")
"""Operators that read no more of their first argument than they give."""
_WRITTEN = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")
"""Operators that write their first argument without reading it."""

ProductKey = tuple[str, tuple[int, ...], str]
CollectiveKey = tuple[Kind, str, int, int]


@dataclass
class Tally:
    """What was counted; a sum over operators, so that parts of a step can be added and multiplied."""

    products: Counter[ProductKey] = field(default_factory=Counter)
    collectives: Counter[CollectiveKey] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)
    """`moved` bytes and called `operators`."""

    def copy(self) -> Tally:
        return Tally(self.products.copy(), self.collectives.copy(), self.other.copy())

    def extended(self, before: Tally, after: Tally, steps: int, each: int) -> Tally:
        """This, with `steps` micro-batches more, where from `before` to `after` there were `each`."""

        def more(mine: Counter[Any], a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
            out: Counter[Any] = Counter()
            for key in mine:
                grown, rest = divmod((b[key] - a[key]) * steps, each)
                assert not rest, f"{key} does not grow evenly with micro-batches"
                out[key] = mine[key] + grown
            return out

        return Tally(
            more(self.products, before.products, after.products),
            more(self.collectives, before.collectives, after.collectives),
            more(self.other, before.other, after.other),
        )

    def product_list(self) -> tuple[Product, ...]:
        """Largest first."""
        found = [
            Product(kind, shape, dtype, calls, calls * _flops(kind, shape))  # type: ignore[arg-type]
            for (kind, shape, dtype), calls in self.products.items()
        ]
        return tuple(sorted(found, key=lambda p: (-p.flops, p.kind, p.shape, p.dtype)))

    def counts(self, memory: Memory, rank: int = 0, stage: int = 0, notes: tuple[str, ...] = ()) -> Counts:
        return Counts(
            rank, stage, self.product_list(), self.other["moved"], self.other["operators"], self.collective_list(), memory, notes
        )  # fmt: skip

    def collective_list(self) -> tuple[Collective, ...]:
        """Most bytes first."""
        found = [Collective(*key, calls) for key, calls in self.collectives.items()]
        return tuple(sorted(found, key=lambda c: (-c.bytes * c.calls, c.kind, c.axis, c.bytes)))


def _flops(kind: str, shape: tuple[int, ...]) -> int:
    """Of one call. torch.utils.flop_counter's formulas: attention's backward has five products, forward two."""
    if kind == "mm":
        batch, m, k, n = shape
        return 2 * batch * m * k * n
    batch, heads, queries, keys, size = shape
    return (4 if kind == "attention" else 10) * batch * heads * queries * keys * size


class _Operator(NamedTuple):
    """What is to be done for an operator."""

    does: str
    """nothing, product, attention, collective, moves."""
    name: str
    reads: tuple[int, ...] = ()
    """Arguments read, by place."""
    writes: tuple[int, ...] = ()
    kind: Kind | None = None


def _look_at(func: Any) -> _Operator:
    name = func._schema.name
    space, _, leaf = name.partition("::")
    if space in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        kind = next((kind for part, kind in _KINDS if part in leaf), None)
        return _Operator("collective" if kind else "nothing", name, kind=kind)
    if name in _PRODUCTS:
        return _Operator("product", name)
    if leaf.startswith(_ATTENTION):
        return _Operator("attention", name)
    if space in ("prim", "profiler") or leaf in _NOTHING or func.is_view:
        return _Operator("nothing", name)
    arguments = func._schema.arguments
    writes = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    unread = {i for i in writes if arguments[i].name == "out"}
    if leaf in _WRITTEN or leaf in _FOUND:
        unread.add(0)
    if leaf == "_fused_adamw_":  # gradients are written only where a scale is taken off them
        writes.remove(1)
    return _Operator("moves", name, tuple(i for i in range(len(arguments)) if i not in unread), tuple(writes))


def _size(value: Any) -> int:
    """Bytes of a tensor or a list of them; 0 of anything else."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_size(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    return [item for item in value if isinstance(item, torch.Tensor)] if isinstance(value, (list, tuple)) else ()


class Groups:
    """Process groups by name: the mesh axis that each lies along, and its ranks."""

    def __init__(self, mesh: Mesh):
        self.found: dict[str, tuple[str, int]] = {}
        for axis in AXES:
            group = mesh.devices.get_group(axis)
            self.found[group.group_name] = axis, group.size()
        self.everyone = False

    @contextmanager
    def all_ranks(self) -> Iterator[None]:
        """A collective now is one of all ranks; an axis as long has the same group."""
        self.everyone = True
        try:
            yield
        finally:
            self.everyone = False

    def of(self, args: Sequence[Any]) -> tuple[str, int]:
        """Of the collective that was called with `args`."""
        if self.everyone:
            return "world", dist.get_world_size()
        for arg in args:
            if isinstance(arg, torch.ScriptObject):
                group = dist.ProcessGroup.unbox(arg)
                # The two ends of a pipeline that share an embedding make groups of their own.
                return self.found.get(group.group_name, ("pp", group.size()))
            if isinstance(arg, str) and arg in self.found:
                return self.found[arg]
        raise AssertionError(f"a collective without a known group: {args}")


class Weightless(FakeTensorMode):
    """Makes tensors without memory. DTensor enters the mode that is there once more, to ask how the output of an operator
    would look: what is called then is no part of the step."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.entered = 0

    def __enter__(self) -> Self:
        self.entered += 1
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.entered -= 1
        super().__exit__(*args)

    @property
    def asked(self) -> bool:
        """Whether an operator is only asked about."""
        return self.entered > 1


class Counting(TorchDispatchMode):
    """Counts into `tally` and `live` what is called while it is entered.

    Under `fake` operators on real tensors alone (labels, document numbers) are run for real, so that shapes
    can depend on them.
    """

    _operators: dict[Any, _Operator] = {}  # noqa: RUF012

    def __init__(self, groups: Groups | None, live: Live, fake: Weightless | None):
        super().__init__()
        self.groups, self.live, self.fake, self.tally = groups, live, fake, Tally()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        for kind in types:
            if kind is not FakeTensor and kind is not torch.nn.Parameter and kind is not torch.Tensor:
                return NotImplemented  # a DTensor calls again with what this rank has of it
        kwargs = kwargs or {}
        if self.fake is not None and self.fake.asked:
            return func(*args, **kwargs)
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = _look_at(func)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # norms, losses, numbers of steps: any number will do
        if FakeTensor not in types and self._real(args, kwargs):
            with _disable_current_modes():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        self._count(operator, func, args, kwargs, out)
        return out

    @staticmethod
    def _real(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether there are tensors and all have memory."""
        found = [t for arg in (*args, *kwargs.values()) for t in _tensors(arg)]
        return bool(found) and not any(isinstance(t, FakeTensor) or t.is_meta for t in found)

    def _count(self, operator: _Operator, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        note, does = self.live.note, operator.does
        for tensor in _tensors(out):
            if not tensor.is_meta or isinstance(tensor, FakeTensor):
                note(tensor)
        if does == "nothing":
            return
        if does == "collective":
            assert operator.kind is not None and self.groups is not None
            axis, ranks = self.groups.of((*args, *kwargs.values()))
            if ranks > 1:
                size = max(_size(value) for value in (*args, *kwargs.values(), out))
                self.tally.collectives[operator.kind, axis, ranks, size] += 1
            return
        if (
            self.groups is not None and self.groups.everyone
        ):  # tokens are counted on the host, and the sums are four numbers
            return
        self.tally.other["operators"] += 1
        if does == "product":
            place = _PRODUCTS[operator.name]
            a, b = args[place], args[place + 1]
            batch = a.shape[0] if a.ndim == 3 else 1
            sizes = (batch, a.shape[-2], a.shape[-1], b.shape[-1])
            self.tally.products["mm", sizes, str(a.dtype).removeprefix("torch.")] += 1
        elif does == "attention":
            backward = "backward" in operator.name
            q, k = args[1:3] if backward else args[:2]
            shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])
            kind = "attention_backward" if backward else "attention"
            self.tally.products[kind, shape, str(q.dtype).removeprefix("torch.")] += 1
        elif operator.name.startswith("fsdp::"):
            self._fsdp(operator.name, args, kwargs, out)
        else:
            self._moves(operator, func, args, kwargs, out)

    def _moves(self, operator: _Operator, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        arguments = func._schema.arguments
        values = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(arguments)]
        moved = sum(_size(values[i]) for i in (*operator.reads, *operator.writes))
        if not operator.writes:
            moved += _size(out)
            if operator.name.removeprefix("aten::") in _FOUND:
                moved += _size(out)
        self.tally.other["moved"] += moved

    def _fsdp(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """FSDP's copies into and out of what is sent: all that they touch is gathered, or is about to be scattered."""
        if name == "fsdp::all_gather_copy_in":
            inside, outside = args[0], out[1:]
        elif name == "fsdp::split_with_sizes_copy":
            inside, outside = args[:1], kwargs["out"]
        else:  # chunk_cat
            inside, outside = args[0], [kwargs["out"]]
        self.tally.other["moved"] += 2 * _size(inside)
        for tensor in (*inside, *outside):
            self.live.use(tensor, "gathered")
