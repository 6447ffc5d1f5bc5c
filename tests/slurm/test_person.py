"""The person's side on a real Slurm: wrong use queues nothing; submit, status, tail, stop and resume of one real run."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.indexed import IndexedWriter
from tests.slurm.conftest import ROOT, Lab

TINY = {
    "base": "tiny_cpu",
    "name": "tiny",
    "model": {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4},
    "data": {"train": "corpus", "seq_length": 32},
    "train": {"steps": 100000, "global_batch_size": 4, "micro_batch_size": 1},
    "schedule": {"warmup_steps": 5},
    "validation": {"interval": 0},
}
CPU = {"HERD_NODE_TYPE": "cpu", "HERD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}

Herd = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def desk(shared: Path) -> Path:
    """A folder where a person works: token files, a recipe, a shell recipe."""
    folder = shared / "person"
    folder.mkdir()
    with IndexedWriter(folder / "corpus", np.uint16) as corpus:
        for length in range(20, 120):
            corpus.add_document(np.arange(length) % 97 + 3)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "tiny.sh").write_text('exec "${HERD:-herd}" train tiny.yaml "name=of_$HERD_NODE_TYPE" "$@"\n')
    return folder


@pytest.fixture
def herd(lab: Lab, desk: Path) -> Iterator[Herd]:
    """Runs the command on the head node: exit code, and what it said. Leaves an empty queue."""

    def call(*words: object, **environment: str) -> tuple[int, str]:
        settings = CPU | {"PYTHONPATH": str(ROOT), "HERD_CACHE": str(desk / "cache"), "COLUMNS": "200"} | environment
        script = '"$@" 2>&1; echo "exit code $?"'
        said = lab.run("bash", "-c", script, "-", sys.executable, "-m", "launch.cli", *words, cwd=desk, **settings)
        text, _, code = said.rpartition("exit code ")
        return int(code), text

    yield call
    lab.run("scancel", "--user=root")
    lab.run("bash", "-c", "while squeue -h | grep -q .; do sleep 0.2; done")


def _queue(lab: Lab) -> list[list[str]]:
    lines = lab.run("squeue", "-h", "-S", "i", "-o", "%i|%j|%D|%l|%E").splitlines()
    return [line.split("|") for line in lines]


WRONG: dict[str, tuple[list[str], int, str]] = {
    "an override where the recipe belongs": (["train.steps=5"], 2, "no recipe: train.steps=5 is an override"),
    "unknown recipe": (["tinny_cpu"], 2, "did you mean tiny_cpu?"),
    "no such shell recipe": (["./no.sh"], 2, "no recipe ./no.sh in"),
    "unknown override": (["tiny.yaml", "train.step=5"], 2, "did you mean steps?"),
    "unknown override of a shell recipe": (["tiny.sh", "train.step=5"], 2, "did you mean steps?"),
    "more nodes than exist": (["tiny.yaml", "--nodes", "64"], 2, "partition main has {nodes} nodes"),
    "a layout that does not fit": (["tiny.yaml", "--nodes", "3"], 2, "--nodes 1, 2, 4 would fit"),
    "a fixed layout": (["tiny.yaml", "-N4", "parallel.tensor_parallel=3"], 2, "3"),
    "a run folder of another recipe": (["tiny.yaml", "run_dir=other"], 2, "other is of another model (model.num_layers=9, not 2)"),
    "missing token files": (["tiny.yaml", "data.train=nowhere"], 1, "nowhere.idx does not exist"),
    "damaged token files": (["tiny.yaml", "data.train=cut"], 1, "cut.idx"),
    "no such partition": (["tiny.yaml", "--partition", "night"], 2, "no partition 'night'; the cluster has"),
    "what Slurm refuses": (["tiny.yaml", "--sbatch-option", "cpus-per-task=4000"], 2, "Slurm would refuse this job"),
    "no time": (["tiny.yaml", "--time", "soon"], 2, "Slurm would refuse this job: Invalid --time"),
    "not an option of sbatch": (["tiny.yaml", "--sbatch-option", "--x y"], 2, "is not KEY=VALUE"),
    "a chain in the wrong order": (["tiny.yaml", "--chain", "run,compile"], 2, "compile,run,export, in this order"),
    "an unknown kind of node": (["tiny.yaml", "--node-type", "abacus"], 2, "abacus"),
}  # fmt: skip


# Calls the command once for each list of words, in one process since starting Python takes longest.
EACH = """
import contextlib, io, json, sys
from launch import cli
told = []
for words in json.loads(sys.argv[1]):
    sys.argv, said, code = ["herd", *words], io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    told.append((code, said.getvalue()))
