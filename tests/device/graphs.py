"""What a compiler would be given: a Dynamo backend that only records, and a lint of what Neuron's compiler does not take.

The rules are AWS's words on TorchNeuron (Neuron 2.33: torch.compile backend reference, release notes) and hazards seen in
public code. A graph without findings can still fail to compile there; one with findings is known to be trouble.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
NAME = "herd_recorder"
"""What the recorder is registered as, for Device.compile_backend."""

MOVES = frozenset(
    """alias arange argmax cat clone copy_ detach embedding empty empty_like empty_strided expand fill_ full gather
    index_select lift_fresh new_empty new_zeros ones ones_like permute reshape select slice split squeeze t to transpose
    unbind unsqueeze view zero_ zeros zeros_like _reshape_alias _unsafe_view""".split()  # noqa: SIM905
)
"""Operators that carry 64-bit integers from place to place, or make indices: silently 32-bit there, ids and indices fit."""
NOTED = frozenset({"random", "object"})
"""Rules that name what is worth knowing and no fault."""


@dataclass(frozen=True)
class Finding:
    """One thing that Neuron's compiler is known not to take as it is."""

    rule: str
    what: str
    graph: str
    node: str
    source: str
    """File, line and function of ours that it comes from."""

    def __str__(self) -> str:
        return f"{self.graph} graph, {self.node} ({self.source}): {self.rule}: {self.what}"


@dataclass(frozen=True)
class Graph:
    """A graph as the compiler would get it, after autograd has split it."""

    kind: str
    """forward, backward, or inference: without gradients."""
    module: torch.fx.GraphModule
    moment: Any = None
    """When it was compiled, as the recorder was told."""

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return list(self.module.graph.nodes)

    @property
    def key(self) -> str:
        """Equal for graphs that a compiler's cache would take for the same: operators, order, shapes, types."""
        lines = (f"{n.op} {n.name} {n.target} {n.args} {n.kwargs} {_shapes(n)}" for n in self.nodes)
        text = re.sub(r"0x[0-9a-f]+", "", "\n".join(lines))
        # Which of several inputs that are one and the same mesh is passed on says nothing.
        for node in self.nodes:
            if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
                text = re.sub(rf"\b{node.name}\b", "object", text)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shapes(node: torch.fx.Node) -> list[str]:
    return [
        f"{x.dtype}{tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
        for x in tree_leaves(node.meta.get("val"))
    ]


