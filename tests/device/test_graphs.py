"""Every graph that a recipe would send to Neuron's compiler keeps to what that takes, and nothing is compiled after warm-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.config import Recipe
from llama.device import Device, find_device
from llama.recipe import CONFIGS, lay_out, load
from tests.device import graphs
from tests.device.graphs import Eager, Finding, Graph, Recorder
from tests.dist import harness
from tests.dist.layouts import recipe as tiny
from tests.dist.runs import run_recipe, spied_train, write_tokens
from tests.unit.llama.chat.chats import chat_recipe, write_talks, write_tokenizer

RECIPES = sorted(path.stem for path in CONFIGS.glob("*_trn2.yaml"))


class OnCpu(Device):
    """What neuron can do, with the tensors on the CPU."""

    def torch(self) -> torch.device:
        return torch.device("cpu")

    def peak_memory(self) -> int:
        return 0

    def synchronize(self) -> None:
        pass


def neuron_on_cpu() -> Device:
    """The device that the recipes of Trainium meet, compiled blocks going to the recorder."""
    abilities = asdict(find_device("cpu")) | dict(
        type="neuron", name="trn2", compile_backend=graphs.NAME, fused_adamw=False, pipeline=False, zero_bubble=False,
        peak_flops=1e12,
    )  # fmt: skip
    return OnCpu(**abilities)


@contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """This process as the first of `world` ranks of which no other is there."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    yield


def one_block(recipe: Recipe, recorder: Recorder) -> list[Graph]:
    """The graphs of one of the recipe's blocks at its real width, on its own tensor ranks; nothing is computed.

    Over data ranks a block's graphs are the same: what FSDP does lies in hooks outside.
    """
    from llama.model.attention import document_context, document_mask
    from llama.model.rope import inverse_frequencies, rotation
    from llama.parallel import apply
    from llama.parallel.mesh import build_mesh

    config, t = recipe.model.model_copy(update={"num_layers": 1}), recipe.train
    train = t.model_copy(update={"global_batch_size": t.micro_batch_size})
    recipe = recipe.model_copy(update={"model": config, "train": train})
    tensor = recipe.parallel.tensor_parallel
    mesh = build_mesh(lay_out(recipe, tensor), "cpu")
    (part,) = apply.parallelize(recipe, mesh, neuron_on_cpu()).parts
    block, (B, S) = part.layers["0"], (t.micro_batch_size, recipe.data.seq_length)
    frequencies = inverse_frequencies(config.head_size, config.rope_theta, config.rope_scaling, torch.device("cpu"))
    context = document_context(*rotation(torch.zeros(B, S, dtype=torch.int32), frequencies), None)
    if recipe.data.document_mask:
        context = context._replace(mask=document_mask(torch.zeros(B, S, dtype=torch.int32)))
    cut = tensor if recipe.parallel.sequence_parallel else 1
    dtype = torch.float32 if t.precision == "fp32" else torch.bfloat16
    x = torch.empty(B, S // cut, config.hidden_size, dtype=dtype, requires_grad=True)
    out = block(x, context)
    out.backward(torch.empty_like(out))
    with torch.no_grad():
        block(x, context)
    return recorder.graphs


def blocks_of(rank: int, names: list[str]) -> dict[str, tuple[list[str], list[Finding]]]:
    """Kinds of the graphs of the block of each recipe, and what is wrong with them."""
    from llama.parallel import apply

    apply.fill_parameters = lambda *args: None  # 405B's block has gigabytes, which nobody reads
    found = {}
    for name in names:
        with fake_ranks(load(name).parallel.tensor_parallel):
            recorded = one_block(load(name), Recorder(hollow=True))
        found[name] = [graph.kind for graph in recorded], graphs.lint(recorded)
    return found


def test_every_graph_of_every_recipe_at_its_own_width_is_one_that_trainium_takes() -> None:
    with ThreadPoolExecutor() as pool:  # a process for each half, which cannot share one's default group
        halves = list(
            pool.map(lambda half: harness.run(1, blocks_of, half, timeout=280)[0], (RECIPES[::2], RECIPES[1::2]))
        )
    found = halves[0] | halves[1]
    assert sorted(found) == RECIPES
    for name, (kinds, findings) in found.items():
        assert sorted(kinds) == ["backward", "forward", "inference"], f"{name}: {kinds}"
        assert not graphs.faults(findings), f"{name}: " + "; ".join(map(str, graphs.faults(findings)))


class Broken(torch.nn.Module):
    """A block with something planted behind it."""

    def __init__(self, fault: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.fault = fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fault(torch.nn.functional.silu(x))


def _complex_rotation(x: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones(4), torch.arange(4.0))).flatten(-2)


def _swapped(x: torch.Tensor) -> torch.Tensor:
    import torch.distributed._functional_collectives as functional

    return functional.all_to_all_single(x.contiguous(), [1, 3], [1, 3], torch.distributed.group.WORLD)


PLANTED: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    # name: rule, what it says, what is planted
    "item": ("host sync", "_local_scalar_dense", lambda x: x.narrow(0, 0, int(x.sum().item()))),
    "mask": ("dynamic shape", "by a mask", lambda x: x[x.sum(-1) > 0]),
    "nonzero": ("dynamic shape", "nonzero", lambda x: x * x.nonzero().float().sum()),
    "complex": ("complex", "complex64", _complex_rotation),
    "float64": ("float64", "float32", lambda x: x.double().cumsum(0).float()),
    "int64": ("int64", "mul", lambda x: x + (torch.arange(8) * 2**33).float()),
    "random": ("random", "rand_like", lambda x: x + torch.rand_like(x)),
    "all_to_all": ("uneven all_to_all", "[1, 3]", _swapped),
}


