"""`herd prep split`: one token file into several, by whole documents."""

from __future__ import annotations

import json
import time

import click

from launch.prep.common import SETTINGS, Verb


@click.command("split", cls=Verb, context_settings=SETTINGS)
@click.argument("prefix")
@click.option("--shares", metavar="98,1,1", help="Shares of the documents, in any unit.")
@click.option("--parts", type=click.IntRange(1, 1000), metavar="N", help="In place of shares: N of equal tokens.")
@click.option("--names", metavar="A,B", help="What comes behind OUTPUT-. [default: train,valid,test; 0000, 0001, …]")
@click.option("--output", "--output-prefix", "output", required=True, metavar="OUTPUT", help="Writes OUTPUT-NAME.bin …")
@click.option("--shuffle", "seed", type=int, metavar="SEED", help="Spread documents by a hash, not in runs.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads. [default: cores of this job, up to 16]")
@click.option("--overwrite", is_flag=True, help="Replace files of the outputs' names.")
@click.option("--json", "as_json", is_flag=True, help="Print the outputs' meta.json on stdout.")
def command(
    prefix: str,
    shares: str | None,
    parts: int | None,
    names: str | None,
    output: str,
    seed: int | None,
    workers: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Split a token file, or a folder PREFIX.parts, by whole documents; the input is only read.

    Shares are runs of documents, the first ones for the first share, as Megatron's --split takes them. With --shuffle a
    hash of its number says where a document goes: shares then hold on average, and order is kept inside each output.

    \b
    herd prep split data/corpus --shares 98,1,1 --output data/corpus
    herd prep split data/corpus --parts 8 --output data/piece
    """
    if (shares is None) == (parts is None):
        raise click.UsageError("give either --shares or --parts")
    try:
        amounts = None if shares is None else [float(share) for share in shares.replace("/", ",").split(",")]
    except ValueError:
        raise click.UsageError(f'--shares {shares} is not a list of numbers such as "98,1,1"') from None
    count = parts or len(amounts or [])
    if names is None:
        names = ",".join(("train", "valid", "test")[:count] if parts is None else [f"{k:04d}" for k in range(count)])
    chosen = names.split(",")
    if len(chosen) != count or not all(chosen):
        raise click.UsageError(f"--names {names} are not {count}; give one for each output")
    from data_prep.joined import open_tokens
    from data_prep.split import split
    from launch.prep.progress import byte_progress, default_workers, stop_at_sigterm

    stop_at_sigterm()
    start = time.monotonic()
    prefix = prefix.removesuffix(".bin").removesuffix(".idx")
    data = open_tokens(prefix)
    outputs = [f"{output}-{name}" for name in chosen]
    with byte_progress("splitting", data.tokens * data.dtype.itemsize) as update:
        metas = split(
            prefix,
            outputs,
            shares=amounts,
            seed=seed,
            workers=workers or default_workers(),
            overwrite=overwrite,
            update=update,
        )
    if as_json:
        click.echo(json.dumps(dict(zip(outputs, metas, strict=True)), ensure_ascii=False, indent=2))
        return
    for name, meta in zip(outputs, metas, strict=True):
        share = meta["tokens"] / max(1, data.tokens)
        click.echo(f"{name}.bin, .idx: {meta['documents']:,} documents, {meta['tokens']:,} tokens ({share:.2%})")
    click.echo(f"{data.tokens:,} tokens in {time.monotonic() - start:.1f} s")
