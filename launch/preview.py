"""`herd preview`: what a recipe makes the model see, before an hour is spent on it."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}  # data may not steer a terminal


@click.command(short_help="What a recipe's conversations become: tokens, masks, packing.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option(
    "--examples", "shown", type=click.IntRange(0), default=3, show_default=True, help="Examples to show whole."
)
@click.option("--ids", "with_ids", is_flag=True, help="Show token ids too.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="PNG of the lengths to write.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as a JSON object.")
def command(
    recipe: str, overrides: tuple[str, ...], shown: int, with_ids: bool, picture: Path | None, as_json: bool
) -> None:
    """Show what the model will really see of a recipe's conversations, and what an epoch is.

    The first examples that training reads are shown with the trained tokens in green and control tokens reversed; in a
    log trained tokens stand between ⟦ and ⟧. Then lengths, what was cut or left out and where, packing, steps.
    Exit code 1 where training would fail or learn something that nobody wants.

    \b
    herd preview smollm2_chat data.train=alpaca.json train.init_from=SmolLM2-135M
    herd preview smollm2_chat data.train=chats/ data.tokenizer=SmolLM2-135M --json
    """
    from llama.chat.dataset import chat_samples
    from llama.chat.encoded import cache_of, open_encoded, tokenizer_of
    from llama.chat.report import report, segments
    from llama.recipe import load

    resolved = load(recipe, overrides)
    if resolved.chat is None:
        raise UserError(
            f"recipe {resolved.name} has no chat: section, so it trains on token files; look at those with "
            "herd prep inspect PREFIX",
            2,
        )
    tokenizer = tokenizer_of(resolved)
    with tempfile.TemporaryDirectory(prefix="herd-preview-") as aside:
        # What a run or a shared cache holds is used; a preview leaves nothing behind.
        cache = cache_of(resolved) if resolved.chat.cache or cache_of(resolved).is_dir() else Path(aside)
        samples, validation = chat_samples(resolved, opened=partial(open_encoded, cache=cache))
        numbers = report(resolved, tokenizer, samples, validation)
        first = [e for i in range(min(shown, len(samples))) for e in samples.members(i).tolist()][:shown]
        examples = [segments(tokenizer, samples, example) for example in first]
        if as_json:
            click.echo(json.dumps(numbers | {"shown": examples}, ensure_ascii=False, indent=2))
        else:
            show(numbers, examples, with_ids)
        if picture is not None:
            draw(numbers, picture)
            click.echo(f"lengths drawn in {picture}", err=as_json)
    if numbers["largest_id"] >= numbers["vocab_size"] or numbers["double_bos"]:
        raise SystemExit(1)


def show(numbers: dict[str, Any], examples: list[list[dict[str, Any]]], with_ids: bool) -> None:
    """The report for a person; colours on a terminal, marks elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for number, example in enumerate(examples, 1):
        tokens = sum(len(part["ids"]) for part in example)
        trained = sum(len(part["ids"]) for part in example if part["trained"])
        console.print(f"example {number}: {tokens:,} tokens, {trained:,} trained", style="bold")
        console.print(in_colour(example, console.is_terminal, with_ids))
        console.print()
    for line in in_words(numbers):
        console.print(line, markup=False)
    for warning in numbers["warnings"]:
        console.print(f"warning: {warning}", style="bold yellow" if console.is_terminal else "", markup=False)


def in_colour(example: list[dict[str, Any]], colours: bool, with_ids: bool) -> Text:
    """An example's tokens: trained ones green, or between marks where there are no colours."""
    from rich.text import Text

    text, open_mark = Text(), False
    for part in example:
        if not colours and part["trained"] != open_mark:
            text.append("⟦" if part["trained"] else "⟧")
            open_mark = part["trained"]
        style = "green" if part["trained"] else "bright_black"
        text.append(part["text"].translate(VISIBLE), f"{style} reverse" if part["control"] else style)
        if with_ids:
            text.append(f" {part['ids']} ".replace(" ", ""), "dim cyan")
    return text.append("⟧") if open_mark else text


def in_words(n: dict[str, Any]) -> list[str]:
    """The numbers, a line each."""
    lengths, packing, epoch, run = n["lengths"], n["packing"], n["epoch"], n["run"]
    kinds = ", ".join(sorted(set(n["formats"].values())))
    lines = [
        f"files      {', '.join(n['files'][:3])}{' …' if len(n['files']) > 3 else ''} ({kinds})",
        f"template   {n['template']}, loss on {'all answers' if n['loss'] == 'all' else 'the last answer'}",
        f"records    {n['records']:,}; {n['conversations']:,} conversations kept, {n['duplicates']:,} of them duplicates",
        f"examples   {n['examples']:,} to train on, {n['held_out_examples']:,} held out",
    ]
    for cause, count in n["unreadable"].items():
        lines.append(f"unreadable {count:,} × {cause}")
    lines += [f"           {place}" for place in n["unreadable_first"]]
    for what, count in n["left_out_or_cut"].items():
        lines.append(f"cut        {count:,} × {what} (first: {n['left_out_or_cut_first'][what]})")
    for what, count in n["odd"].items():
        lines.append(f"odd        {count:,} × {what}")
    lines.append(
        f"lengths    {lengths['shortest']:,} to {lengths['longest']:,} tokens, mean {lengths['mean']:,}, "
        f"median {lengths['median']:,}, 99 % up to {lengths['p99']:,}"
    )
    most = max(count for _, _, count in lengths["histogram"]) or 1
    for low, high, count in lengths["histogram"]:
        lines.append(f"{low:>9,}–{high:<8,}{count:>9,}  {'█' * -(-30 * count // most)}")
    share = n["trained_share"]
    lines += [
        f"trained    {share['all']:.1%} of all tokens; of one example {share['lowest']:.1%} to {share['highest']:.1%}",
        f"packing    {packing['sequences']:,} sequences of {packing['seq_length']:,}, {packing['fill']:.2%} filled "
        f"({packing['padded_would_fill']:.1%} if padded), {packing['examples_a_sequence']:,} examples in each",
        f"epoch      {epoch['steps']:,} steps, {epoch['tokens']:,} tokens, {epoch['trained_tokens']:,} of them trained",
        f"run        {run['steps']:,} steps are {run['epochs']:,} epochs",
        "special    " + (", ".join(f"{name} {count:,}" for name, count in n["special_tokens"].items()) or "none"),
        f"ids        up to {n['largest_id']:,} of {n['vocab_size']:,}; {n['double_bos']:,} with BOS twice",
    ]
    return lines


def draw(numbers: dict[str, Any], path: Path) -> None:
    """The lengths as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    rows = numbers["lengths"]["histogram"]
    axes.bar(
        [low for low, _, _ in rows], [n for *_, n in rows], [high - low + 1 for low, high, _ in rows], align="edge"
    )
    axes.set(xlabel="tokens of an example", ylabel="examples", xlim=(0, None))
    packing = numbers["packing"]
    axes.set_title(
        f"{numbers['examples']:,} examples in {packing['sequences']:,} sequences of {packing['seq_length']:,}, "
        f"{packing['fill']:.1%} filled",
        fontsize=10,
    )
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            canvas.print_png(file)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another --picture") from error
