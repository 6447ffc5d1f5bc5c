"""What MLflow is told, read back with its own client from a folder; and servers that are away, slow or refuse."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from llama import recipe as recipes
from llama.config import Recipe
from llama.device import find_device
from llama.run_folder import RunFolder, read_json, write_json
from llama.train import mlflow_sink
from llama.train.evaluate import Evaluation, Figures
from llama.train.journal import Journal
from llama.train.metrics import Metrics, StepReport
from llama.train.mlflow_run import MlflowRun, flat, log_files, tracking_uri, without_password
from llama.train.mlflow_sink import Mlflow, plain
from tests.dist.layouts import recipe

needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None and not os.environ.get("CI"), reason="mlflow-skinny is not installed"
)


def _recipe(folder: Path, uri: str | Path, **changes: Any) -> Recipe:
    keys = recipe(log__tensorboard=False, **changes).model_dump()
    keys["log"] |= {"mlflow": str(uri), "mlflow_experiment": "study"}
    return Recipe.model_validate(keys | {"run_dir": str(folder)})


def _train(config: Recipe, first: int, last: int) -> None:
    """What a run from `first` to `last` says to its metrics."""
    run = RunFolder(Path(config.folder))
    run.path.mkdir(exist_ok=True)
    recipes.save(config, run.recipe)
    write_json(run.path / "code.json", {"commit": "c0ffee", "version": "c0ffee+"})
    metrics = Metrics(config, find_device("cpu"), 2, Journal(run, 1, True), first)
    for step in range(first + 1, last + 1):
        report = StepReport(step, 5.0 - step, 1.0, 1e-3, 8 * step, 256 * step, 256 * step, 0, 0.0)
        metrics.step(report, parameter_norm=7.0)
    metrics.validation(last, Evaluation(Figures(4.5, 1)))
    metrics.scalars(last, {"val_accuracy/data/qnli dev?.tsv": 0.75})
    metrics.text(last, "samples/0", "The answer is 4.")
    metrics.close()


@needs_mlflow
def test_a_run_and_its_second_part_are_one_run_of_mlflow(tmp_path: Path, capsys: Any) -> None:
    from mlflow import MlflowClient

    _train(_recipe(tmp_path / "run", tmp_path / "ml", train__steps=4), 0, 2)
    name = read_json(tmp_path / "run" / "mlflow.json")["run"]
    client = MlflowClient(tracking_uri=(tmp_path / "ml").as_uri())
    assert client.get_run(name).info.status == "KILLED"  # stopped before its end, as by a signal
    _train(_recipe(tmp_path / "run", tmp_path / "ml", train__steps=4, optimizer__lr=0.5), 2, 4)

    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [name]
    run = client.get_run(name)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["train.steps"] == "4" and run.data.params["lora.targets"] == '["q", "v"]'
    assert run.data.params["optimizer.lr"] != "0.5" and run.data.tags["changed.optimizer.lr"] == "0.5"
    assert run.data.tags["mlflow.source.git.commit"] == "c0ffee" and run.data.tags["ranks"] == "2"
    points = client.get_metric_history(name, "reduced_train_loss")
    assert [(p.step, p.value) for p in points] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert {"lr", "gradient_norm", "throughput", "val_loss", "val_perplexity"} <= run.data.metrics.keys()
    assert run.data.metrics["val_accuracy/data/qnli dev_.tsv"] == 0.75
    assert {file.path for file in client.list_artifacts(name)} == {"recipe.yaml", "loss.png", "samples"}
    kept = tmp_path / "ml" / experiment.experiment_id / name / "artifacts"
    assert (kept / "samples" / "0" / "step-00000004.txt").read_text() == "The answer is 4."
    assert "warning" not in capsys.readouterr().out


@needs_mlflow
def test_what_is_exported_joins_the_runs_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    card = tmp_path / "README.md"
    card.write_text("# A model")
    assert log_files(run, [card], "export") is None  # MLflow knows nothing of this run
    _train(_recipe(run.path, tmp_path / "ml", train__steps=1), 0, 1)
    assert log_files(run, [card], "export/step-00000001") is None
    client, name = MlflowClient(tracking_uri=(tmp_path / "ml").as_uri()), read_json(run.path / "mlflow.json")["run"]
    assert [file.path for file in client.list_artifacts(name, "export/step-00000001")] == [
        "export/step-00000001/README.md"
    ]
    write_json(run.path / "mlflow.json", {"uri": (tmp_path / "ml").as_uri(), "run": "0" * 32})
    assert "not found" in str(log_files(run, [card], "export"))


@needs_mlflow
def test_a_run_that_mlflow_has_lost_begins_anew(tmp_path: Path) -> None:
    config = _recipe(tmp_path, tmp_path / "ml", train__steps=1)
    known = {"uri": (tmp_path / "ml").as_uri(), "experiment": "study", "run": "0" * 32}
    write_json(tmp_path / "mlflow.json", known)
    _train(config, 0, 1)
    assert read_json(tmp_path / "mlflow.json")["run"] != known["run"]


@needs_mlflow
def test_a_server_that_is_away_costs_no_step_and_is_told_once_without_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_sink, "PATIENCE", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:secret@127.0.0.1:9")
    said: list[str] = []
    sink = Mlflow(_recipe(tmp_path, "env"), RunFolder(tmp_path), {}, said.append)
    for step in range(1000):
        sink.scalars(step, {"loss": 1.0})
    while not said:
        time.sleep(0.01)
    sink.close("finished")
    assert (
        "warning: MLflow at http://127.0.0.1:9: " in said[0] and "refused" in said[0] and "training goes on" in said[0]
    )
    assert "lacks 1000 figures" in said[1] and len(said) == 2
    assert "secret" not in "".join(said) and not (tmp_path / "mlflow.json").exists()


class _Remote(MlflowRun):
    """A server that takes what comes, one batch a beat of `gate`."""

    gate = threading.Semaphore(0)
    got: list[Any]

    def open(self) -> None:
        self.got, self.id = [], "x"

    def send(self, points: Any) -> None:
        self.gate.acquire(timeout=5)
        if points[0][0] == "refused":
            raise _RefusedError("no such run")
        self.got.extend(points)

    def end(self, ended: Any) -> None:
        self.got.append(ended)


class _RefusedError(Exception):
    def get_http_status_code(self) -> int:
        return 404


def test_what_a_slow_server_has_no_room_for_is_dropped_counted_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_sink, "MlflowRun", _Remote)
    monkeypatch.setattr(mlflow_sink, "tracking_uri", lambda given: given)
    monkeypatch.setattr(mlflow_sink, "POINTS", 10)
    said: list[str] = []
    sink = Mlflow(_recipe(tmp_path, "slow"), RunFolder(tmp_path), {}, said.append)
    for step in range(14):
        sink.scalars(step, {"loss": 1.0})
    for _ in range(20):
        _Remote.gate.release()
    sink.close("finished")
    assert len(said) == 2 and "too slow" in said[0] and "lacks 4 figures" in said[1]
    assert [point[3] for point in sink.remote.got[:-1]] == list(range(10)) and sink.remote.got[-1] == "finished"  # type: ignore[attr-defined]


def test_what_a_server_refuses_does_not_hold_up_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_sink, "MlflowRun", _Remote)
    monkeypatch.setattr(mlflow_sink, "tracking_uri", lambda given: given)
    monkeypatch.setattr(mlflow_sink, "BATCH", 1)
    said: list[str] = []
    sink = Mlflow(_recipe(tmp_path, "strict"), RunFolder(tmp_path), {}, said.append)
    sink.scalars(1, {"refused": 1.0, "loss": 2.0})
    for _ in range(9):
        _Remote.gate.release()
    sink.close("failed")
    assert "refuses figures: no such run" in said[0] and "lacks 1 figures" in said[1]
    assert [point[0] for point in sink.remote.got[:-1]] == ["loss"]  # type: ignore[attr-defined]


def test_without_mlflow_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'herd\[mlflow\]'"):
        tracking_uri("http://tracking:5000")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sqlalchemy" else object())
    with pytest.raises(UserError, match="pip install mlflow; or name a folder"):
        tracking_uri("sqlite:///mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI, which is not set"):
        tracking_uri("env")
    assert tracking_uri("https://tracking:5000") == "https://tracking:5000"
    assert tracking_uri("runs/ml").startswith("file:///") and tracking_uri("runs/ml").endswith("/runs/ml")


def test_a_password_in_the_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        _recipe(tmp_path, "https://anna:secret@tracking/x")


def test_names_values_and_addresses_as_mlflow_takes_them() -> None:
    assert flat({"a": {"b": 1, "c": [1, "x"]}, "d": None}) == {"a.b": "1", "a.c": '[1, "x"]', "d": "None"}
    assert len(flat({"a": "x" * 9000})["a"]) == 500
    assert plain("/val loss/ünd?.json") == "val loss/ünd_.json"
    assert without_password("at postgresql://anna:pw@db/x failed") == "at postgresql://db/x failed"
