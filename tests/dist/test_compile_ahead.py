"""Graphs compiled by one job are found by the next, in fresh processes on an empty disk, or it is said why not."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_prep.errors import UserError
from launch.compile import ahead, compile_graphs
from llama import compile_manifest as manifests
from llama.config import Recipe
from llama.device import find_device
from llama.recipe import lay_out
from llama.run_folder import complete
from llama.train import loop
from llama.train.graphs import Count, Graphs
from tests.dist import harness
from tests.dist.layouts import recipe
from tests.dist.runs import run_recipe, write_tokens


def _settle(cache: Path, disk: Path) -> None:
    """The environment that a node's env.sh makes: a cache that all share, and a disk of this node."""
    import torch._inductor.config

    os.environ.update(HERD_DEVICE="cpu", HERD_CACHE=str(cache), TORCHINDUCTOR_CACHE_DIR=str(disk))
    # Two fifths of the time that C++ takes here: headers compiled by an earlier test run, instructions tried out.
    os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "1"
    torch._inductor.config.cpp.vec_isa_ok = True


def _graphs(config: Recipe) -> Graphs:
    return Graphs(config, find_device(), lay_out(config, dist.get_world_size()))


def _compiled_ahead(rank: int, config: Recipe, cache: Path, disk: Path) -> str:
    """compile_graphs on this rank; what it says and, after that, the error that ends it."""
    _settle(cache, disk)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            compile_graphs(ahead(config))
        except UserError as error:
            print("error", error.code, error)
    return said.getvalue()


def _trained(rank: int, config: Recipe, cache: Path, disk: Path) -> tuple[str, Count, int]:
    """A whole run: what was found, what was compiled, and how many files the compiler has added."""
    _settle(cache, disk)
    graphs = _graphs(config)
    verdict = str(graphs.load())
    dist.barrier()
    assert graphs.local is not None
    before = sum(1 for _ in graphs.local.rglob("*.so"))
    loop.train(config, graphs=graphs)
    count = graphs.count()
    return verdict, count, sum(1 for _ in graphs.local.rglob("*.so")) - before


def _found(rank: int, config: Recipe, cache: Path, disk: Path) -> str:
    _settle(cache, disk)
    return str(_graphs(config).load())


@pytest.mark.slow
def test_a_run_finds_every_graph_that_was_compiled_ahead(tmp_path: Path) -> None:
    cache, changes = tmp_path / "cache", {"train__compile": True, "validation__interval": 2, "validation__batches": 1}
    config = run_recipe(tmp_path / "run", write_tokens(tmp_path), **changes)
    said = harness.run(2, _compiled_ahead, config, cache, tmp_path / "first")
    lines = said[0].splitlines()
    assert lines[0] == f"compile cache cold: nothing was compiled into {cache} yet"
    assert "Total graphs: 6 / compiled: " in lines[-2] and lines[-2].endswith(" / failed: 0")
    assert lines[-1].startswith("herd: compiled ahead in ") and str(cache) in lines[-1]
    assert "Total" not in said[1]
    assert not (tmp_path / "run").exists() and not list(cache.glob("compiling*")), "more is kept than the graphs"

    # Steps, validations, checkpoints, the last batch: nothing is new, nor does a C++ compiler run.
    for verdict, count, files in harness.run(2, _trained, config, cache, tmp_path / "second"):
        assert verdict.startswith("warm: 6 graphs compiled by "), verdict
        assert count == Count(6, 0, 6, 0) and files == 0
    assert len(complete(tmp_path / "run")) == 2

    shorter = run_recipe(tmp_path / "run", config.data.train[0].path, data__seq_length=16, **changes)
    for verdict in harness.run(2, _found, shorter, cache, tmp_path / "third"):
        assert verdict == "cold: no graphs for data.seq_length=16 (compiled: 32)"


def test_a_graph_that_fails_fails_the_job_and_is_named(tmp_path: Path) -> None:
    config = run_recipe(tmp_path / "run", write_tokens(tmp_path), train__compile=True)
    said = harness.run(2, _failing, config, tmp_path / "cache", tmp_path / "disk")
    (count,) = [line for text in said for line in text.splitlines() if line.startswith("Total graphs")]
    # Two, unless a busy machine lets one rank come seconds after the other.
    assert count in [f"Total graphs: {n} / compiled: 0 / cached: 0 / failed: {n}" for n in (2, 1)]
    for text in said:
        last = text.splitlines()[-1]
        assert last.startswith("error 1 a graph of tiny cannot be compiled: InvalidCxxCompiler: ") and "none" in last
    assert not list((tmp_path / "cache").glob("*/*/manifest.json")) and not list((tmp_path / "cache").iterdir())


def _failing(rank: int, config: Recipe, cache: Path, disk: Path) -> str:
    import torch._inductor.config

    torch._inductor.config.cpp.cxx = (None, "/none")  # CXX, which was read when this process's parent loaded torch
    return _compiled_ahead(rank, config, cache, disk)


CONFIG = recipe(train__compile=True)


