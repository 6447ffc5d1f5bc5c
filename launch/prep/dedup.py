"""`herd prep dedup`: duplicates, and what a user's filters leave out, taken from JSON Lines."""

from __future__ import annotations

import json
import os
import signal
import time
from types import FrameType
from typing import Any

import click

from launch.prep.common import SETTINGS, Verb
from launch.prep.filters import filter_options

STAGES = ("signatures", "candidates", "shingles", "verify", "write")


def _share(value: str | None) -> tuple[int, int]:
    """--task I/N, or Slurm's numbers of an array job; (0, 1) is all of a stage."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
    if value is None:
        try:
            task, least, count = (int(os.environ[name]) for name in names)
        except (KeyError, ValueError):
            return 0, 1
        return task - least, count
    first, _, second = value.partition("/")
    try:
        share = int(first), int(second)
    except ValueError:
        share = (1, 0)
    if not 0 <= share[0] < share[1]:
        raise click.UsageError(f"--task {value}: write I/N with I from 0 to N - 1, as 0/8")
    return share


@click.command("dedup", cls=Verb, context_settings=SETTINGS)
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--output", required=True, metavar="DIR", help="Gets a file for each input, and the accounts. Made if need be."
)
@click.option("--key", metavar="NAME", help="Where a record's text is. [default: text or content, found]")
@click.option("--exact-only", is_flag=True, help="Equal texts only, no near duplicates.")
@click.option(
    "--exact", type=click.Choice(("text", "tokens")), default="text", show_default=True,
    help="What makes texts equal: every character, or all but case, punctuation and the length of spaces.",
)  # fmt: skip
@click.option(
    "--threshold", type=click.FloatRange(0.05, 1), default=0.7, show_default=True, metavar="J",
    help="Jaccard similarity from which the later document goes.",
)  # fmt: skip
@click.option("--ngram", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Tokens of a shingle.")
@click.option(
    "--unit", type=click.Choice(("auto", "word", "char")), default="auto", show_default=True,
    help="Tokens: words; characters; or (auto) words, but characters in Han, kana, Thai, Lao, Khmer and Burmese.",
)  # fmt: skip
@click.option("--bands", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="Bands of LSH.")
@click.option("--rows", type=click.IntRange(1), default=6, show_default=True, metavar="N", help="Rows of a band.")
@click.option(
    "--recall", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="P",
    help="Choose bands and rows so that a pair exactly at the threshold is found with this probability.",
)  # fmt: skip
@click.option(
    "--max-bucket", type=click.IntRange(1), default=200, show_default=True, metavar="N",
    help="Documents that stay which one bucket remembers, so that pages of one template cost no square.",
)  # fmt: skip
@filter_options
@click.option("--log-filtered", is_flag=True, help="List what the filters leave out in DIR/filtered.jsonl.")
@click.option(
    "--max-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True, metavar="SHARE",
    help="Bad lines are left out, counted and listed; above this share of all lines nothing is written.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes. [default: all cores of this job]")
@click.option("--stage", type=click.Choice(STAGES), help="Do only this step; for Slurm arrays, see above.")
@click.option("--task", metavar="I/N", help="With --stage: part I of N, from 0. [default: the Slurm array's numbers]")
@click.option("--keep-work", is_flag=True, help="Keep DIR/.work, so that another --threshold costs little.")
@click.option("--json", "as_json", is_flag=True, help="Print DIR/report.json on stdout.")
def command(
    inputs: tuple[str, ...],
    output: str,
    exact_only: bool,
    workers: int | None,
    stage: str | None,
    task: str | None,
    keep_work: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Take duplicates out of JSON Lines (plain, .gz, .zst).

    INPUTS are files, folders or globs. DIR gets a file of the same name and packing for each, with the lines that stay,
    byte for byte; report.json (counts), removed.jsonl (each with the document it went for), bad.jsonl (lines that are
    no documents) and examples.md (pairs side by side).

    Documents stand in the order of sorted paths and lines; the first stays. Equal texts go first. Then one goes if and
    only if its exact Jaccard similarity with an earlier document that stays and shares a MinHash band with it is at
    least --threshold (a bucket remembers --max-bucket of these). The result is the same for any number of workers.
    Called again after a kill with the same settings, it goes on from the last finished part; DIR/.work holds these
    until all is done.

    \b
    herd prep dedup 'raw/*.jsonl.zst' --output clean
    herd prep dedup raw --output clean --threshold 0.8 --language en --min-chars 200 --gopher
    \b
    On Slurm, each step after the one before it; signatures, shingles and write take any number of nodes:
    D="herd prep dedup /shared/raw --output /shared/clean"
    A=$(sbatch --parsable --array 0-15 --wrap "$D --stage signatures")
    B=$(sbatch --parsable -d afterok:$A --wrap "$D --stage candidates")
    C=$(sbatch --parsable -d afterok:$B --array 0-15 --wrap "$D --stage shingles")
    E=$(sbatch --parsable -d afterok:$C --wrap "$D --stage verify")
    sbatch -d afterok:$E --array 0-15 --wrap "$D --stage write"
    """
    if task and not stage:
        raise click.UsageError("--task is for --stage; without one all is done here")
    share = _share(task) if stage else (0, 1)
    from data_prep.dedup import Settings, dedup

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # unwinds as Ctrl-C does, so that worker processes end too

    signal.signal(signal.SIGTERM, stop)
    start = time.monotonic()
    report = dedup(
        inputs,
        output,
        Settings(near=not exact_only, **settings),
        workers=workers,
        stage=stage,
        share=share,
        keep_work=keep_work,
        progress=True,
    )
    seconds = max(1e-9, time.monotonic() - start)
    if report is None:
        click.echo(f"{output}: {stage} done in {seconds:.1f} s", err=True)
        return
    if report["bad"]:
        causes = ", ".join(f"{count:,} × {cause}" for cause, count in report["bad_causes"].items())
        click.echo(f"{report['bad']:,} of {report['lines']:,} lines were bad and left out: {causes}", err=True)
        for example in report["bad_examples"]:
            click.echo(f"  {example}", err=True)
    if report["filtered"]:
        causes = ", ".join(f"{count:,} × {cause}" for cause, count in report["filtered_causes"].items())
        click.echo(f"{report['filtered']:,} documents were filtered: {causes}", err=True)
    if report["documents_in_full_buckets"]:
        click.echo(
            f"{report['documents_in_full_buckets']:,} documents met full buckets (--max-bucket {settings['max_bucket']})",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    click.echo(
        f"{output}: {report['kept']:,} of {report['documents']:,} documents stay; {report['exact_removed']:,} exact and"
        f" {report['near_removed']:,} near duplicates went ({report['near_clusters']:,} clusters);"
        f" {report['bytes_out'] / 1e6:,.1f} of {report['bytes_in'] / 1e6:,.1f} MB; {seconds:.2f} s"
    )