class Recorder:
    """The backend. `hollow`: graphs are not run, and give unwritten memory of the right shapes: for real widths.

    One at a time: a new one takes the name over. What was compiled before is forgotten.
    """

    def __init__(self, hollow: bool = False):
        self.graphs: list[Graph] = []
        self.dynamo = 0
        """Graphs that Dynamo gave: a block that breaks would give several a call."""
        self.hollow, self.moment, self.inside = hollow, None, False
        torch._dynamo.reset()
        global _current
        _current = self

    def compile(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What Dynamo calls with each of its graphs."""
        self.dynamo += 1
        kinds = {"fw_compiler": "forward", "bw_compiler": "backward", "inference_compiler": "inference"}
        compiled: Callable[..., Any] = aot_autograd(**{name: self._kept(kind) for name, kind in kinds.items()})(
            module, inputs
        )
        return compiled

    def _kept(self, kind: str) -> Callable[..., Any]:
        def keep(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            from functorch.compile import make_boxed_func

            self.graphs.append(Graph(kind, module, self.moment))
            return make_boxed_func(_hollow(module) if self.hollow else partial(self._run, module))

        return keep

    def _run(self, module: torch.fx.GraphModule, *args: Any) -> Any:
        self.inside = True
        try:
            return module.forward(*args)
        finally:
            self.inside = False


_current: Recorder | None = None


@torch._dynamo.register_backend(name=NAME)
def _record(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    assert _current is not None, "make a Recorder first"
    return _current.compile(module, inputs)


def _hollow(module: torch.fx.GraphModule) -> Callable[..., list[Any]]:
    outputs = module.graph.output_node().args[0]

    def run(*args: Any) -> list[Any]:
        values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in outputs]  # type: ignore[union-attr]
        return [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) if isinstance(v, torch.Tensor) else v
            for v in values
        ]

    return run


def lint(graphs: Iterable[Graph]) -> list[Finding]:
    """What Neuron's compiler would not take in `graphs`, in their order; the notes of NOTED among it."""
    return [finding for graph in graphs for finding in _lint(graph)]


def faults(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are no mere notes."""
    return [finding for finding in findings if finding.rule not in NOTED]


def _lint(graph: Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function"):
            continue
        value = node.meta.get("val")
        if node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))  # type: ignore[no-untyped-call]
            problems = list(_operator(node.target, args, kwargs, value))
        else:
            problems = list(_values(value))
        for rule, what in problems:
            yield Finding(rule, what, graph.kind, f"node {node.name}", _source_of(node))


def _operator(target: Any, args: Sequence[Any], kwargs: dict[str, Any], value: Any) -> Iterator[tuple[str, str]]:
    """Rule and text for each thing wrong with one call of an operator."""
    yield from _values(value)
    name = _name(target)
    yield from (("complex", f"{name} of {arg}") for arg in tree_leaves([args, kwargs]) if isinstance(arg, complex))
    if isinstance(target, torch._ops.HigherOrderOperator):
        yield "operator", f"{name} is a higher-order operator"
    if not isinstance(target, torch._ops.OpOverload):
        return
    if target.namespace not in ("aten", "prims", "_c10d_functional", "c10d", "_dtensor", "fsdp", "profiler"):
        yield "operator", f"{target} is not one of PyTorch's own"
    short = name.removesuffix("_")
    if any(_is(x, torch.int64) for x in tree_leaves(value)) and name not in MOVES:
        yield "int64", f"{name} computes in 64-bit integers, which silently become 32-bit"
    masks = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
        _is(x, torch.bool) for x in tree_leaves(list(args[1:2]))
    )
    dynamic = torch.Tag.dynamic_output_shape in target.tags and name not in ("index", "_unsafe_index")
    if dynamic or masks:
        yield "dynamic shape", f"{name}{' by a mask' if masks else ''} gives as much as the data says"
    if torch.Tag.data_dependent_output in target.tags:
        yield "host sync", f"{name} makes the host wait for a value"
    if torch.Tag.nondeterministic_seeded in target.tags and not _without_dropout(target, args, kwargs):
        yield "random", f"{name} draws random numbers"
    if re.search(r"all_?to_?all", short):
        splits = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and all(_whole(x) for x in arg)]
        if any(len({str(x) for x in split}) > 1 for split in splits):
            yield "uneven all_to_all", f"{name} with splits {splits}"
    if re.fullmatch(r"(i?send|i?recv|recv_any_source|batch_p2p_ops)", short):
        yield "send/recv", f"{name} between two ranks, which nobody has shown there"


def _without_dropout(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator that could drop is told not to, as attention is."""
    rates = [i for i, argument in enumerate(target._schema.arguments) if argument.name == "dropout_p"]
    return bool(rates) and (args[rates[0]] if len(args) > rates[0] else kwargs.get("dropout_p", 0.0)) == 0.0


def _values(value: Any) -> Iterator[tuple[str, str]]:
    for x in tree_leaves(value):
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            yield "dynamic shape", f"{x} is a symbol, not a number"
        elif isinstance(x, torch.Tensor):
            if any(isinstance(size, torch.SymInt) for size in (*x.shape, *x.stride())):
                yield "dynamic shape", f"shape {tuple(x.shape)} has symbols"
            if x.dtype.is_complex:
                yield "complex", f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            if x.dtype == torch.float64:
                yield "float64", f"{tuple(x.shape)} silently becomes float32"
        elif x is not None and not isinstance(x, (int, float, bool)):
            yield "object", f"a {type(x).__name__}, which is no tensor"


def _is(x: Any, dtype: torch.dtype) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == dtype


def _whole(x: Any) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def _name(target: Any) -> str:
    """An operator's bare name: aten.mul.Tensor is mul."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def _source_of(node: torch.fx.Node) -> str:
    """The innermost line of this repository that a node comes from; a node that autograd or a pass made: its neighbour."""
    near = [node, *node.users, *node.all_input_nodes]
    trace = next((n.meta["stack_trace"] for n in near if n.meta.get("stack_trace")), "")
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace)
    ours = [frame for frame in frames if Path(frame[0]).is_relative_to(ROOT) and ".venv" not in frame[0]]
    path, line, function = (ours or frames or [("?", "?", "?")])[-1]
    short = Path(path).relative_to(ROOT) if ours else path
    return f"{short}:{line} {function}"


class Eager(TorchDispatchMode):
    """Lints the operators that are called outside compiled blocks; `found`: how often each rule was met at a place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str, str], int] = {}
        """Rule, operator, and file with function."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if _current is not None and _current.inside:
            return value
        for rule, _ in _operator(func, args, kwargs or {}, value):
            if rule != "object":  # groups and handles of collectives
                key = rule, _name(func), _caller()
                self.found[key] = self.found.get(key, 0) + 1
        return value


def _caller() -> str:
    """The innermost function of the package that calls."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "llama"):
            return f"{path.relative_to(ROOT)} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "torch"
