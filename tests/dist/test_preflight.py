"""Preflight finds the node that is not like the others, and every rank names the same one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import UserError
from llama import node
from llama import recipe as recipes
from llama.config import Recipe
from llama.device import find_device
from llama.run_folder import RunFolder
from llama.train import preflight, stragglers
from llama.train.preflight import Facts, NodeFault, judge
from llama.train.stragglers import Speed, judge_speed, rounds
from tests.dist import harness
from tests.dist.layouts import recipe


@dataclass
class Told:
    """What one rank came out with."""

    lines: list[str]
    error: str | None
    nodes: tuple[str, ...] | None
    """None: no NodeFault."""
    seconds: float


Plant = Callable[[Recipe, Path], tuple[Recipe, Path]]


def _preflight(rank: int, folder: Path, per_node: int, plant: tuple[int, Plant] | None, **constants: Any) -> Told:
    """Preflight on this rank, whose node is node1 for the first `per_node` ranks and so on; one rank has a fault."""
    torch.set_num_threads(1)
    os.environ["SLURMD_NODENAME"] = f"node{rank // per_node + 1}"
    config, where, lines = recipe(train__global_batch_size=24), folder, []
    layout = recipes.lay_out(config, torch.distributed.get_world_size())
    if plant and plant[0] == rank:
        config, where = plant[1](config, folder)
    for name, value in constants.items():
        setattr(preflight, name, value)
    started, error, nodes = time.perf_counter(), None, None
    try:
        preflight.preflight(config, find_device("cpu"), layout, RunFolder(where), 3, lines.append)
    except UserError as refused:
        error, nodes = str(refused), refused.nodes if isinstance(refused, NodeFault) else None
    return Told(lines, error, nodes, time.perf_counter() - started)


def _short(rank: int, folder: Path, per_node: int, plant: tuple[int, Plant]) -> Told:
    stragglers.PRODUCT_SECONDS = 0.05
    return _preflight(rank, folder, per_node, plant, SEEN_WITHIN=0.3, DEADLINE=1.0, FAREWELL=1.0)


def _never_too_slow(rank: int, folder: Path, per_node: int, plant: tuple[int, Plant]) -> Told:
    """With an accelerator's judgement of what a CPU really takes; milder, since other tests may run on these cores."""
    stragglers.BAD = 0.1
    strict = preflight.judge_speed
    return _preflight(rank, folder, per_node, plant, judge_speed=lambda speeds, shared: strict(speeds, shared=False))


# What is planted on one rank.


def other_code(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    """A real second checkout with one changed line."""
    copy = folder.parent / "checkout"
    for part in ("data_prep", "launch", "llama"):
        shutil.copytree(preflight.ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "llama/layout.py").open("a") as file:
        file.write("# changed\n")
    preflight.code_hash.__defaults__ = (copy,)  # type: ignore[attr-defined]
    return config, folder


def other_recipe(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})}), folder


