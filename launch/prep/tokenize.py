"""`herd prep tokenize`: text in, token files out."""

from __future__ import annotations

import json
import signal
import time
from types import FrameType

import click

from launch.prep.common import SETTINGS, Verb


@click.command("tokenize", cls=Verb, context_settings=SETTINGS)
@click.argument("inputs", nargs=-1)
@click.option("--input", "more_inputs", multiple=True, metavar="PATH", help="The same as INPUTS (Megatron's name).")
@click.option(
    "--tokenizer", "--tokenizer-model", "tokenizer", required=True, metavar="PATH",
    help="SentencePiece or Llama-3 tokenizer.model, Hugging Face tokenizer.json, or a folder with one.",
)  # fmt: skip
@click.option(
    "--output", "--output-prefix", "prefix", required=True, metavar="PREFIX",
    help="Writes PREFIX.bin, PREFIX.idx and PREFIX.meta.json.",
)  # fmt: skip
@click.option(
    "--key", "--json-keys", "key", metavar="NAME", help="Where a record's text is. [default: text or content, found]"
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes. [default: all cores of this job]")
@click.option(
    "--append-eod/--no-eod", default=True, help="End each document with the end-of-text id. [default: append-eod]"
)
@click.option(
    "--max-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True, metavar="SHARE",
    help="Bad lines are skipped, counted and shown; above this share of all lines nothing is written.",
)  # fmt: skip
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
    max_bad: float,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn JSON Lines (plain, .gz, .zst) into a Megatron token file.

    INPUTS are files, folders or globs. Records are objects with the text under "text" or "content"; the output is the
    same for any number of workers.

    \b
    herd prep tokenize corpus.jsonl.gz --tokenizer tokenizer.model --output data/corpus
    herd prep tokenize 'shards/*.jsonl.zst' --tokenizer ./Llama-3.2-1B --output data/corpus --key body --workers 16
    """
    if not inputs and not more_inputs:
        raise click.UsageError("no INPUTS; name JSONL files, folders or globs")
    from data_prep.tokenize import tokenize as run

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # unwinds as Ctrl-C does, so that nothing half-written stays

    signal.signal(signal.SIGTERM, stop)
    start = time.monotonic()
    meta = run(
        [*inputs, *more_inputs],
        tokenizer,
        prefix,
        key=key,
        append_eod=append_eod,
        workers=workers,
        max_bad=max_bad,
        overwrite=overwrite,
        progress=True,
    )
    seconds = max(1e-9, time.monotonic() - start)
    if meta["bad_lines"]:
        causes = ", ".join(f"{count:,} × {cause}" for cause, count in meta["bad_causes"].items())
        click.echo(f"{meta['bad_lines']:,} of {meta['lines']:,} lines were bad and left out: {causes}", err=True)
        for example in meta["bad_examples"]:
            click.echo(f"  {example}", err=True)
    if meta["repaired_documents"]:
        click.echo(f"{meta['repaired_documents']:,} documents held half characters, now U+FFFD", err=True)
    if as_json:
        click.echo(json.dumps(meta, ensure_ascii=False, indent=2))
    else:
        click.echo(
            f"{prefix}.bin, .idx: {meta['documents']:,} documents, {meta['tokens']:,} tokens ({meta['dtype']}),"
            f" {meta['text_bytes'] / 1e6:,.1f} MB in {seconds:.1f} s ({meta['text_bytes'] / 1e6 / seconds:.1f} MB/s)"
        )
