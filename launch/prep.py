"""`herd prep`: text in, token files out; look into token files; write the embedded demo's text."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import click

from data_prep.errors import UserError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class _Command(click.Command):
    """A verb whose UserError is one line and an exit code, whoever calls it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"herd: {error}", err=True)
            ctx.exit(error.code)


@click.group(name="prep", context_settings=SETTINGS)
def command() -> None:
    """Text in, token files out.

    \b
    herd prep tokenize corpus.jsonl.gz --tokenizer tokenizer.model --output data/corpus
    """


@command.command(cls=_Command, context_settings=SETTINGS)
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
def tokenize(
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


@command.command(cls=_Command, context_settings=SETTINGS)
@click.argument("prefix")
@click.option("--tokenizer", metavar="PATH", help="To show text. [default: the one that PREFIX.meta.json names]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def inspect(prefix: str, tokenizer: str | None, as_json: bool) -> None:
    """Show what a token file holds: type, counts, lengths and, where the tokenizer is known, the first text.

    PREFIX may be any Megatron token file's, ours or not; PREFIX.bin and PREFIX.idx are taken too.

    \b
    herd prep inspect data/corpus
    """
    import numpy as np

    from data_prep import tokenizers
    from data_prep.indexed import IndexedDataset
    from data_prep.tokenize import read_meta

    prefix = prefix.removesuffix(".bin").removesuffix(".idx")
    data, meta = IndexedDataset(prefix), read_meta(prefix)
    lengths = data.lengths
    facts: dict[str, Any] = {
        "prefix": prefix,
        "dtype": str(data.dtype),
        "documents": len(data.documents) - 1,
        "sequences": len(data),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "fingerprint": data.fingerprint,
    }
    if len(lengths):
        quartiles = (int(x) for x in np.percentile(lengths, (25, 50, 75)))
        facts["length"] = {
            "min": int(lengths.min()),
            "mean": round(float(lengths.mean()), 1),
            **dict(zip(("p25", "median", "p75"), quartiles, strict=True)),
            "max": int(lengths.max()),
        }
        facts["first_ids"] = data[0][:32].tolist()
    if meta:
        names = ("tokenizer", "tokenizer_sha256", "tokenizer_kind", "vocab_size", "eod", "bad_lines", "herd_version")
        facts |= {name: meta.get(name) for name in names}
        if any(meta.get(name) != facts[name] for name in ("documents", "tokens")):
            facts["warning"] = f"{prefix}.meta.json counts {meta.get('documents')} documents: it is of other files"
    path = tokenizer or (meta or {}).get("tokenizer")
    if len(lengths) and path and (tokenizer or Path(path).exists()):
        facts["first_text"] = tokenizers.load_tokenizer(path).decode(data[0][:256].tolist())
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items())
        elif isinstance(value, int):
            value = f"{value:,}"
        elif name == "first_text":
            value = repr(value)  # control characters of a stranger's text stay off the terminal
        click.echo(f"{name:<17} {value}")


@command.command("demo-text", cls=_Command, context_settings=SETTINGS)
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--megabytes", type=click.FloatRange(0.1, 30), default=6.0, show_default=True, help="How much text.")
@click.option(
    "--vocab-size", type=click.IntRange(512), default=4096, show_default=True, help="Pieces of the tokenizer."
)
def demo_text(directory: str, megabytes: float, vocab_size: int) -> None:
    """Write real text and a tokenizer trained on it, with nothing downloaded: Python's reference, docs and source.

    \b
    herd prep demo-text data/demo
    herd prep tokenize data/demo/text.jsonl --tokenizer data/demo --output data/demo/corpus
    """
    from data_prep.demo_text import train_tokenizer, write_demo_text

    text = write_demo_text(directory, megabytes)
    model = train_tokenizer(text, Path(directory) / "tokenizer.model", vocab_size)
    click.echo(f"{text}: {text.stat().st_size / 1e6:.1f} MB of text\n{model}: {vocab_size:,} pieces")
