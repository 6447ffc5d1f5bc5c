"""`herd export`: a run's checkpoint as a Hugging Face directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    from llama.config import Recipe


BEST = -1
"""The step of the best validation, whichever it is."""


class Step(click.ParamType):
    """A step's number, or best."""

    name = "N|best"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "best":
            return BEST
        return int(click.IntRange(min=0).convert(value, param, ctx))  # type: ignore[arg-type]


def _checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest; UserError when it is not there."""
    from llama.run_folder import RunFolder, complete, step_of

    found = {step_of(checkpoint): checkpoint for checkpoint in complete(run)}
    if not found:
        raise UserError(f"{run}: has no complete checkpoint in checkpoints/; let the run reach checkpoint.interval", 2)
    if step == BEST:
        best = RunFolder(run).best()
        if best is None:
            raise UserError(f"{run}: has not validated yet, so no checkpoint is the best; set validation.interval", 2)
        step = best[0]
        if step not in found:
            raise UserError(
                f"{run}: validated best at step {step} (loss {best[1]:.4f}), of which no checkpoint was kept; set "
                "checkpoint.keep_best=true for the next run, or give another --step",
                2,
            )
    if step is not None and step not in found:
        known = ", ".join(str(number) for number in sorted(found))
        raise UserError(f"{run}: has no complete checkpoint of step {step}; there are {known}", 2)
    return found[max(found) if step is None else step]


def _tokenizer(recipe: Recipe, given: str | None) -> tuple[Path | None, bool]:
    """Where the run's tokenizer is, and whether it should put BOS before each text.

    Named on the command line, in the recipe, beside the weights that the run started from, or by its token files. Token
    files hold no BOS unless herd prep tokenize was asked for it, so a model that was trained on them alone must not be
    given one.
    """
    from data_prep.parts_file import read_meta
    from llama.data.blend_file import prefixes

    start = recipe.train.init_from
    tokens = recipe.data.train if recipe.chat is None else ()  # else they are conversations
    first = prefixes(tokens[0])[0] if tokens else None
    meta = (read_meta(first) if first is not None else None) or {}
    named = given or recipe.data.tokenizer
    if named is None and start is not None and any(Path(start).glob("tokenizer.*")):
        named = start
    if named is None and meta:
        named = meta.get("tokenizer")
        if named is not None and not Path(named).exists():
            click.echo(
                f"herd: the tokenizer {named} of the token files is gone; exporting without, or give --tokenizer"
            )
            named = None
    return (None if named is None else Path(named)), start is not None or bool(meta.get("prepend_bos"))


@click.command(short_help="Checkpoint to a Hugging Face directory.")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--step", type=Step(),
    help="Which checkpoint: a step, or best, of the lowest validation loss; the newest complete one when not given.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of the written weights. [default: bfloat16, of an adapter float32]",
)  # fmt: skip
@click.option("--tokenizer", help="Tokenizer file or folder; the run's own when not given.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option(
    "--verify/--no-verify", default=None, help="Compare checksums first. [default: the recipe's checkpoint.verify]"
)
@click.option(
    "--mlflow/--no-mlflow", default=True, show_default=True,
    help="Add the model card, and an adapter, to the run's artifacts where MLflow recorded it.",
)  # fmt: skip
def command(
    run: Path,
    to: Path,
    step: int | None,
    dtype: str | None,
    tokenizer: str | None,
    overwrite: bool,
    verify: bool | None,
    mlflow: bool,
) -> None:
    """Write a checkpoint of RUN as a directory that transformers, vLLM and others load.

    A run with adapters (lora.rank) is written as PEFT's adapter; herd merge makes a whole model of it.

    \b
    herd export runs/tiny_cpu --to exported
    herd export runs/tiny_cpu --to exported-100 --step 100 --dtype float32
    herd export runs/tuned --to exported-best --step best
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: has no recipe.yaml; give a run folder, such as runs/tiny_cpu", 2)
    from llama import hf
    from llama.checkpoint_format import damage
    from llama.recipe import load
    from llama.run_folder import RunFolder

    recipe = load(str(run / "recipe.yaml"))
    checkpoint = _checkpoint(run, step)
    source, add_bos = _tokenizer(recipe, tokenizer)
    wrong = damage(checkpoint, recipe.checkpoint.verify if verify is None else verify)
    if wrong:
        raise UserError(f"{checkpoint.name} is damaged: {wrong}; choose another --step")
    began = time.monotonic()
    if recipe.lora.rank:
        dtype = dtype or "float32"
        hf.export_adapter(checkpoint, recipe, to, dtype, source, overwrite)
    else:
        dtype = dtype or "bfloat16"
        hf.export(checkpoint, recipe, to, dtype, source, add_bos, overwrite)
    size = sum(path.stat().st_size for path in to.glob("*.safetensors"))
    what = "adapter, " if recipe.lora.rank else ""
    click.echo(
        f"{checkpoint.name} -> {to}: {what}{size / 1e6:,.1f} MB in {dtype}, {time.monotonic() - began:.1f} s"
        + ("" if source else "; without a tokenizer, none is known for this run")
    )
    if mlflow:
        from llama.train.mlflow_run import log_files

        names = ["README.md", *(["adapter_config.json", "adapter_model.safetensors"] if recipe.lora.rank else [])]
        if trouble := log_files(RunFolder(run), [to / name for name in names], f"export/{checkpoint.name}"):
            click.echo(f"herd: warning: the card is not among the run's artifacts: {trouble}", err=True)