def not_mounted(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    return config, folder / "elsewhere"


def local_folder(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    """A folder of the same kind that is not the shared one."""
    (own := folder.parent / "local").mkdir()
    return config, own


def computes_more(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    once = stragglers._product

    def often(a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for _ in range(30):
            out = once(a, out)
        return out

    stragglers._product = often
    return config, folder


def computes_wrong(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    once = stragglers._product

    def flipped(a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out = once(a, out)
        out[3, 5] += 1
        return out

    stragglers._product = flipped
    return config, folder


def device_fails(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    def fail(a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("uncorrectable ECC error encountered\nmore")

    stragglers._product = fail
    return config, folder


def disk_hangs(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    known = node.unwritable

    def late(path: Path) -> OSError | None:
        time.sleep(3.5)  # a FileStore waits a second longer than it is told
        return known(path)

    node.unwritable = late
    return config, folder


def clock_off(config: Recipe, folder: Path) -> tuple[Recipe, Path]:
    right = time.time
    time.time = lambda: right() - 300
    return config, folder


def _folder(tmp_path: Path) -> Path:
    (folder := tmp_path / "run").mkdir()
    return folder


FAULTS: dict[str, tuple[Any, Plant, str]] = {
    "other_code": (_short, other_code, "node3: herd's code is {code}, on 3 others"),
    "other_recipe": (_short, other_recipe, "node3: the resolved recipe is "),
    "not_mounted": (_short, not_mounted, "elsewhere is not there (is its file system mounted?)"),
    "local_folder": (_short, local_folder, "does not show what node1 writes there"),
    "computes_wrong": (_short, computes_wrong, "node3: rank 2: 1 of 262144 sums are wrong"),
    "device_fails": (_short, device_fails, "a matrix product failed: uncorrectable ECC error encountered"),
    "slow": (_never_too_slow, computes_more, "node3: matrix products of rank 2 run at 0."),
    "disk_hangs": (_short, disk_hangs, "node3: no answer within 1 s from their disks and devices"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_node_of_four_is_named_by_every_rank(fault: str, tmp_path: Path) -> None:
    judged, plant, said = FAULTS[fault]
    folder = _folder(tmp_path)
    told = harness.run(4, judged, folder, 1, (2, plant))
    code = preflight.code_hash(tmp_path / "checkout") if fault == "other_code" else ""
    for rank in told:
        assert rank.nodes == ("node3",), rank.error
        assert rank.error and rank.error.startswith("preflight: ") and said.format(code=code) in rank.error
        assert "\n" not in rank.error
    assert [path.name for path in folder.iterdir()] in (["events.jsonl"], [])
    if fault != "disk_hangs":
        (event,) = RunFolder(folder).history()
        assert event["event"] == "preflight" and event["attempt"] == 3 and list(event["faults"]) == ["node3"]


def test_four_healthy_nodes_pass_with_one_line_and_one_event(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    told = harness.run(4, _preflight, folder, 1, None)
    assert [rank.error for rank in told] == [None] * 4
    *warned, line = told[0].lines
    assert line.startswith("preflight: 4 nodes in ") and "MiB over 4 ranks" in line
    assert "products" in line and "links" in line
    assert all("is slow" in text for text in warned)  # this machine may be busy
    assert [rank.lines for rank in told[1:]] == [[], [], []]
    (event,) = RunFolder(folder).history()
    assert event["nodes"] == ["node1", "node2", "node3", "node4"] and event["faults"] == {}
    assert set(event["flops"]) == set(event["links"]) == set(event["nodes"]) and event["all_reduce_seconds"] > 0
    assert [path.name for path in folder.iterdir()] == ["events.jsonl"]
    assert max(rank.seconds for rank in told) < 20


def test_several_ranks_of_a_node_speak_for_it(tmp_path: Path) -> None:
    """Three nodes, a ring of odd length, of two ranks each; the second rank of node2 is off."""
    told = harness.run(6, _short, _folder(tmp_path), 2, (3, other_recipe))
    assert {rank.nodes for rank in told} == {("node2",)}
    assert " and " in (told[0].error or "")  # its ranks differ


def test_a_slow_node_with_shared_cores_is_only_told(tmp_path: Path) -> None:
    told = harness.run(4, _preflight, _folder(tmp_path), 1, (1, computes_more))
    assert [rank.error for rank in told] == [None] * 4
    assert any(line.startswith("preflight: warning: node2 is slow: matrix products") for line in told[0].lines)


def test_a_clock_that_is_off_is_told(tmp_path: Path) -> None:
    told = harness.run(3, _preflight, _folder(tmp_path), 1, (0, clock_off))
    assert [rank.error for rank in told] == [None] * 3
    (line,) = (line for line in told[0].lines if "clock" in line)
    assert line == "preflight: warning: node1: its clock is 300.0 s behind the others'"


def test_on_one_node_only_what_is_cheap_is_done_and_nothing_is_said(tmp_path: Path) -> None:
    for world in (1, 2):
        (folder := tmp_path / f"run{world}").mkdir()
        told = harness.run(world, _preflight, folder, 8, None)
        assert [(rank.error, rank.lines) for rank in told] == [(None, [])] * world
        (event,) = RunFolder(folder).history()
        assert event["nodes"] == ["node1"] and "flops" not in event


def _switched(rank: int, folder: Path, wish: str) -> Told:
    os.environ["HERD_PREFLIGHT"] = wish
    return _preflight(rank, folder, 8, None)


def test_herd_preflight_switches_it_off_or_measures_one_node_too(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    assert harness.run(1, _switched, folder, "0")[0].lines == [] and list(folder.iterdir()) == []
    (line,) = (line for line in harness.run(2, _switched, folder, "1")[0].lines if "warning" not in line)
    assert line.startswith("preflight: 1 node in ") and "links" not in line


def _late_reader(rank: int, folder: Path) -> Told:
    """Rank 1 takes a second after each gathering, as one whose node swaps."""
    gather = preflight._gather

    def late(value: Any) -> list[Any]:
        found = gather(value)
        time.sleep(1.0 if rank == 1 else 0.0)
        return found

    return _preflight(rank, folder, 1, (2, other_recipe), _gather=late)


def test_no_rank_ends_before_all_know_why(tmp_path: Path) -> None:
    """The first to end would break the others' collectives, which then tell of a lost peer instead."""
    told = harness.run(3, _late_reader, _folder(tmp_path))
    assert {rank.nodes for rank in told} == {("node3",)}
    assert min(rank.seconds for rank in told) > 1.9


def _unreachable(rank: int, folder: Path) -> Told:
    return _preflight(rank, folder / "nowhere", 1, None, SEEN_WITHIN=0.3)


def test_what_most_nodes_have_is_no_fault_of_a_node(tmp_path: Path) -> None:
    for rank in harness.run(3, _unreachable, tmp_path):
        assert rank.nodes is None and rank.error is not None
        assert "nowhere is not there" in rank.error


# Judgement alone, of what this machine cannot show.


def _nodes(count: int, **facts: Any) -> list[Facts]:
    known: dict[str, Any] = dict(disk_free=1 << 40, memory=1 << 39, memory_free=1 << 38, open_files=1 << 16)
    base = Facts("", 0, same={"torch": "2.13"}, first=True, **known)
    return [replace(base, node=f"node{i + 1}", rank=i, **facts) for i in range(count)]


def test_two_halves_with_different_software_are_the_users_to_mend() -> None:
    facts = _nodes(4)
    for i in (1, 3):
        facts[i] = replace(facts[i], same={"torch": "2.12"})
    with pytest.raises(UserError) as refused:
        judge(facts)
    assert str(refused.value) == (
        "preflight: torch is not the same on all nodes: 2.13 on node1, node3; 2.12 on node2, node4; "
        "give all nodes the same"
    )
    facts[1] = replace(facts[1], same={"torch": "2.11"})
    assert list(judge(facts).faults) == ["node2", "node4"]


def test_a_lost_device_and_a_device_in_use_are_faults() -> None:
    facts = _nodes(3, devices=8, device_free=140 << 30)
    facts[1] = replace(facts[1], devices=7)
    facts[2] = replace(facts[2], device_free=100 << 30)
    assert judge(facts).faults == {
        "node2": ["7 devices, others have 8"],
        "node3": ["rank 2's device has 107 GB free, others 150 GB: another process uses it"],
    }


def test_less_memory_and_few_open_files_are_told() -> None:
    facts = _nodes(3)
    facts[0] = replace(facts[0], memory=1 << 38)
    facts[1] = replace(facts[1], memory_free=1 << 34, open_files=256)
    found = judge(facts)
    assert found.faults == {} and [text.partition(" ")[0] for text in found.warnings] == ["node1:", "node2:", "node2:"]


def test_an_accelerator_is_judged_at_08_and_05_of_the_median() -> None:
    speeds = [Speed(f"node{i // 2 + 1}", i, 700e12, 40e9) for i in range(8)]
    assert not judge_speed(speeds, shared=False).faults and not judge_speed(speeds, shared=False).warnings
    speeds[3] = replace(speeds[3], flops=500e12)
    speeds[5] = replace(speeds[5], link=10e9)
    found = judge_speed(speeds, shared=False)
    assert found.warnings == ["node2 is slow: matrix products of rank 3 run at 0.71 of the median"]
    assert found.faults == {"node3": ["exchanges with two other nodes of rank 5 run at 0.25 of the median"]}
    assert judge_speed(speeds, shared=True).faults == {}


def test_of_two_nodes_the_slow_one_is_told() -> None:
    found = judge_speed([Speed("node1", 0, 300e12), Speed("node2", 1, 700e12)], shared=False)
    assert list(found.faults) == ["node1"]


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 9])
def test_every_node_is_timed_with_two_others_and_never_with_both_at_once(nodes: int) -> None:
    every = rounds(nodes)
    assert len(every) == {2: 1}.get(nodes, 2 + nodes % 2)
    for pairs in every:
        in_round = [n for pair in pairs for n in pair]
        assert len(in_round) == len(set(in_round))
    met = [n for pairs in every for pair in pairs for n in pair]
    assert all(met.count(n) == min(2, nodes - 1) for n in range(nodes))


def test_a_disk_too_small_for_one_checkpoint_is_refused_and_for_all_is_told(tmp_path: Path) -> None:
    config = recipe()
    one = preflight.checkpoint_bytes(config)
    with pytest.raises(UserError, match="one checkpoint takes about"):
        preflight.space(config, tmp_path, _nodes(2, disk_free=one - 1))
    (line,) = preflight.space(config, tmp_path, _nodes(2, disk_free=2 * one))
    assert "3 more checkpoints" in line
    assert preflight.space(config, tmp_path, _nodes(2, disk_free=3 * one)) == []
    assert preflight.space(config, tmp_path, _nodes(2, disk_free=one, checkpoints=2)) == []  # which will be replaced
    unsaved = recipe(checkpoint__interval=0, checkpoint__at_end=False)
    assert preflight.space(unsaved, tmp_path, _nodes(2, disk_free=0)) == []