def planted(rank: int) -> dict[str, list[Finding]]:
    """What the lint finds in each broken module, and in one compiled for any shape."""
    torch._dynamo.config.capture_scalar_outputs = True  # else Dynamo itself refuses what the host waits for
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    found = {}
    with fake_ranks(2):
        for name, fault in [*((name, fault) for name, (_, _, fault) in PLANTED.items()), ("symbols", torch.sin)]:
            recorder = Recorder()
            compiled = torch.compile(Broken(fault), backend=graphs.NAME, fullgraph=True, dynamic=name == "symbols")
            compiled(torch.ones(4, 8) / 8)
            found[name] = graphs.lint(recorder.graphs)
    return found


def test_planted_faults_are_found_with_their_place() -> None:
    (found,) = harness.run(1, planted, timeout=280)
    assert {finding.rule for finding in found.pop("symbols")} == {"dynamic shape"}
    for name, (rule, what, fault) in PLANTED.items():
        mine = [finding for finding in found[name] if finding.rule == rule and what in finding.what]
        assert mine, f"{name}: only {[str(finding) for finding in found[name]]}"
        assert "tests/device/test_graphs.py" in mine[0].source and fault.__code__.co_name in mine[0].source


def block_with(rank: int, fault: str) -> list[Finding]:
    """What is found in a block of ours whose rotation is broken."""
    from llama.model import attention

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if fault == "item":
            return x * cos.max().item()
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)

    attention.rotate = rotate
    with fake_ranks(1):
        return graphs.lint(one_block(tiny(train__compile=True), Recorder()))


@pytest.mark.parametrize(
    # Dynamo takes what .item() gives into the graph, as a number of 64 bits.
    ("fault", "rule"), [("complex", "complex"), ("item", "float64")],
)  # fmt: skip
def test_a_fault_in_a_block_is_found_in_each_of_its_graphs(fault: str, rule: str) -> None:
    (found,) = harness.run(1, block_with, fault, timeout=280)
    mine = [finding for finding in graphs.faults(found) if finding.rule == rule]
    assert {finding.graph for finding in mine} == {"forward", "backward", "inference"}
    assert any("test_graphs.py" in finding.source and "rotate" in finding.source for finding in mine)


@dataclass
class Seen:
    """What one rank saw of a run."""

    error: str | None
    graphs: dict[str, list[tuple[str, int]]]
    """Of each kind: key, and the step in which it was compiled."""
    steps: int
    findings: list[Finding]
    eager: dict[tuple[str, str, str], int]
    """What the network and the optimizer call outside of graphs."""