print(json.dumps(told))
"""


def _each(lab: Lab, desk: Path, commands: list[list[str]], **more: str) -> list[tuple[int, str]]:
    settings = CPU | {"PYTHONPATH": str(ROOT), "HERD_CACHE": str(desk / "cache")} | more
    told = lab.run(sys.executable, "-c", EACH, json.dumps(commands), cwd=desk, **settings)
    return [(code, said) for code, said in json.loads(told)]


def test_wrong_use_is_refused_in_one_line_before_anything_is_queued(lab: Lab, herd: Herd, desk: Path) -> None:
    (desk / "other").mkdir()
    other = TINY | {"model": TINY["model"] | {"num_layers": 9}}  # type: ignore[operator]
    (desk / "other/recipe.yaml").write_text(yaml.safe_dump(other))
    (desk / "cut.idx").write_bytes((desk / "corpus.idx").read_bytes()[:-20])
    (desk / "cut.bin").write_bytes((desk / "corpus.bin").read_bytes())
    jobs = set(re.findall(r"JobId=(\d+)", lab.run("scontrol", "show", "job")))
    commands = {case: (["submit", *words], code, expected) for case, (words, code, expected) in WRONG.items()}
    commands |= {verb: ([verb, "nope"], 2, "no run 'nope'") for verb in ("status", "tail", "stop", "resume")}
    told = _each(lab, desk, [words for words, _, _ in commands.values()])
    for (case, (_, code, expected)), (found, said) in zip(commands.items(), told, strict=True):
        assert (found, said.count("\n")) == (code, 1), f"{case}: {said}"
        assert expected.format(nodes=lab.nodes) in said and said.startswith("herd: "), f"{case}: {said}"
    code, said = herd("submit")
    assert code == 2 and "Missing argument 'RECIPE'" in said
    assert _queue(lab) == [] and not (desk / "runs").exists()
    after = set(re.findall(r"JobId=(\d+)", lab.run("scontrol", "show", "job")))
    assert after <= jobs, "nothing was queued and taken back either"


def test_the_kind_of_nodes_is_that_of_their_devices_unless_it_is_named(lab: Lab, desk: Path) -> None:
    """Ranks are those that slurm/env.sh starts on a node with such devices, which the lab's nodes have by Slurm's books."""
    dry = ["submit", "tiny.sh", "--dry-run", "-N2", "train.global_batch_size=256"]
    kinds = [
        (["--sbatch-option", "gres=gpu:h200:8"], "of_gpu on 2 × 8 ranks of gpu, layout fsdp16"),
        (["--sbatch-option", "gpus-per-node=4"], "of_gpu on 2 × 4 ranks of gpu"),
        (["--sbatch-option", "gres=neuron:16"], "of_trn2 on 2 × 64 ranks of trn2"),
        (["--node-type", "trn2", "--sbatch-option", "gres=gpu:8"], "of_trn2 on 2 × 64 ranks of trn2"),
        (["--node-type", "cpu"], "of_cpu on 2 × 1 ranks of cpu"),
    ]
    told = _each(lab, desk, [dry + words for words, _ in kinds], HERD_NODE_TYPE="")
    for (words, expected), (code, said) in zip(kinds, told, strict=True):
        assert code == 0 and expected in said, said
        assert ("HERD_NODE_TYPE=" in said) == ("--node-type" in words)


def test_a_dry_run_of_a_chain_prints_commands_that_a_shell_takes(lab: Lab, herd: Herd, desk: Path) -> None:
    words = ("submit", "./tiny.yaml", "name=a_b", "--nodes", "2", "--chain", "compile,run,export")
    code, text = herd(*words, "--time", "7", "--sbatch-option", "hold", "--dry-run")
    assert code == 0 and _queue(lab) == [] and not (desk / "runs").exists()
    for name in ("compile", "run", "export"):
        assert (ROOT / f"slurm/{name}.slurm").read_text().rstrip() in text
    commands = [line for line in text.splitlines() if re.match(r"(compile|run|export)=\$\(sbatch ", line)]
    assert len(commands) == 3
    numbers = lab.run("bash", "-c", "; ".join([*commands, "echo $compile $run $export"]), cwd=desk, **CPU).split()
    waits = ["(null)", f"afterok:{numbers[0]}(unfulfilled)", f"afterok:{numbers[1]}(unfulfilled)"]
    names, nodes = ["a_b-compile", "a_b", "a_b-export"], ["2", "2", "1"]
    assert _queue(lab) == [list(job) for job in zip(numbers, names, nodes, ["7:00"] * 3, waits, strict=True)]

    # Runs that have not begun are told of, taken as taken, and stopped, by the folder that they will have.
    code, text = herd("status", "--json")
    states = {row["run"]: row["text"] for row in json.loads(text)}
    assert states["runs/a_b"] == f"waiting in the queue: held by its owner; scontrol release {numbers[1]} lets it go on"
    assert states[f"compile job {numbers[0]} a_b-compile"].startswith("waiting in the queue: held by its owner")
    code, text = herd(*words)
    assert code == 2 and f"is taken by job {numbers[1]} (waiting in the queue" in text
    code, text = herd("stop", "a_b")
    assert code == 0 and "run job" in text and "no checkpoint was saved" in text and _queue(lab) == []


@pytest.mark.slow
@pytest.mark.timeout(600)  # four starts of torch one after the other, 25 s on two free cores
def test_a_run_is_submitted_watched_stopped_and_resumed_on_other_nodes(lab: Lab, herd: Herd, desk: Path) -> None:
    code, text = herd("submit", "./tiny.yaml", "--nodes", "2", "--chain", "run,export", "--time", "9")
    assert code == 0, text
    run, export = re.findall(r"as job (\d+)", text)

    def figures() -> dict[str, object]:
        code, text = herd("status", "tiny", "--json")
        assert code == 0, text
        found: dict[str, object] = json.loads(text)
        return found

    deadline = time.monotonic() + 240
    while not (desk / "runs/tiny/status.json").exists():  # asking herd in a loop would take what training needs
        assert time.monotonic() < deadline, (desk / f"tiny-{run}.log").read_text()
        time.sleep(0.1)
    seen = figures()
    assert (seen["state"], seen["job"], seen["attempt"], seen["steps"], seen["nodes"]) == (
        "training",
        run,
        1,
        100000,
        ["node1", "node2"],
    )
    assert seen["tokens_per_second"] and seen["mfu"] and seen["loss"] and seen["seconds_left"]
    code, text = herd("status")
    assert re.search(rf"runs/tiny +training +{run} +1 +\d+/100000 ", text), text
    assert f"export job {export} tiny-export  waiting in the queue: job {run} has to end first" in text
    for node in ("1", "node2"):
        code, text = herd("tail", "tiny", "--node", node)
        assert code == 0 and text.startswith("==> attempt 1, node2 <==")
    code, text = herd("tail", "tiny", "-n", "1")
    assert code == 0 and re.search(r"step +\d+/100000", text), text
    code, text = herd("submit", "./tiny.yaml", "--nodes", "1")
    assert code == 2 and f"is taken by job {run} (training)" in text
    code, text = herd("resume", "tiny")
    assert code == 2 and "is at work" in text

    code, text = herd("stop", "runs/tiny")
    saved = re.search(r"runs/tiny: stopped by you; saved at step (\d+)", text)
    assert code == 0 and saved, text
    assert f"export job {export} is cancelled" in text and lab.wait(int(run)) == "COMPLETED"
    assert (desk / f"runs/tiny/checkpoints/step-{int(saved[1]):08d}/herd.json").is_file()
    assert figures()["state"] == "stopped" and _queue(lab) == []
    code, text = herd("stop", "tiny")
    assert code == 0 and f"nothing is running; saved at step {saved[1]}" in text

    last = int(saved[1]) + 5
    code, text = herd("resume", "tiny", "--nodes", "1", f"train.steps={last}", HERD_NODE_TYPE="")
    assert code == 0 and f"goes on from step {saved[1]}" in text and "--time=9" in text, text
    found = re.search(r"as job (\d+)", text)
    assert found and _queue(lab)[0][:4] == [found[1], "tiny", "1", "9:00"]
    code, text = herd("tail", "tiny", "--follow")
    assert code == 0 and f"step {last}/{last}" in text and "==> finished <==" in text, text
    assert figures()["state"] == "finished" and figures()["step"] == last
    assert lab.wait(int(found[1])) == "COMPLETED"

    code, text = herd("submit", "./tiny.yaml", "--chain", "export")
    exported = re.search(r"export as job (\d+)", text)
    assert exported and lab.wait(int(exported[1])) == "COMPLETED", text
    assert (desk / "runs/tiny/exported/config.json").is_file()
