"""`herd compare RUN_A RUN_B`: whether training runs are equal, as far as their curves can tell, and how far that is."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    from llama.compare import Comparison, Options

RUN = click.Path(exists=True, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


def rule_options(function: Any) -> Any:
    """Options of compare and parity that choose how to decide."""
    for option in reversed((
        click.option("--from", "start", type=float, help="Judge from here on; after the first tenth when not given."),
        click.option("--tolerance", type=click.FloatRange(0, min_open=True), default=0.005, show_default=True,
                     help="Gap of the loss at the end that counts as none, as a share of it."),
        click.option("--drift-tolerance", type=click.FloatRange(0, min_open=True), default=0.01, show_default=True,
                     help="The same for what the gap grows by over the last half."),
        click.option("--norm-tolerance", type=click.FloatRange(0, min_open=True), default=0.01, show_default=True,
                     help="The same for the gradient norm."),
        click.option("--parameter-tolerance", type=click.FloatRange(0, min_open=True), default=0.02, show_default=True,
                     help="The same for the norm of the weights."),
        click.option("--rtol", type=click.FloatRange(0, min_open=True), default=0.05, show_default=True,
                     help="Pointwise rule: a point agrees within this share."),
        click.option("--share", type=click.FloatRange(0, 1), default=0.95, show_default=True,
                     help="Pointwise rule: share of points that must agree."),
        click.option("--confidence", type=click.FloatRange(0.5, 1, min_open=True, max_open=True), default=0.95,
                     show_default=True, help="Of each one-sided test."),
        click.option("--decide", type=click.Choice(["noise", "pointwise", "both"]), default="noise", show_default=True,
                     help="Rules that the verdict follows; all are shown."),
        click.option("--to", type=FILE, help="Picture to write: .png, .svg or .pdf."),
        click.option("--markdown", type=FILE, help="Report to write, for a CI job's summary."),
        click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of text."),
    )):  # fmt: skip
        function = option(function)
    return function


def options_from(given: dict[str, Any], same_start: bool | None) -> Options:
    """The options of `rule_options` as the rules take them."""
    from llama.compare import Options

    keys = {field.name for field in fields(Options)} - {"same_start"}
    return Options(**{key: given[key] for key in keys}, same_start=same_start)


@click.command(short_help="Whether runs are equal, by their curves.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=RUN)
@click.option(
    "--reference", "references", multiple=True, type=RUN,
    help="A reference; again for more seeds of it, whose spread is a band. The first RUN when not given.",
)  # fmt: skip
@click.option(
    "--over", type=click.Choice(["auto", "steps", "samples", "tokens"]), default="auto", show_default=True,
    help="What runs along; auto: tokens where batches differ in size, else steps.",
)  # fmt: skip
@click.option(
    "--tag", "tags", multiple=True, help="Tag to compare instead of the training loss; again where runs differ in it."
)
@click.option(
    "--same-start/--other-start", "same_start", default=None,
    help="Whether the first weights and all batches are the same; found in recipes of our own runs when not given.",
)  # fmt: skip
@rule_options
def command(
    runs: tuple[Path, ...],
    references: tuple[Path, ...],
    over: Literal["auto", "steps", "samples", "tokens"],
    tags: tuple[str, ...],
    same_start: bool | None,
    **given: Any,
) -> None:
    """Compare each RUN with its reference: the first RUN, or those named by --reference.

    A RUN is a run folder of ours, a folder of TensorBoard events of NeMo, Megatron-LM or the Hugging Face trainer, or a
    JSON or CSV file. Exit code 0: equal within the tolerances; 1: not; 3: too little data to say, with how much would do.

    \b
    herd compare runs/gpu runs/trn --to parity.png
    herd compare --reference runs/seed1 --reference runs/seed2 runs/candidate --json
    """
    from llama.compare import compare, open_run
    from llama.compare.report import as_json

    if not references:
        references, runs = runs[:1], runs[1:]
    if not runs:
        raise UserError(f"{references[0]} is compared with nothing; herd compare {references[0]} OTHER_RUN", 2)
    check_picture(given["to"])
    names = unlike_names([*references, *runs])
    opened = [open_run(path, name) for path, name in zip([*references, *runs], names, strict=True)]
    options = options_from(given, same_start)
    known, candidates = opened[: len(references)], opened[len(references) :]
    found = [compare(known, candidate, options, over, tags) for candidate in candidates]
    show(found, given)
    raise SystemExit(as_json(found)["exit_code"])


def check_picture(to: Path | None) -> None:
    """Refuse a picture's ending before the work is done."""
    if to is not None:
        from launch.plot import check_ending

        check_ending(to)


def unlike_names(paths: list[Path]) -> list[str]:
    """A name for each run that tells it from the others. UserError when one is given twice."""
    from launch.plot import names_of

    for path in paths:
        if sum(path.resolve() == other.resolve() for other in paths) > 1:
            raise UserError(f"{path}: is given twice; a run compared with itself says nothing", 2)
    return names_of(paths)


def show(found: list[Comparison], given: dict[str, Any]) -> None:
    """Print the verdicts, and write what was asked for."""
    from llama.compare import report

    if given["as_json"]:
        click.echo(json.dumps(report.as_json(found), indent=1, ensure_ascii=False))
    else:
        for comparison in found:
            click.echo("\n".join(report.as_text(comparison)))
    if given["markdown"]:
        write(given["markdown"], report.as_markdown(found))
        click.echo(f"report in {given['markdown']}", err=True)
    if given["to"]:
        from launch.compare_picture import draw

        draw(found, given["to"])
        click.echo(f"picture in {given['to']}", err=True)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all. UserError when it cannot be."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; choose another file") from None
    finally:
        aside.unlink(missing_ok=True)
