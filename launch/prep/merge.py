"""`herd prep merge`: many token files, or the parts of one, into one."""

from __future__ import annotations

import json
import time

import click

from launch.prep.common import SETTINGS, Verb


@click.command("merge", cls=Verb, context_settings=SETTINGS)
@click.argument("inputs", nargs=-1)
@click.option("--input", "more_inputs", multiple=True, metavar="DIR", help="The same as INPUTS (Megatron's name).")
@click.option("--output", "--output-prefix", "output", metavar="PREFIX", help="Writes PREFIX.bin, .idx, .meta.json.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads. [default: cores of this job, up to 16]")
@click.option("--force", is_flag=True, help="Merge even where tokenizers differ, or some are not known.")
@click.option("--overwrite", is_flag=True, help="Replace files of the output's name.")
@click.option("--json", "as_json", is_flag=True, help="Print PREFIX.meta.json on stdout.")
def command(
    inputs: tuple[str, ...],
    more_inputs: tuple[str, ...],
    output: str | None,
    workers: int | None,
    force: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge token files into one, in the order given; the inputs are only read.

    INPUTS are prefixes (PREFIX.bin, PREFIX.idx), folders of such pairs (by name, as Megatron's merge_datasets.py takes
    them), globs, and folders PREFIX.parts of herd prep tokenize, whose output is PREFIX unless another is given.
    Indices are checked before anything is copied, and a set with recorded digests is held to them.

    \b
    herd prep merge data/code data/web data/books --output data/all
    herd prep merge data/corpus.parts
    herd prep merge --input shards/ --output-prefix data/all
    """
    if not inputs and not more_inputs:
        raise click.UsageError("no INPUTS; name token files, a folder that holds some, or PREFIX.parts")
    from data_prep.merge import Sets
    from data_prep.sets import expand_sets
    from launch.prep.progress import byte_progress, default_workers, stop_at_sigterm

    stop_at_sigterm()
    threads, start = workers or default_workers(), time.monotonic()
    sets = Sets(expand_sets([*inputs, *more_inputs]), threads, force)
    output = output or sets.own_name
    if output is None:
        raise click.UsageError("no --output; name what to write")
    with byte_progress("merging", sets.data_bytes) as update:
        meta = sets.write(output, workers=threads, overwrite=overwrite, update=update)
    seconds = max(1e-9, time.monotonic() - start)
    if as_json:
        click.echo(json.dumps(meta, ensure_ascii=False, indent=2))
        return
    if sets.unknown and "tokenizer" not in meta:
        click.echo(f"{sets.unknown[0]} has no .meta.json: the tokenizer of {output} is not noted", err=True)
    click.echo(
        f"{output}.bin, .idx: {meta['documents']:,} documents, {meta['tokens']:,} tokens ({meta['dtype']}) of "
        f"{len(sets.placed):,} sets, {meta['bin_bytes'] / 1e6:,.1f} MB in {seconds:.1f} s "
        f"({meta['bin_bytes'] / 1e6 / seconds:,.0f} MB/s)"
    )
