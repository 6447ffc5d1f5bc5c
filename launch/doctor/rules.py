"""Is a node fit, and which one is not like the others? Rules over facts, each with what it means and what to do."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.doctor.facts import NodeFacts
from llama.node import gigabytes

PYTHON, TORCH = ((3, 11), (3, 15)), ((2, 11), (2, 15))
"""From, up to: what herd is tested with, or meant for."""
DRIVERS = ((13, 580), (12, 525))
"""CUDA's major version, and the oldest NVIDIA driver for it (CUDA release notes, minor version compatibility)."""
NEURON_TORCH = ((2, 13), (2, 15))
"""TorchNeuron releases that bring the `neuron` device (docs/trainium.md)."""
SHM = 1 << 30
LOCKED = 1 << 33
"""Bytes of memory that adapters must be able to pin; EFA's installation asks for no limit."""
OPEN_FILES = 4096
CLOCK = 3.0
"""Seconds between nodes' clocks beyond what starting them apart explains."""
SLOW = 0.8
"""Of the median, as llama/train/stragglers.py has it."""
SLOW_DISK = 0.3
"""Of the median: shared disks swing more."""
COLD_CLOCK = 0.5
"""Of a GPU's highest clock, right after work: below that something holds it back."""


@dataclass(frozen=True)
class Finding:
    """What somebody should know. level: "bad" keeps training from going well, "warning" may."""

    level: str
    node: str
    text: str
    remedy: str


