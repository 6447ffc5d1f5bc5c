"""`herd prep verify`: a full check of token files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from launch.prep.common import SETTINGS, Verb


@click.command("verify", cls=Verb, context_settings=SETTINGS)
@click.argument("prefix")
@click.option("--tokenizer", metavar="PATH", help="To check ids and text. [default: the one that is noted]")
@click.option("--vocab-size", type=click.IntRange(1), metavar="N", help="Ids must be below N. [default: as noted]")
@click.option("--samples", type=click.IntRange(0), default=8, show_default=True, help="Documents to decode.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads. [default: cores of this job, up to 16]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(
    prefix: str, tokenizer: str | None, vocab_size: int | None, samples: int, workers: int | None, as_json: bool
) -> None:
    """Check all of a token file, or of a folder PREFIX.parts: the index, every id, documents' ends, digests, text.

    What is to hold is taken from PREFIX.meta.json or parts.json; files of others are checked as far as that goes.
    Exits with 0 when all is well, and 1 with each fault on a line of its own.

    \b
    herd prep verify data/corpus
    herd prep verify data/theirs --vocab-size 128256
    """
    from data_prep.parts_file import find_parts, read_parts
    from data_prep.verify import verify
    from launch.prep.progress import byte_progress, default_workers, stop_at_sigterm

    stop_at_sigterm()
    if (folder := find_parts(prefix)) is not None:
        parts = read_parts(folder)
        size = sum(part.tokens for part in parts.parts) * parts.dtype.itemsize
    else:
        data = Path(f"{prefix.removesuffix('.bin').removesuffix('.idx')}.bin")
        size = data.stat().st_size if data.exists() else 0
    with byte_progress("verifying", size) as update:
        report = verify(
            prefix,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            workers=workers or default_workers(),
            samples=samples,
            update=update,
        )
    if as_json:
        click.echo(json.dumps({"ok": report.ok, **asdict(report)}, ensure_ascii=False, indent=2))
    else:
        counts = f"{report.documents:,} documents, {report.sequences:,} sequences, {report.tokens:,} tokens"
        click.echo(f"{report.prefix}: {counts}")
        for mark, lines in (("checked", report.checked), ("skipped", report.skipped), ("FAULT", report.faults)):
            for line in lines:
                click.echo(f"  {mark:<8} {line}", err=mark == "FAULT")
        if (more := report.fault_count - len(report.faults)) > 0:
            click.echo(f"  FAULT    and {more:,} more", err=True)
        click.echo("all is well" if report.ok else f"{report.fault_count:,} faults", err=not report.ok)
    if not report.ok:
        raise click.exceptions.Exit(1)
