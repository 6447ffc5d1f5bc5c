"""What a run keeps, how it comes back, and what it tells."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from llama.config.section import Count, NonNegative, Section


class Checkpoint(Section):
    """What is saved, when, and what is kept."""

    interval: NonNegative = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: NonNegative = 0
    """Also keep each checkpoint whose step is a multiple of this; 0: none."""
    keep_best: bool = False
    """Save at each validation with the lowest loss so far, and keep that checkpoint: herd export RUN --step best."""
    save_async: bool = True
    """Write in the background while training goes on."""
    at_end: bool = True
    """Save after the last step."""
    verify: bool = True
    """Compare checksums when resuming, so that a damaged checkpoint is noticed before it is used."""


class Resilience(Section):
    """When a run counts as stuck, and how often it is started again by itself."""

    hang_timeout: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds without a finished step, validation batch or save after which all ranks write their stacks and the run is
    started again; 0: never."""
    first_step_timeout: Annotated[float, Field(ge=0)] = 7200.0
    """The same until the first step is done, which loads, builds the sample order and compiles."""
    stop_margin: Annotated[float, Field(ge=0)] = 60.0
    """Seconds kept free before the job's time limit, beside what the next step and a save are seen to take."""
    fruitless_attempts: Count = 5
    """Attempts in a row that reach no new checkpoint, after which the job fails instead of starting once more."""
    max_requeues: NonNegative = 100
    """Times that one Slurm job may go back into the queue."""


class Log(Section):
    """What is shown and recorded."""

    interval: Count = 1
    """Steps between lines and TensorBoard points."""
    tensorboard: bool = True
    mlflow: str | None = None
    """Where MLflow records the run too: a folder, a server's URI (http://…), or env: what MLFLOW_TRACKING_URI says."""
    mlflow_experiment: Annotated[str, Field(min_length=1)] = "herd"
    """MLflow's experiment, made where it is missing."""
    mlflow_run: str | None = None
    """Name of MLflow's run; that of the run folder when not given."""

    @field_validator("mlflow")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        # The recipe is written into the run's folder and into MLflow itself.
        if uri and "@" in uri.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "the address holds a user or password, which would be written down; give MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD in the environment, or MLFLOW_TRACKING_URI and log.mlflow=env"
            )
        return uri
