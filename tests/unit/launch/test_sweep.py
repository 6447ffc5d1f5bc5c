"""`herd sweep`: which runs it is, how they are trained, skipped and told, and the table; training itself is stood in for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from data_prep.errors import UserError
from launch import slurm, sweep, sweep_run, sweep_slurm, sweep_table
from launch.sweep_grid import points, read, values_of
from llama import recipe as recipes
from llama.run_folder import RunFolder, write_json

BASE = """
name: tiny
model: {vocab_size: 64, hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 4, max_position: 64}
data: {train: nothing, seq_length: 32}
train: {steps: 10, global_batch_size: 2, init_from: base}
validation: {interval: 5}
"""


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8,16", ["8", "16"]),
        ("1e-5", ["1e-5"]),
        ("[q,v],all-linear", ["[q,v]", "all-linear"]),
        ("[q,v]", ["[q,v]"]),
        ('"95,5,0", "90,10,0"', ['"95,5,0"', '"90,10,0"']),
        ("{a: [1,2]},null", ["{a: [1,2]}", "null"]),
    ],
)
def test_commas_part_values_but_not_inside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert values_of(text) == values


def test_points_are_all_combinations_named_by_what_differs() -> None:
    axes, fixed = read(["lora.r=8,16", "train.steps=5", "lora.targets=[q,v],all-linear"], ["data.split=95,5,0"])
    found = points(axes, fixed)
    assert [p.name for p in found] == [
        "rank=8_targets=q+v", "rank=8_targets=all-linear", "rank=16_targets=q+v", "rank=16_targets=all-linear",
    ]  # fmt: skip
    assert found[0].overrides == ["train.steps=5", "data.split=95,5,0", "lora.rank=8", "lora.targets=[q,v]"]
    drawn = points(axes, fixed, 2, seed=3)
    assert drawn == points(axes, fixed, 2, seed=3) and len(drawn) == 2 and set(drawn) < set(found)
    assert points(axes, fixed, 9) == found


def test_names_stay_apart_and_short() -> None:
    axes, _ = read(["train.seed=1,2", "data.seed=1,2", "train.init_from=a/b,a b"])
    names = [p.name for p in points(axes, ())]
    assert names[0].startswith("train.seed=1_data.seed=1_init_from=a_b-") and len(set(names)) == 8
    axes, _ = read(["data.tokenizer=" + "x" * 300 + ",y"])
    assert len(points(axes, ())[0].name) < 60


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.steps=5"], "nothing to sweep"),
        (["8,16"], "not KEY=VALUE"),
        (["lora.rank=8,,16"], "empty value"),
        (["lora.rank=8,8"], "gives 8 twice"),
        (["lora.rank=8,16", "lora.r=4"], "lora.rank is given twice"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as found:
        read(words)
    assert found.value.code == 2


class Trained(subprocess.Popen[bytes]):
    """Stands in for `herd train`: leaves a run folder as that does, the loss being 1 / rank; rank 3 fails."""

    calls: list[list[str]]

    def __init__(self, command: list[str], **options: Any):
        assert command[1:3] == ["-m", "launch.cli"] and command[3] == "train" and options["start_new_session"]
        Trained.calls.append(command[4:])
        recipe = recipes.load(command[4], [word for word in command[5:] if "=" in word])
        run = RunFolder(Path(recipe.folder))
        run.attempt(1).mkdir(parents=True, exist_ok=True)
        recipes.save(recipe, run.recipe)
        run.record("start", 1)
        failed = recipe.lora.rank == 3
        if not failed:
            write_json(run.status, {"step": recipe.train.steps, "steps": recipe.train.steps, "loss": 2.0})
            for step in (5, 10):
                run.record("validation", 1, step=step, loss=(2 if step == 5 else 1) / max(recipe.lora.rank, 1))
            run.record("end", 1, step=recipe.train.steps, outcome="finished")
        text = "herd: no such luck" if failed else "step 10/10"
        super().__init__([sys.executable, "-c", f"print({text!r}); raise SystemExit({int(failed)})"], **options)


Call = Callable[..., Result]


@pytest.fixture
def herd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`herd sweep` in a folder with a recipe."""
    (tmp_path / "tiny.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    Trained.calls = []
    monkeypatch.setattr(sweep_run.subprocess, "Popen", Trained)
    return lambda *words: CliRunner().invoke(sweep.command, ["tiny.yaml", *map(str, words)])


def test_points_are_trained_once_a_failure_is_told_and_the_best_is_named(herd: Call) -> None:
    done = herd("lora.r=2,3,4", "lora.targets=attention,[q,v]", "-n", 2, "--", "data.split=95,5,0")
    assert isinstance(done.exception, UserError) and done.exception.code == 1
    assert "2 of 6 points failed: rank=3_targets=attention; rank=3_targets=q+v" in str(done.exception)
    assert "failed: no such luck; going on with the others" in done.output
    assert "data.split=95,5,0" in Trained.calls[0] and Trained.calls[0][-2:] == ["--processes", "2"]
    table = json.loads(Path("runs/tiny-sweep/table.json").read_text())
    assert table["by"] == "validation loss" and table["best"] == "rank=4_targets=attention"
    assert table["commands"] == ["herd merge base runs/tiny-sweep/rank=4_targets=attention --to runs/tiny-sweep/best"]
    rows = {row["name"]: row for row in table["rows"]}
    first = rows["rank=4_targets=attention"]
    assert (first["val_loss"], first["val_step"], first["best_step"]) == (0.25, 10, 10)
    assert first["trainable"] == 2 * 4 * (4 * (64 + 64)) and first["bits"] == 16
    assert rows["rank=3_targets=q+v"]["state"] != "finished" and table["rows"][-1]["rank"] == 3
    assert "| rank=4_targets=attention | 4 |" in " ".join(Path("runs/tiny-sweep/table.md").read_text().split())

    Trained.calls.clear()
    herd("lora.r=2,3,4", "lora.targets=attention,[q,v]", "-n", 2, "--", "data.split=95,5,0")
    assert len(Trained.calls) == 2 and all("lora.rank=3" in call for call in Trained.calls)
    assert herd("lora.r=2,4", "--", "data.split=95,5,0", "lora.targets=[q,v]").exit_code == 0  # another grid joins


def test_more_steps_go_on_and_another_recipe_is_refused(herd: Call) -> None:
    assert herd("lora.rank=2,4").exit_code == 0
    Trained.calls.clear()
    assert herd("lora.rank=2,4", "train.steps=20").exit_code == 0 and len(Trained.calls) == 2
    other = herd("lora.rank=2,4", "optimizer.lr=0.5").exception
    assert isinstance(
        other, UserError
    ) and "was trained with optimizer.lr=0.0003, not 0.5; choose another --name" in str(other)
    assert herd("lora.rank=2,4", "optimizer.lr=0.5", "--name", "hot").exit_code == 0


def test_what_cannot_be_is_told_and_the_rest_is_trained(herd: Call) -> None:
    done = herd("lora.rank=0,2", "lora.quantize=null,nf4")
    assert "rank=0_quantize=nf4: refused" in done.output and len(Trained.calls) == 3
    assert isinstance(done.exception, UserError)
    wrong = herd("lora.rnk=2,4").exception
    assert isinstance(wrong, UserError) and "unknown key; did you mean rank?" in str(wrong) and wrong.code == 2
    assert "run_dir and name are the sweep's own" in str(herd("run_dir=a,b").exception)


def test_table_alone_trains_nothing(herd: Call) -> None:
    assert "no point has begun" in str(herd("lora.rank=2,4", "--table").exception)
    herd("lora.rank=2,4")
    Trained.calls.clear()
    done = herd("lora.rank=2,4", "--table", "--json")
    assert not Trained.calls and [row["rank"] for row in json.loads(done.output)["rows"]] == [4, 2]
    assert (
        "herd train tiny.yaml lora.rank=2 run_dir=runs/tiny-sweep/rank=2" in herd("lora.rank=2,4", "--dry-run").output
    )


def test_rows_are_sorted_by_what_all_finished_points_know() -> None:
    def row(name: str, state: str = "finished", accuracy: float | None = None, **figures: Any) -> sweep_table.Row:
        scores = {} if accuracy is None else {"accuracy": accuracy}
        return sweep_table.Row(name, "r", state, {}, 8, "q", 16, 1, 2, scores=scores, **figures)

    rows = [row("a", val_loss=2.0, accuracy=0.5), row("b", val_loss=1.0, accuracy=0.4)]
    assert [r.name for r in sweep_table.order(rows)[0]] == ["a", "b"]
    rows = [
        row("a", val_loss=2.0),
        row("b", val_loss=math.nan),
        row("c", val_loss=1.0),
        row("d", "step 3 of 9", val_loss=0.1),
    ]
    assert [r.name for r in sweep_table.order(rows)[0]] == ["c", "a", "b", "d"]
    rows = [row("a", val_loss=2.0, accuracy=0.5), row("b", val_loss=1.0, accuracy=0.5)]
    assert [r.name for r in sweep_table.order(rows)[0]] == ["b", "a"]
    assert "| --: |" in sweep_table.markdown(rows)
    assert sweep_table.order([row("a", train_loss=3.0), row("b", train_loss=2.0)])[1] == "training loss"


def test_figures_of_sources_and_accuracy_come_from_the_last_validation() -> None:
    event = {
        "step": 5,
        "loss": 1.0,
        "accuracy": 0.5,
        "baseline": None,
        "sources": {"web": {"loss": 2.0, "accuracy": None}},
    }
    assert sweep_table.scores_of(event) == {"accuracy": 0.5, "loss/web": 2.0}


def test_time_is_that_of_all_attempts() -> None:
    events = [
        {"event": event, "time": f"2026-11-22T08:00:{second:02}.000Z"}
        for event, second in [("start", 0), ("save", 10), ("lost", 20), ("start", 30), ("end", 45)]
    ]
    assert sweep_table.seconds(events) == 35
    assert sweep_table.seconds([]) == 0


class Queue:
    """Stands in for Slurm: takes what sbatch is given, and says which tasks wait."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.jobs: list[slurm.Job] = []

    def submit(self, command: list[str], environment: dict[str, str], folder: Path) -> str:
        self.sent.append(command)
        return str(10 + len(self.sent))


def test_an_array_holds_what_is_neither_finished_nor_queued_under_numbers_that_stay(
    herd: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue()
    monkeypatch.setattr(sweep_slurm.slurm, "submit", queue.submit)
    monkeypatch.setattr(sweep_slurm.slurm, "queue", lambda *_: queue.jobs)
    monkeypatch.setattr(sweep_slurm.submit, "check", lambda wanted: None)
    assert herd("lora.rank=2,3,4").exit_code == 1  # here: 3 fails
    done = herd("lora.rank=2,3,4", "--slurm", "--at-once", 2, "--partition", "cpu", "--", "data.split=95,5,0")
    assert isinstance(done.exception, UserError) and "was trained with data.split" in str(done.exception)
    done = herd("lora.rank=2,3,5,6", "--slurm", "--at-once", 2, "--partition", "cpu", "--nodes", 3)
    points, table = queue.sent
    assert {"--array=0-2%2", "--nodes=3", "--partition=cpu"} < set(points) and "rank=3: task 11_0" in done.output
    assert points[-1] == "runs/tiny-sweep/points" and points[-2].endswith("slurm/sweep.slurm")
    assert "--dependency=afterany:11" in table and table[-4:] == [
        "tiny.yaml",
        "lora.rank=2,3,5,6",
        "--name",
        "tiny-sweep",
    ]
    comment = f"herd sweep {Path('runs/tiny-sweep').absolute()}"
    queue.jobs = [
        slurm.Job("13", "PENDING", comment=comment, task="11_2"),
        slurm.Job("14", "COMPLETED", comment=comment, task="11_1"),
    ]
    done = herd("lora.rank=3,6,7", "--slurm")
    assert "rank=6: in the queue already, task 11_2" in done.output and "--array=0,3" in queue.sent[2]
    lines = Path("runs/tiny-sweep/points").read_text().splitlines()
    assert [line.partition("rank=")[2][0] for line in lines] == ["3", "5", "6", "7"]


def test_numbers_of_an_array_are_written_short() -> None:
    assert sweep_slurm.ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8"
    line = ["12 11_3", "RUNNING", *[""] * 12]
    job = slurm.parse("\x1f".join(line))[0]
    assert (job.id, job.address) == ("12", "11_3") and slurm.parse("\x1f".join(["12 12", *line[1:]]))[0].address == "12"


def test_a_signal_reaches_the_training_and_ends_the_sweep(tmp_path: Path) -> None:
    """The real thing: SIGTERM to the sweep is SIGTERM to the run."""
    script = (
        "import sys, time; from launch import sweep_run; from pathlib import Path\n"
        "sweep_run.command_of = lambda *_: ['x']\n"
        "real = sweep_run.subprocess.Popen\n"
        'code = \'import signal, sys, time; signal.signal(15, lambda *_: (open("heard", "w"), sys.exit(0)));\''
        ' \'open("up", "w"); time.sleep(30)\'\n'
        "sweep_run.subprocess.Popen = lambda command, **o: real([sys.executable, '-c', code], **o)\n"
        "from launch.sweep import command\n"
        "command(['tiny.yaml', 'lora.rank=2,4'])\n"
    )
    (tmp_path / "tiny.yaml").write_text(BASE)
    root = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"}, stdout=subprocess.PIPE
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and (tmp_path / "heard").exists()
    assert b"the same command goes on from here" in said and b"2/2" not in said
