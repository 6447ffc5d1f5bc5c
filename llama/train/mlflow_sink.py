"""MLflow beside TensorBoard: the recipe as parameters, figures with their steps, artifacts, tags of where it ran.

A thread speaks to the server, so that a slow one never slows training: what it has not taken yet waits in memory up to a
bound, and what is beyond it is dropped, counted and told. Needs `mlflow-skinny` or `mlflow`, which are imported there.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from llama.config import Recipe
from llama.run_folder import RunFolder, read_json, write_json
from llama.train.sinks import Ended, Say

Point = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step."""
POINTS, TEXTS = 50_000, 1_000
"""How many wait for the server at most."""
BATCH = 1_000
"""Points in one request, as many as MLflow takes."""
VALUE = 500
"""Characters of a parameter's value that every version of MLflow takes."""
PATIENCE = 10.0
"""Seconds that the end of a run waits for the server."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts to reach a server that is away."""
LOSS, VALIDATION_LOSS = "reduced_train_loss", "val_loss"
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # waiting is done here, where it can be told and ended
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
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
        known = read_json(self.run.path / "mlflow.json")
        name = self._existing(known["run"]) if known.items() >= place.items() and known.get("run") else None
        if name is None:
            found = self.client.get_experiment_by_name(place["experiment"])
            experiment = found.experiment_id if found else self.client.create_experiment(place["experiment"])
            title = self.recipe.log.mlflow_run or Path(self.recipe.folder).name
            name = self.client.create_run(experiment, self.started, run_name=title).info.run_id
            write_json(self.run.path / "mlflow.json", place | {"run": name})
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


class Mlflow:
    """The sink: what comes is put down and sent by a thread."""

    def __init__(self, recipe: Recipe, run: RunFolder, facts: Mapping[str, str], say: Say):
        """`facts`: tags of where it runs. Raises UserError when MLflow is not installed; a server that is away is told."""
        uri = tracking_uri(recipe.log.mlflow or "")
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        self.remote, self.say, self.place = MlflowRun(recipe, run, facts, uri), say, without_password(uri)
        self.points: deque[Point] = deque()
        self.texts: deque[tuple[int, str, str]] = deque()
        self.dropped, self.away = 0, False
        self.wake, self.closed = threading.Condition(), threading.Event()
        self.ended: Ended = "failed"
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        moment = time.time_ns() // 1_000_000
        self._put(self.points, POINTS, [(plain(name), float(value), moment, step) for name, value in values.items()])

    def text(self, step: int, tag: str, text: str) -> None:
        self._put(self.texts, TEXTS, [(step, plain(tag), text)])

    def flush(self) -> None:
        """Nothing: the thread is at it."""

    def close(self, ended: Ended) -> None:
        """Wait PATIENCE seconds for what is not sent yet, and say what was lost."""
        self.ended = ended
        with self.wake:
            self.closed.set()
            self.wake.notify()
        self.thread.join(PATIENCE)
        lost = self.dropped + len(self.points) + len(self.texts)
        if lost or self.thread.is_alive():
            self.say(f"warning: MLflow at {self.place} lacks {lost} figures and texts of this run")

    def _put(self, queue: deque[Any], bound: int, items: list[Any]) -> None:
        with self.wake:
            fits = len(queue) + len(items) <= bound
            if fits:
                queue.extend(items)
            self.wake.notify()
        if not fits:
            if not self.dropped:
                self.say(f"warning: MLflow at {self.place} is too slow; what it has no room for is not sent")
            self.dropped += len(items)

    def _work(self) -> None:
        """The thread: open the run, send what comes, end the run. What fails is tried again, ever less often."""
        pause, last_tries = 1.0, 2
        while last_tries:
            with self.wake:
                self.wake.wait_for(lambda: self.points or self.texts or self.closed.is_set() or not self.remote.id)
            try:
                if not self.remote.id:
                    self.remote.open()
                self._send(self.points, BATCH, self.remote.send)
                self._send(self.texts, 1, lambda texts: self.remote.text(*texts[0]))
                if self.closed.is_set() and not (self.points or self.texts):
                    self.remote.end(self.ended)
                    return
                if self.away:
                    self.say(f"MLflow at {self.place} answers again")
                pause, self.away = 1.0, False
            except Exception as error:  # whatever it is, the run goes on
                if not self.away:
                    self.say(f"warning: MLflow at {self.place}: {in_short(error)}; figures wait, training goes on")
                self.away = True
                last_tries -= self.closed.is_set()
                self.closed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _send(self, queue: deque[Any], at_once: int, send: Callable[[list[Any]], None]) -> None:
        while queue:
            with self.wake:
                items = list(islice(queue, at_once))
            try:
                send(items)
            except Exception as error:
                if not refused(error):
                    raise
                if not self.dropped:
                    self.say(f"warning: MLflow at {self.place} refuses figures: {in_short(error)}")
                self.dropped += len(items)
            for _ in items:
                queue.popleft()


def plain(name: str) -> str:
    """A name of the characters that MLflow knows."""
    return re.sub(r"[^\w./: -]", "_", name).strip("/.")


def user() -> str:
    """Who runs this; empty where the system does not know."""
    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return ""


def refused(error: Exception) -> bool:
    """Whether the server would say the same again."""
    code = getattr(error, "get_http_status_code", lambda: 0)()
    return 400 <= code < 500 and code not in (401, 403, 408, 429)


def in_short(error: Exception) -> str:
    """An error in one line without passwords."""
    return without_password(" ".join(str(error).split()) or type(error).__name__)[:300]
