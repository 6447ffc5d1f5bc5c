"""What herd doctor sees and says: this machine for real, accelerators' nodes from what their tools print."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch.utils.tensorboard import SummaryWriter

from launch.doctor import command, facts, read_answers
from launch.doctor.acceptance import COMMON, Record, ways, write_report
from launch.doctor.facts import Disk, NodeFacts, as_json, file_system, gather
from launch.doctor.rules import Finding, judge
from llama.recipe import lay_out, load

SMI = """#!/bin/sh
cat <<'END'
0, NVIDIA H200, 143771, 4, 570.86.15, 1980, 1980, 31, 0, 5, 5
1, NVIDIA H200, 143771, 71000, 570.86.15, 600, 1980, 88, 2, 4, 5
END
"""


def node(name: str = "a", **changes: Any) -> NodeFacts:
    """A healthy node of two GPUs."""
    gpu = {
        "index": "0", "name": "NVIDIA H200", "memory.total": "143771", "memory.used": "4", "driver_version": "580.65",
        "clocks.sm": "1980", "clocks.max.sm": "1980", "temperature.gpu": "31", "pcie.link.gen.current": "5",
        "pcie.link.gen.max": "5", "ecc.errors.uncorrected.volatile.total": "[N/A]",
    }  # fmt: skip
    same = {
        "Python": "3.12.1 (/p)",
        "torch": "2.13.0",
        "torch's CUDA": "13.0",
        "GPUs": "2 x H200",
        "device": "cuda (H200)",
    }
    limits = {
        "memory": 1 << 40,
        "memory free": 1 << 39,
        "open files": 65536,
        "/dev/shm free": 1 << 38,
        "locked memory": 1 << 62,
    }
    disks = [Disk("run folder", "/shared/runs", "lustre", 1 << 40, write=1e9, files=1000.0)]
    made = NodeFacts(name, 100.0, same, {}, limits, [gpu, {**gpu, "index": "1"}], disks, {"matrix products": 7e14})
    return replace(made, **changes)


def said(*nodes: NodeFacts) -> list[str]:
    return [f"{each.level} {each.node}: {each.text}" for each in judge(nodes)]


def test_healthy_nodes_have_nothing_to_say() -> None:
    assert judge([node()]) == [] and judge([node("a"), node("b"), node("c")]) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"same": {**node().same, "Python": "3.10.2 (/p)"}}, "bad a: Python 3.10.2 is outside 3.11 to 3.14"),
        ({"same": {**node().same, "torch": "2.9.1"}}, "bad a: torch 2.9.1 is outside 2.11 to 2.14"),
        ({"same": {"Python": "3.12.1"}, "gpus": []}, "bad a: torch is not installed"),
        ({"same": {**node().same, "torch's CUDA": "none"}}, "bad a: GPUs, and a torch without CUDA"),
        ({"gpus": [{**node().gpus[0], "driver_version": "535.1"}]}, "bad a: driver 535.1 is older than CUDA 13 needs (580)"),
        ({"gpus": [{**node().gpus[0], "ecc.errors.uncorrected.volatile.total": "3"}]}, "bad a: GPU 0 had 3 uncorrected"),
        ({"gpus": [{**node().gpus[0], "memory.used": "90000"}]}, "warning a: GPU 0 has 63% of its memory taken"),
        ({"gpus": [{**node().gpus[0], "temperature.gpu": "90", "clocks.sm": "700"}]}, "warning a: GPU 0 is at 90 degrees"),
        ({"limits": {**node().limits, "/dev/shm free": 1 << 26}}, "bad a: /dev/shm has 0.1 GB free"),
        ({"limits": {**node().limits, "open files": 1024}}, "warning a: 1024 open files are allowed"),
        ({"limits": {**node().limits, "memory free": 1 << 30}}, "warning a: 1.1 GB of 1,100 GB of memory are free"),
        (
            {"limits": {**node().limits, "locked memory": 65536}, "same": {**node().same, "adapters": "4 (efa_)"}},
            "bad a: 0.0 GB of memory may be locked",
        ),
        ({"disks": [Disk("run folder", "/r", error="/r cannot be written: Read-only file system")]}, "bad a: run folder: /r cannot"),
        ({"disks": [Disk("run folder", "/r", free=1 << 20)]}, "bad a: run folder /r has 0.0 GB free"),
        ({"own": {"clock set by the network": "no"}}, "warning a: its clock is not set"),
        ({"faults": ["torch does not work here: libcuda.so"]}, "bad a: torch does not work here: libcuda.so"),
        ({"same": {**node().same, "Neuron devices": "16"}}, "bad a: Neuron devices and no torch-neuronx"),
        ({"same": {**node().same, "torch": "2.11.0", "torch-neuronx": "2.11"}}, "bad a: torch-neuronx with torch 2.11.0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_node_is_said_with_a_remedy(changes: dict[str, Any], text: str) -> None:
    (finding,) = judge([node(**changes)])
    assert f"{finding.level} {finding.node}: {finding.text}".startswith(text) and finding.remedy


def test_the_odd_one_out_is_named() -> None:
    other = {**node().same, "torch": "2.12.0"}
    lacking = {key: value for key, value in node().same.items() if key != "GPUs"}
    assert said(node("a"), node("b", same=other), node("c")) == ["bad b: torch is 2.12.0"]
    assert said(node("a"), node("b"), node("c", same=lacking)) == ["bad c: GPUs is none"]
    assert said(node("a"), node("b", same=other)) == ["bad a: torch is 2.13.0", "bad b: torch is 2.12.0"]
    assert said(node("a"), node("b", clock=112.0), node("c")) == ["warning b: its clock is +12.0 s off the others'"]
    slow = node("c", speeds={"matrix products": 4e14})
    assert said(node("a"), node("b"), slow) == ["warning c: matrix products run at 0.57 of the median"]
    disk = replace(node().disks[0], write=1e8)
    assert said(node("a"), node("b", disks=[disk]), node("c")) == [
        "warning b: run folder is written at 100 MB/s, others reach 1000"
    ]


def test_this_machine_is_seen_as_it_is(tmp_path: Path) -> None:
    found = gather([("run folder", tmp_path / "runs" / "new"), ("nowhere", Path("/proc/none"))], quick=True)
    assert found.same["cores"] == str(len(os.sched_getaffinity(0))) and found.limits["memory"] > 1 << 30
    assert found.same["Python"].startswith(".".join(map(str, __import__("sys").version_info[:3])))
    there, nowhere = found.disks
    assert not there.error and there.free and there.type and nowhere.error
    assert not list(tmp_path.iterdir())
    (answer,) = read_answers(f"welcome to the cluster\n0: {as_json(found)}\n1: module: loaded\n")
    assert answer == found


def test_speeds_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    found = gather([("run folder", tmp_path)])
    assert found.disks[0].write > 1e6 and found.disks[0].files > 1 and not list(tmp_path.iterdir())
    assert found.speeds["matrix products"] > 1e8 and found.speeds["memory"] > 1e8 and not found.faults
    assert found.same["device"].startswith(("cpu", "cuda"))


def test_gpus_are_read_from_their_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = gather([], quick=True)
    assert found.same["GPUs"] == "2 x NVIDIA H200" and found.gpus[1]["clocks.sm"] == "600"
    texts = [finding.text for finding in judge([replace(found, same={**found.same, "torch": "2.13.0"})])]
    assert "GPU 1 had 2 uncorrected memory errors" in texts and "GPU 1 has 49% of its memory taken" in texts
    assert "GPU 1 has a PCIe link of generation 4 of 5" in texts and not any("GPU 0" in text for text in texts)


def test_a_tool_that_hangs_or_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in (("hangs", "sleep 60"), ("fails", "echo half; exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(facts, "ASK_SECONDS", 0.2)
    assert facts.ask("hangs") is None and facts.ask("fails") is None and facts.ask("not-there") is None


def test_a_path_lies_on_its_innermost_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nserver:/x /shared nfs4 rw 0 0\nfsx /shared/fast lustre rw 0 0\n")
    kinds = [file_system(Path(p), mounts) for p in ("/home", "/shared/runs", "/shared/fast/runs", "/sharedother")]
    assert kinds == ["ext4", "nfs4", "lustre", "ext4"]
    assert file_system(Path("/x"), tmp_path / "none") == ""


def test_the_command_says_it_and_exits_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, told = CliRunner(), ["--quick", "--run-dir", str(tmp_path)]
    shown = runner.invoke(command, told)
    assert shown.exit_code == 0 and shown.output.rstrip().splitlines()[-1].startswith("fit"), shown.output
    facts_of = json.loads(runner.invoke(command, [*told, "--json"]).output)
    assert facts_of["nodes"][0]["same"]["torch"] and not any(each["level"] == "bad" for each in facts_of["findings"])
    monkeypatch.setattr("launch.doctor.judge", lambda nodes: [Finding("bad", "a", "it burns", "put it out")])
    shown = runner.invoke(command, told)
    assert shown.exit_code == 1 and "BAD  it burns\n      put it out\nnot fit" in shown.output
    monkeypatch.setenv("PATH", str(tmp_path))
    for words in (["--nodes", "2"], ["--partition", "gpu"], ["--acceptance", "--quick"]):
        refused = runner.invoke(command, words)
        assert refused.exit_code == 1 and refused.exception is not None
        assert getattr(refused.exception, "code", None) == 2


def test_an_acceptance_tries_each_way_that_the_device_has() -> None:
    assert [way.name for way in ways("cuda", 1)] == ["fp32", "bf16_mixed", "bf16_sr", "compiled"]
    names = [way.name for way in ways("neuron", 64)]
    assert "tensor" in names and "fsdp" in names and "pipeline" not in names
    for way in ways("cpu", 2):
        recipe = load("demo", (*COMMON, *way.overrides))
        assert lay_out(recipe, way.processes).world == way.processes


def test_what_an_acceptance_did_is_not_done_again(tmp_path: Path) -> None:
    first = Record(tmp_path / "steps.jsonl").do("help", ["plot", "--help"])
    assert first["code"] == 0 and first["command"] == "herd plot --help"
    again = Record(tmp_path / "steps.jsonl")
    assert again.do("help", ["plot", "--help"]) == first  # a new time would not be equal
    failed = again.do("help", ["plot", "nothing"], HERD_DEVICE="cpu")
    assert failed["code"] == 2 and "nothing" in failed["said"] and failed["command"].startswith("HERD_DEVICE=cpu herd")


def test_its_report_has_the_verdicts_the_machine_and_the_commands(tmp_path: Path) -> None:
    record = Record(tmp_path / "steps.jsonl")
    record.done["fp32"] = {"command": "herd train demo", "code": 0}
    result = {"way": "fp32", "processes": 1, "verdict": "pass", "text": "equal within 0.5 %", "seconds": 12.3}
    bad = result | {"way": "fsdp", "verdict": "FAIL", "text": "it did not train: out of memory"}
    board = SummaryWriter(str(tmp_path / "fp32" / "tensorboard"))
    for step in range(1, 181):
        board.add_scalar("reduced_train_loss", 7 / step, step)
    board.close()
    record.done["fp32"]["command"] += f" run_dir={tmp_path}/fp32"
    write_report(tmp_path, "cuda", node("a"), [Finding("warning", "a", "it is warm", "cool it")], record, [result, bad])
    text = (tmp_path / "report.md").read_text()
    assert "on a: 1 of 2 ways pass; FAIL: fsdp" in text and str(tmp_path) not in text and "address" not in text
    assert "| fp32 | 7.00000 | 3.50000 | 0.70000 | 0.11667 | 0.05833 | 0.03889 |" in text and "| cpu |" not in text
    for line in (
        "| fp32 | 1 | **pass** | equal within 0.5 % | 12 |",
        "- torch: 2.13.0",
        "it is warm",
        "herd train demo run_dir=acceptance/fp32",
    ):
        assert line in text
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["verdict"] == "pass"
