"""One run of MLflow for one run folder: what it is told of the recipe, where it ran, its figures and files.

Every call here may wait for a server; training calls it from a thread (mlflow_sink.py). MLflow is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from llama.config import Recipe
from llama.run_folder import RunFolder, read_json, write_json
from llama.train.sinks import Ended

Point = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step."""
VALUE = 500
"""Characters of a parameter's value that every version of MLflow takes."""
LOSS, VALIDATION_LOSS = "reduced_train_loss", "val_loss"
RECORD = "mlflow.json"
"""In the run's folder: server, experiment and id of the run there."""
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # waiting is done here, where it can be told and ended
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # who names a folder wants one, though MLflow would rather have a database
}
"""Variables of MLflow, where the user has not set them."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def tracking_uri(given: str) -> str:
    """log.mlflow as MLflow writes it: a folder becomes file:///…, `env` is what MLFLOW_TRACKING_URI says.

    Raises UserError when MLflow, or what this kind of store needs, is not installed.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") if given == "env" else given
    if not uri:
        raise UserError("log.mlflow=env takes the server from MLFLOW_TRACKING_URI, which is not set; set it", 2)
    if importlib.util.find_spec("mlflow") is None:
        raise UserError(
            f"log.mlflow={given} needs MLflow, which is not installed: pip install 'herd[mlflow]', or leave log.mlflow out",
            2,
        )
    scheme = uri.partition(":")[0] if "://" in uri or uri == "databricks" else ""
    if not scheme:
        return Path(uri).expanduser().absolute().as_uri()
    if scheme.partition("+")[0] in DATABASES and importlib.util.find_spec("sqlalchemy") is None:
        raise UserError(
            f"log.mlflow={without_password(uri)} is a database, which only the whole of MLflow writes: pip install mlflow; "
            "or name a folder or a server",
            2,
        )
    return uri


def without_password(text: str) -> str:
    """`text` without user and password of the addresses in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def in_short(error: Exception) -> str:
    """An error in one line without passwords; of errors in errors the innermost."""
    text = " ".join(str(error).split()).rpartition("(Caused by ")[2] or type(error).__name__
    return without_password(text)[:300]


def flat(keys: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested keys as a.b=c, values as text; lists as JSON."""
    found: dict[str, str] = {}
    for key, value in keys.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}.")
        else:
            text = json.dumps(value) if isinstance(value, (list, tuple)) else str(value)
            found[before + key] = text if len(text) <= VALUE else text[: VALUE - 1] + "…"
    return found


class MlflowRun:
    """One MLflow run for one run folder: a resumed run goes on in it. Its id is in mlflow.json. Every call may wait."""

    def __init__(self, recipe: Recipe, run: RunFolder, facts: Mapping[str, str], uri: str):
        self.recipe, self.run, self.facts, self.uri = recipe, run, facts, uri
        self.started = time.time_ns() // 1_000_000
        self.client: Any = None
        self.id = ""

    def open(self) -> None:
        """Go on in the run that this folder has on this server, or make one; record what it is made of."""
        import mlflow

        self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        place = {"uri": without_password(self.uri), "experiment": self.recipe.log.mlflow_experiment}
        known = read_json(self.run.path / RECORD)
        name = self._existing(known["run"]) if known.items() >= place.items() and known.get("run") else None
        if name is None:
            found = self.client.get_experiment_by_name(place["experiment"])
            experiment = found.experiment_id if found else self.client.create_experiment(place["experiment"])
            title = self.recipe.log.mlflow_run or Path(self.recipe.folder).name
            name = self.client.create_run(experiment, self.started, run_name=title).info.run_id
            write_json(self.run.path / RECORD, place | {"run": name})
        else:
            self.client.update_run(name, status="RUNNING")
        self._describe(name)
        self.id = name

    def _existing(self, name: str) -> str | None:
        """The run's id if the server still has it."""
        from mlflow.exceptions import MlflowException

        try:
            stage = self.client.get_run(name).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return name if stage == "active" else None

    def _describe(self, name: str) -> None:
        from mlflow.entities import Param, RunTag

        code, environment = read_json(self.run.path / "code.json"), read_json(self.run.path / "environment.json")
        tags = {
            "mlflow.source.name": f"herd train {self.recipe.name}",
            "mlflow.source.type": "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL",
            "mlflow.source.git.commit": code.get("commit"),
            "mlflow.user": user(),
            "herd.version": code.get("version"),
            "herd.run_folder": str(self.run.path.absolute()),
            "platform": environment.get("system"),
            "host": environment.get("host"),
            "slurm.job": os.environ.get("SLURM_JOB_ID"),
            **{f"version.{package}": version for package, version in environment.get("packages", {}).items()},
            **self.facts,
        }
        keys = flat(self.recipe.model_dump(mode="json"))
        # A parameter is written once: what a resumed run changes, such as train.steps, becomes a tag.
        said = self.client.get_run(name).data.params
        tags |= {f"changed.{key}": value for key, value in keys.items() if said.get(key, value) != value}
        new = [Param(key, value) for key, value in keys.items() if key not in said]
        for start in range(0, len(new), 100):
            self.client.log_batch(name, params=new[start : start + 100])
        self.client.log_batch(name, tags=[RunTag(key, str(value)) for key, value in tags.items() if value])
        self.client.log_artifact(name, str(self.run.recipe))

    def send(self, points: Iterable[Point]) -> None:
        """Record points."""
        from mlflow.entities import Metric

        self.client.log_batch(self.id, metrics=[Metric(*point) for point in points])

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a text as a file."""
        self.client.log_text(self.id, text, f"{tag}/step-{step:08d}.txt")

    def end(self, ended: Ended) -> None:
        """The loss curve of all attempts as a picture, and how the run ended."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for name, label in ((LOSS, "training"), (VALIDATION_LOSS, "validation")):
            # A step that was done again after a crash counts as it was done last.
            last = {point.step: point.value for point in self.client.get_metric_history(self.id, name)}
            if last:
                axes.plot(sorted(last), [last[step] for step in sorted(last)], label=label)
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()
        self.client.log_figure(self.id, figure, "loss.png")
        self.client.set_terminated(self.id, {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ended])


def log_files(run: RunFolder, files: Iterable[Path], folder: str) -> str | None:
    """Add `files` to the run's artifacts, under `folder`; why that failed. Nothing where MLflow knows no such run."""
    known = read_json(run.path / RECORD)
    if not known:
        return None
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow

        # The folder's record has no password; where the address has one, the environment does.
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        uri = uri if without_password(uri) == known["uri"] else known["uri"]
        client = mlflow.MlflowClient(tracking_uri=uri)
        for file in files:
            client.log_artifact(known["run"], str(file), folder)
    except Exception as error:  # an export is none the worse for it
        return f"MLflow at {known.get('uri')}: {in_short(error)}"
    return None


def user() -> str:
    """Who runs this; empty where the system does not know."""
    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return ""
