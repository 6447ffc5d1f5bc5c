"""`herd prep conversations`: instruction data of any common format into one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import click

from launch.prep.common import SETTINGS, Verb

if TYPE_CHECKING:
    from data_prep.conversations import Conversation, Tally


@click.command("conversations", cls=Verb, context_settings=SETTINGS)
@click.argument("inputs", nargs=-1, required=True)
@click.option("--output", required=True, metavar="FILE", help="JSON Lines to write, one conversation a line.")
@click.option(
    "--format", "kind", default="auto", show_default=True, metavar="NAME",
    help="messages, sharegpt, alpaca, prompt, or a task of GLUE: qnli, rte, wnli, mrpc, qqp, mnli, sst2, cola.",
)  # fmt: skip
@click.option(
    "--max-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True, metavar="SHARE",
    help="Records that are not understood are left out and logged; above this share nothing is written.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a file of the output's name.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as a JSON object.")
def command(inputs: tuple[str, ...], output: str, kind: str, max_bad: float, overwrite: bool, as_json: bool) -> None:
    """Turn instruction data into one format: JSON Lines of `messages`, each with the place it came from.

    INPUTS are files, folders or globs: JSON Lines, JSON arrays, TSV (.gz, .zst or plain) and Parquet. Their format is
    told from the first records of each file: messages (OpenAI), conversations (ShareGPT), Alpaca, prompt and
    completion, GLUE. Records that are not understood go to FILE.bad with place and reason.

    \b
    herd prep conversations alpaca.json sharegpt/*.jsonl.gz --output data/chat.jsonl
    """
    from pathlib import Path

    from data_prep.conversations import Tally, read_conversations, write_conversations
    from data_prep.conversations.files import SUFFIXES
    from data_prep.conversations.refused import RefusedLog
    from data_prep.errors import UserError
    from data_prep.inputs import expand_inputs
    from launch.prep.progress import byte_progress, stop_at_sigterm

    stop_at_sigterm()
    target = Path(output)
    if target.is_dir():
        raise UserError(f"{output}: is a folder; name the file too, as in {output.rstrip('/')}/chat.jsonl", 2)
    files = expand_inputs(inputs, SUFFIXES)
    if any(path.resolve() == target.resolve() for path in files):
        raise UserError(f"{output}: is one of the inputs; choose another --output", 2)
    if target.exists() and not overwrite:
        raise UserError(f"{output} exists; choose another --output, or --overwrite", 2)
    tally = Tally()
    log = RefusedLog(Path(f"{output}.bad"))
    tally.log = log.add
    try:
        with byte_progress("reading", sum(path.stat().st_size for path in files)) as advance:
            write_conversations(counted(read_conversations(inputs, kind, max_bad, tally), tally, advance), target)
    finally:
        log.close()
    if as_json:
        click.echo(json.dumps(summary(tally, output, log.count and str(log.path)), ensure_ascii=False, indent=2))
        return
    click.echo(f"{output}: {tally.conversations:,} conversations of {tally.records:,} records")
    for line in in_words(tally):
        click.echo(line)
    if log.count:
        click.echo(f"refused records are in {log.path}")


def counted(
    conversations: Iterable[Conversation], tally: Tally, advance: Callable[[int], None]
) -> Iterator[Conversation]:
    """The same conversations, with `advance` told of the bytes they came from."""
    position = 0
    for conversation in conversations:
        if tally.position != position:
            advance(tally.position - position)
            position = tally.position
        yield conversation


def summary(tally: Tally, output: str, log: object) -> dict[str, object]:
    """The tally for a script."""
    return {
        "output": output,
        "records": tally.records,
        "conversations": tally.conversations,
        "bad_records": tally.refused,
        "bad_causes": dict(tally.bad.most_common()),
        "bad_examples": tally.examples,
        "bad_log": log or None,
        "repairs": dict(tally.repairs.most_common()),
        "notes": dict(tally.notes.most_common()),
        "formats": tally.formats,
        "messages": dict(sorted(tally.roles.items())),
        "turns": {str(turns): count for turns, count in sorted(tally.turns.items())},
    }


def in_words(tally: Tally) -> list[str]:
    """The tally for a person."""
    kinds = Counter(tally.formats.values())
    lines = ["formats   " + ", ".join(f"{kind} ({count:,} {_files(count)})" for kind, count in kinds.items())]
    lines.append("messages  " + ", ".join(f"{role} {count:,}" for role, count in tally.roles.most_common()))
    most, top = max(tally.turns.values(), default=1), sorted(tally.turns.items())
    for turns, count in _folded(top):
        bar = "█" * max(1, round(30 * count / most))
        lines.append(f"{turns:>7} messages {count:>11,}  {bar}")
    for title, counts in (("refused", tally.bad), ("mended", tally.repairs), ("odd", tally.notes)):
        for name, count in counts.most_common():
            lines.append(f"{title:<9} {count:,} × {name}")
        if title == "refused":
            lines += [f"          {example}" for example in tally.examples]
    return lines


def _files(count: int) -> str:
    return "file" if count == 1 else "files"


def _folded(turns: list[tuple[int, int]], shown: int = 12) -> list[tuple[str, int]]:
    """The first rows, and all longer conversations in one."""
    rows = [(f"{number}", count) for number, count in turns[:shown]]
    if len(turns) > shown:
        rows.append((f"{turns[shown][0]}–{turns[-1][0]}", sum(count for _, count in turns[shown:])))
    return rows
