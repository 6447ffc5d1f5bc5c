"""`herd prep tokenize`: text in, token files out."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from data_prep.errors import UserError
from launch.prep.common import SETTINGS, Verb
from launch.prep.filters import filter_options

if TYPE_CHECKING:
    from data_prep.filters import Filters

SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Bytes(click.ParamType):
    """A number of bytes such as 512M."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+)([KMG]?)i?B?", str(value), re.I)
        if not found or not int(found[1]):
            self.fail(f"{value!r} is no size; write it as 67108864 or 64M", param, ctx)
        return int(found[1]) * SIZES[found[2].upper()]


@click.command("tokenize", cls=Verb, context_settings=SETTINGS)
@click.argument("inputs", nargs=-1)
@click.option("--input", "more_inputs", multiple=True, metavar="PATH", help="The same as INPUTS (Megatron's name).")
@click.option(
    "--tokenizer", "--tokenizer-model", "tokenizer", required=True, metavar="PATH",
    help="SentencePiece or Llama-3 tokenizer.model, Hugging Face tokenizer.json, or a folder with one.",
)  # fmt: skip
@click.option(
    "--output", "--output-prefix", "prefix", required=True, metavar="PREFIX",
    help="Writes PREFIX.bin, PREFIX.idx and PREFIX.meta.json; PREFIX.rejected.jsonl where lines are bad.",
)  # fmt: skip
@click.option(
    "--key", "--json-keys", "key", metavar="NAME", help="Where a record's text is. [default: text or content, found]"
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes. [default: all cores of this job]")
@click.option(
    "--append-eod/--no-eod", default=True, help="End each document with the end-of-text id. [default: append-eod]"
)
@click.option("--prepend-bos/--no-bos", default=False, help="Begin each document with the begin-of-text id.")
@click.option(
    "--parse-special", is_flag=True,
    help="Control tokens spelled in the text, such as <|eot_id|>, become control ids. Not for text of strangers.",
)  # fmt: skip
@click.option(
    "--text-documents", type=click.Choice(["file", "line"]), default="file", show_default=True,
    help="What a document is in a .txt file.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["auto", "official", "fastokens", "gigatoken"]), default="auto", show_default=True,
    help="What encodes: auto takes the fastest whose ids are the official tokenizer's on a sample of this text, and "
    "goes on checking a share of it.",
)  # fmt: skip
@click.option(
    "--max-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True, metavar="SHARE",
    help="Bad lines are skipped, counted, logged; above this share of all lines nothing is written.",
)  # fmt: skip
@click.option("--max-line", type=Bytes(), default="64M", show_default=True, help="A longer line is bad.")
@click.option("--allow-damaged", is_flag=True, help="Take what can be read of packed files that end too early.")
@click.option("--part-size", type=Bytes(), help="Input of one part, the most that a kill costs. [default: 32M to 256M]")
@click.option(
    "--task", metavar="I/N", help="Work as node I (from 0) of N on the same output. [default: from a Slurm array]"
)
@click.option("--merge/--no-merge", default=None, help="Join the parts. [default: yes, unless nodes work together]")
@click.option("--keep-parts", is_flag=True, help="Keep PREFIX.parts though it was merged.")
@filter_options
@click.option("--overwrite", is_flag=True, help="Replace files of the output's name.")
@click.option("--json", "as_json", is_flag=True, help="Print PREFIX.meta.json on stdout.")
def command(
    inputs: tuple[str, ...],
    more_inputs: tuple[str, ...],
    tokenizer: str,
    prefix: str,
    key: str | None,
    workers: int | None,
    append_eod: bool,
    prepend_bos: bool,
    parse_special: bool,
    text_documents: str,
    engine: str,
    max_bad: float,
    max_line: int,
    allow_damaged: bool,
    part_size: int | None,
    task: str | None,
    merge: bool | None,
    keep_parts: bool,
    filters: Filters,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn JSON Lines, Parquet or text files (plain, .gz, .zst) into a Megatron token file.

    INPUTS are files, folders or globs. Records are objects with the text under "text" or "content". The output is the
    same for any number of workers and nodes. Work goes on where it was stopped when the same command is given again.

    \b
    herd prep tokenize corpus.jsonl.gz --tokenizer tokenizer.model --output data/corpus
    herd prep tokenize 'shards/*.jsonl.zst' --tokenizer ./Llama-3.2-1B --output data/corpus --key body --workers 16
    sbatch --array 0-3 slurm/prep.slurm tokenize shards --tokenizer ./Llama-3.2-1B --output data/corpus
    """
    if not inputs and not more_inputs:
        raise click.UsageError("no INPUTS; name JSONL, Parquet or text files, folders or globs")
    from data_prep.readers import Reading
    from data_prep.tokenize import Options
    from data_prep.tokenize import tokenize as run

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # unwinds as Ctrl-C does

    signal.signal(signal.SIGTERM, stop)
    node = _task(task)
    together = node[1] > 1
    options = Options(
        reading=Reading(key, text_documents, max_line, filters if filters.active else None),
        append_eod=append_eod,
        prepend_bos=prepend_bos,
        parse_special=parse_special,
        engine=engine,
        workers=workers,
        max_bad=max_bad,
        allow_damaged=allow_damaged,
        part_bytes=part_size,
        task=node,
        merge=not together if merge is None else merge,
        keep_parts=keep_parts,
        overwrite=overwrite,
        progress=True,
    )
    start = time.monotonic()
    try:
        meta = run([*inputs, *more_inputs], tokenizer, prefix, options)
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"stopped; what is done is in {prefix}.parts, and the same command goes on from there", err=True)
        raise
    seconds = max(1e-9, time.monotonic() - start)
    _tell_losses(meta, prefix)
    if as_json:
        click.echo(json.dumps(meta, ensure_ascii=False, indent=2))
        return
    written = f"{prefix}.bin, .idx" if options.merge else f"{prefix}.parts"
    click.echo(
        f"{written}: {meta['documents']:,} documents, {meta['tokens']:,} tokens ({meta['dtype']}),"
        f" {meta['text_bytes'] / 1e6:,.1f} MB in {seconds:.1f} s ({meta['text_bytes'] / 1e6 / seconds:.1f} MB/s)"
    )


def _task(given: str | None) -> tuple[int, int]:
    """(this node's number from 0, number of nodes), as given or from the Slurm array this runs in."""
    if given is None:
        count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1") or 1)
        number = (int(os.environ.get("SLURM_ARRAY_TASK_ID", first)) - first) // step
        return number % count, count
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--task {given}: write I/N with I from 0 to N-1, as in 0/4", 2)
    return int(found[1]), int(found[2])


def _tell_losses(meta: dict[str, Any], prefix: str) -> None:
    """What was left out or mended, on stderr."""
    if meta["bad_lines"]:
        causes = ", ".join(f"{count:,} × {cause}" for cause, count in meta["bad_causes"].items())
        click.echo(f"{meta['bad_lines']:,} of {meta['lines']:,} lines were bad and left out: {causes}", err=True)
        for example in meta["bad_examples"]:
            click.echo(f"  {example}", err=True)
    if meta["filtered"]:
        causes = ", ".join(f"{count:,} × {cause}" for cause, count in meta["filtered"].items())
        click.echo(f"{sum(meta['filtered'].values()):,} documents were filtered out: {causes}", err=True)
    if meta["repaired_documents"]:
        click.echo(f"{meta['repaired_documents']:,} documents were mended and kept", err=True)
    for path, why in meta["damaged"].items():
        click.echo(f"  {path}: {why}; the rest of it is lost", err=True)
    if meta["bad_lines"] or meta["repaired_documents"]:
        click.echo(f"each is in {prefix}.rejected.jsonl", err=True)