def judge(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """All findings, bad ones first."""
    found = [finding for facts in nodes for finding in _alone(facts)]
    if len(nodes) > 1:
        found += _unlike(nodes)
        found += _slow(nodes)
    return sorted(found, key=lambda each: (each.level != "bad", each.node))


def version_of(text: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _alone(facts: NodeFacts) -> Iterator[Finding]:
    def bad(text: str, remedy: str) -> Finding:
        return Finding("bad", facts.node, text, remedy)

    def warning(text: str, remedy: str) -> Finding:
        return Finding("warning", facts.node, text, remedy)

    for fault in facts.faults:
        yield bad(fault, "mend that first; nothing will train here")
    same = facts.same
    for name, (least, below), level in (("Python", PYTHON, "bad"), ("torch", TORCH, "bad")):
        version = version_of(same.get(name, ""))[:2]
        if not version:
            if name == "torch":
                yield bad("torch is not installed", "pip install -e . in herd's folder")
        elif not least <= version < below:
            text = (
                f"{name} {same[name].split(' ')[0]} is outside {_dotted(least)} to {_dotted((below[0], below[1] - 1))}"
            )
            yield Finding(level, facts.node, text, f"install a {name} in that range")
    if "torch-neuronx" in same and not NEURON_TORCH[0] <= version_of(same.get("torch", ""))[:2] < NEURON_TORCH[1]:
        yield bad(f"torch-neuronx with torch {same.get('torch')}", "TorchNeuron's device needs torch 2.13 or 2.14")
    if "Neuron devices" in same and "torch-neuronx" not in same:
        yield bad("Neuron devices and no torch-neuronx", "see docs/trainium.md, Install")
    if facts.gpus:
        yield from _gpus(facts)
    yield from _limits(facts)
    for disk in facts.disks:
        if disk.error:
            yield bad(f"{disk.what}: {disk.error}", "choose another folder, or have it mounted and writable")
        elif disk.free is not None and disk.free < 1 << 30:
            yield bad(f"{disk.what} {disk.path} has {gigabytes(disk.free)} free", "free space there")
    if facts.own.get("clock set by the network") == "no":
        yield warning(
            "its clock is not set by the network", "start chrony or ntpd; logs of nodes will not fit together"
        )


def _gpus(facts: NodeFacts) -> Iterator[Finding]:
    cuda, driver = version_of(facts.same.get("torch's CUDA", "")), version_of(facts.gpus[0].get("driver_version", ""))
    if facts.same.get("torch's CUDA") == "none":
        yield Finding("bad", facts.node, "GPUs, and a torch without CUDA", "install torch's CUDA build")
    for major, oldest in DRIVERS:
        if cuda[:1] == (major,) and driver and driver[0] < oldest:
            text = f"driver {facts.gpus[0]['driver_version']} is older than CUDA {major} needs ({oldest})"
            yield Finding("bad", facts.node, text, "update the driver, or install torch for an older CUDA")
    for gpu in facts.gpus:
        name = f"GPU {gpu.get('index')}"
        errors = gpu.get("ecc.errors.uncorrected.volatile.total", "0")
        if errors.isdigit() and int(errors):
            yield Finding(
                "bad", facts.node, f"{name} had {errors} uncorrected memory errors", "drain the node; reset it"
            )
        used, total = (_number(gpu.get(f"memory.{kind}")) for kind in ("used", "total"))
        if total and used > 0.1 * total:
            text = f"{name} has {used / total:.0%} of its memory taken"
            yield Finding("warning", facts.node, text, "another process is on it; nvidia-smi shows which")
        clock, most = _number(gpu.get("clocks.sm")), _number(gpu.get("clocks.max.sm"))
        if _number(gpu.get("temperature.gpu")) >= 85 and clock < COLD_CLOCK * most:
            text = f"{name} is at {gpu['temperature.gpu']} degrees and {clock:.0f} of {most:.0f} MHz"
            yield Finding("warning", facts.node, text, "its cooling is short; it will be the slowest rank")
        link, best = _number(gpu.get("pcie.link.gen.current")), _number(gpu.get("pcie.link.gen.max"))
        if used > 0.1 * total and 0 < link < best:  # idle ones save power
            text = f"{name} has a PCIe link of generation {link:.0f} of {best:.0f}"
            yield Finding("warning", facts.node, text, "reseat or replace it")


def _limits(facts: NodeFacts) -> Iterator[Finding]:
    limits, accelerated = facts.limits, bool(facts.gpus) or "Neuron devices" in facts.same
    if limits.get("open files", OPEN_FILES) < OPEN_FILES:
        text = f"{limits['open files']} open files are allowed"
        yield Finding(
            "warning", facts.node, text, "ulimit -n 65536 in the job, or in limits.conf; ranks and loaders use many"
        )
    if accelerated and limits.get("/dev/shm free", SHM) < SHM:
        text = f"/dev/shm has {gigabytes(limits['/dev/shm free'])} free"
        yield Finding("bad", facts.node, text, "in a container --shm-size 8g or --ipc host; NCCL exchanges there")
    if "adapters" in facts.same and limits.get("locked memory", LOCKED) < LOCKED:
        text = f"{gigabytes(limits['locked memory'])} of memory may be locked"
        yield Finding(
            "bad", facts.node, text, "ulimit -l unlimited, and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
        )
    if limits.get("memory") and limits.get("memory free", 0) < 0.1 * limits["memory"]:
        text = f"{gigabytes(limits['memory free'])} of {gigabytes(limits['memory'])} of memory are free"
        yield Finding("warning", facts.node, text, "something else runs here")


def _unlike(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """What most nodes have and one has not."""
    for name in dict.fromkeys(name for facts in nodes for name in facts.same):
        counts = Counter(facts.same.get(name, "none") for facts in nodes)
        if len(counts) == 1:
            continue
        (usual, often), (_, second) = counts.most_common(2)
        for facts in nodes:
            mine = facts.same.get(name, "none")
            if often == second:  # nobody is the odd one
                yield Finding("bad", facts.node, f"{name} is {mine}", "nodes disagree, half and half; make them equal")
            elif mine != usual:
                remedy = f"make it {usual} as on {often} of {len(nodes)} nodes, or leave this node out"
                yield Finding("bad", facts.node, f"{name} is {mine}", remedy)
    middle = statistics.median(facts.clock for facts in nodes)
    for facts in nodes:
        if abs(facts.clock - middle) > CLOCK:
            yield Finding(
                "warning",
                facts.node,
                f"its clock is {facts.clock - middle:+.1f} s off the others'",
                "set it by chrony or ntpd",
            )


def _slow(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    shared = all(facts.same.get("device", "cpu").startswith("cpu") for facts in nodes)
    for name in dict.fromkeys(name for facts in nodes for name in facts.speeds):
        usual = statistics.median_high([facts.speeds[name] for facts in nodes if name in facts.speeds])
        for facts in nodes:
            share = facts.speeds.get(name, usual) / usual if usual else 1.0
            if share < (SLOW / 2 if shared else SLOW):  # others may use a CPU's cores
                yield Finding(
                    "warning", facts.node, f"{name} run at {share:.2f} of the median", "leave it out: all wait for it"
                )
    for what in dict.fromkeys(disk.what for facts in nodes for disk in facts.disks):
        speeds = {f.node: d.write for f in nodes for d in f.disks if d.what == what and d.write}
        usual = statistics.median_high(list(speeds.values()) or [1.0])
        for name, speed in speeds.items():
            if speed < SLOW_DISK * usual:
                text = f"{what} is written at {speed / 1e6:.0f} MB/s, others reach {usual / 1e6:.0f}"
                yield Finding("warning", name, text, "look at its mount and its network")


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # [N/A]
        return 0.0


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