def seen_run(rank: int, config: Recipe) -> Seen:
    """Train on, or from the start, as a process on a Trainium node would; blocks go to the recorder."""
    from llama.model import llama as network
    from llama.model.attention import Context, document_mask
    from llama.parallel.apply import ParallelLlama
    from llama.parallel.mesh import build_mesh
    from llama.train import loop

    recorder, eager = Recorder(), Eager()

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with eager:
                return function(*args, **kwargs)

        return call

    def built(*args: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*args)
        optimizer.step = watched(optimizer.step)
        return optimizer

    def act(trainer: Any, step: int) -> None:
        recorder.moment = step

    build_optimizer = loop.build_optimizer
    loop.find_device, loop.build_optimizer = neuron_on_cpu, built
    loop.build_mesh = lambda layout, _: build_mesh(layout, "cpu")
    ParallelLlama.forward_backward = watched(ParallelLlama.forward_backward)
    ParallelLlama.evaluate = watched(ParallelLlama.evaluate)
    network.document_context = lambda cos, sin, documents: Context(  # as on a device that has no kernel of its own
        cos, sin, None if documents is None else document_mask(documents)
    )
    record = spied_train(rank, config, act)
    kinds: dict[str, list[tuple[str, int]]] = {}
    for graph in recorder.graphs:
        kinds.setdefault(graph.kind, []).append((graph.key, graph.moment))
    return Seen(record.error, kinds, len(record.reports), graphs.lint(recorder.graphs), eager.found)


KNOWN = {
    # Token ids and rows of the vocabulary, and the greatest 32-bit number for "not this rank's": they fit into 32 bits.
    ("int64", "sub", "llama/parallel/tensor.py SharedVocabulary.embed"),
    ("int64", "clamp", "llama/parallel/tensor.py SharedVocabulary.embed"),
    ("int64", "sub", "llama/model/loss.py _LinearCrossEntropy.forward"),
    ("int64", "clamp", "llama/model/loss.py _LinearCrossEntropy.forward"),
    ("int64", "add", "llama/model/loss.py _likeliest"),
    ("int64", "neg", "llama/model/loss.py _likeliest"),
    ("int64", "masked_fill", "llama/model/loss.py _likeliest"),
    ("int64", "allreduce_", "llama/parallel/tensor.py SharedVocabulary.maximum"),
    # Both AdamWs count their steps on the host.
    ("host sync", "_local_scalar_dense", "llama/train/loop.py Trainer.step"),
    ("host sync", "_local_scalar_dense", "llama/train/optim.py StochasticAdamW._update"),
    # Where a shard lies in the whole is worked out on the host.
    ("host sync", "_local_scalar_dense", "llama/parallel/shards.py local_part"),
    ("int64", "index", "llama/parallel/shards.py local_part"),
}
"""What is called outside of graphs and would be a fault inside: all of it, each with why it may stay."""


def check(ranks: list[Seen], steps: int) -> None:
    """One graph of each kind for all layers, steps and validations, compiled no later than the first of its kind ran."""
    for seen in ranks:
        assert seen.error is None and seen.steps == steps
        assert {kind: len(made) for kind, made in seen.graphs.items()} == {"forward": 1, "backward": 1, "inference": 1}
        assert not graphs.faults(seen.findings), "; ".join(map(str, graphs.faults(seen.findings)))
        assert set(seen.eager) <= KNOWN, set(seen.eager) - KNOWN


def test_a_run_compiles_three_graphs_and_a_resumed_one_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, validations, a checkpoint, the last batch; then a new process from the checkpoint on."""
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    config = run_recipe(
        tmp_path / "run", write_tokens(tmp_path), train__compile=True, train__precision="bf16_sr", train__steps=3,
        train__activation_checkpointing="selective", parallel__tensor_parallel=2, validation__interval=2,
        validation__batches=1, checkpoint__interval=2, train__micro_batch_size=2, model__num_layers=2,
    )  # fmt: skip
    first = harness.run(4, seen_run, config, timeout=280)
    check(first, 3)
    assert [moment for made in first[0].graphs.values() for _, moment in made] == [1, 1, 2]
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    second = harness.run(4, seen_run, longer, timeout=280)
    check(second, 1)
    for before, after in zip(first, second, strict=True):
        assert {kind: made[0][0] for kind, made in before.graphs.items()} == {
            kind: made[0][0] for kind, made in after.graphs.items()
        }, "a resumed run would compile anew"


def test_packed_conversations_have_fixed_shapes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence is filled up to its length, and every position gets logits: the last batch is like the first."""
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    write_tokenizer(tmp_path / "tokenizer")
    write_talks(tmp_path / "talks.jsonl")
    config = chat_recipe(
        tmp_path, tmp_path / "talks.jsonl", train__compile=True, train__precision="bf16_sr", train__steps=3,
        train__micro_batch_size=4, validation__interval=3, validation__batches=1, data__split="80,20,0",
    ).model_copy(update={"run_dir": str(tmp_path / "run")})  # fmt: skip
    check(harness.run(1, seen_run, config, timeout=280), 3)