def _toy(rank: int, cache: Path, disk: Path, files: dict[str, str]) -> dict[str, Any]:
    """A run whose compiler leaves `files`: load, one graph, two steps."""
    _settle(cache, disk)
    graphs = _graphs(CONFIG)
    verdict = str(graphs.load())
    assert graphs.local is not None
    there = sorted(p.name for p in graphs.local.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not verdict.startswith("warm"):
        torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(1))
        for name, text in files.items():
            graphs.local.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
            graphs.local.joinpath(name).write_text(text)
    dist.barrier()
    trouble = [graphs.after_step(), graphs.after_step()]
    return {"verdict": verdict, "there": there, "trouble": trouble, "count": graphs.count(), "local": graphs.local}


FILES = {"ab/kernel.so": "machine code", "fxgraph/k/key/bits": "a graph", "locks/kernel.lock": "", "ab/.9.tmp": "half"}


def test_a_cold_run_keeps_its_graphs_for_the_next_attempt(tmp_path: Path) -> None:
    cold = harness.run(2, _toy, tmp_path / "cache", tmp_path / "a", FILES)
    warm = harness.run(2, _toy, tmp_path / "cache", tmp_path / "b", {})
    assert cold[0]["verdict"].startswith("cold") and cold[0]["trouble"] == [None, None]
    assert warm[1]["verdict"].startswith("warm: 2 graphs") and warm[1]["count"] == Count()
    assert warm[1]["there"] == ["bits", "kernel.so"]
    assert cold[0]["local"] == cold[1]["local"], "a node's ranks share its folder"
    harness.run(2, _toy, tmp_path / "cache", tmp_path / "b", {})
    assert not warm[0]["local"].exists(), "folders of dead processes are removed"


def test_a_damaged_pack_is_passed_over_and_mended(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    harness.run(1, _toy, cache, tmp_path / "a", FILES)
    for damage in ("half", "bit", "gone"):
        (pack,) = cache.glob("*/*/pack-*.tgz")
        data = pack.read_bytes()
        pack.unlink()
        if damage != "gone":
            pack.write_bytes(data[: len(data) // 2] if damage == "half" else data[:40] + b"?" + data[41:])
        (cold,) = harness.run(1, _toy, cache, tmp_path / "b", FILES)
        assert cold["verdict"].startswith(f"cold: {pack} is passed over: ") and cold["there"] == [], cold["verdict"]
        for other in set(cache.glob("*/*/pack-*.tgz")) - set(_named(cache)):
            other.unlink()  # as it would be after an hour
    (warm,) = harness.run(1, _toy, cache, tmp_path / "c", {})
    assert warm["verdict"].startswith("warm") and warm["there"] == ["bits", "kernel.so"]


def _named(cache: Path) -> list[Path]:
    """The packs that the one manifest there names."""
    (path,) = cache.glob("*/*/manifest.json")
    return [path.parent / pack["name"] for pack in manifests.read(path.parent)["packs"]]


def test_machine_code_of_another_processor_is_left_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    harness.run(1, _toy, cache, tmp_path / "a", FILES)
    (manifest,) = cache.glob("*/*/manifest.json")
    manifest.write_text(manifest.read_text().replace(manifests.cpu(), "x86_64-another"))
    (cold,) = harness.run(1, _toy, cache, tmp_path / "b", FILES)
    assert "another processor" in cold["verdict"] and cold["there"] == []
    packs = manifests.read(manifest.parent)["packs"]
    assert {pack["cpu"] for pack in packs} == {"x86_64-another", manifests.cpu()}, "both kinds of node find theirs"


def _saves(rank: int, cache: Path, disk: Path) -> None:
    """Two jobs of one rank each: they do not know each other, and save the same graphs again and again."""
    _settle(cache, disk / str(rank))
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    dist.barrier()
    before = dist.distributed_c10d._get_default_group()
    dist.distributed_c10d._update_default_pg(alone)
    try:
        for i in range(8):
            graphs = _graphs(CONFIG)
            graphs.load()
            assert graphs.local is not None
            torch._dynamo.reset()
            torch.compile(lambda x, i=i: x + i, backend="aot_eager")(torch.ones(1))
            (graphs.local / f"kernel-{rank}-{i}.so").write_text("machine code")
            assert graphs.save() is None
    finally:
        dist.distributed_c10d._update_default_pg(before)


def test_jobs_that_save_at_once_leave_a_whole_manifest(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    harness.run(3, _saves, cache, tmp_path / "disk")
    packs = _named(cache)
    assert packs and all(pack.is_file() for pack in packs)
    assert not list(packs[0].parent.glob(".*")), "something half written is left"
    shutil.rmtree(tmp_path / "disk")
    (found,) = harness.run(1, _toy, cache, tmp_path / "b", {})
    assert found["verdict"].startswith("warm") and found["there"]


def _kept(rank: int, cache: Path, disk: Path) -> Any:
    """Ranks as nodes of their own; the second has other graphs."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    files = {"ab/kernel.so": "machine code"} if rank < 2 else {"cd/other.so": "machine code"}
    return _toy(rank, cache, disk / str(rank), files)


def test_each_node_finds_the_graphs_of_its_own_ranks_and_alike_ones_are_kept_once(tmp_path: Path) -> None:
    harness.run(4, _kept, tmp_path / "cache", tmp_path / "a")
    assert len(list((tmp_path / "cache").glob("*/*/pack-*.tgz"))) == 2
    warm = harness.run(4, _kept, tmp_path / "cache", tmp_path / "b")
    assert [seen["there"] for seen in warm] == [["kernel.so"]] * 2 + [["other.so"]] * 2
