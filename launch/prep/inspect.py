"""`herd prep inspect`: what a token file holds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.errors import UserError
from launch.prep.common import SETTINGS, Verb

if TYPE_CHECKING:
    from data_prep.indexed import IndexedDataset
    from data_prep.tokenizers import Tokenizer

NOTED = (
    "tokenizer", "tokenizer_sha256", "tokenizer_kind", "vocab_size", "eod", "append_eod", "text_bytes", "bad_lines",
    "herd_version",
)  # fmt: skip


@click.command("inspect", cls=Verb, context_settings=SETTINGS)
@click.argument("prefix")
@click.option("--tokenizer", metavar="PATH", help="To show text. [default: the one that is noted]")
@click.option("--samples", type=click.IntRange(0), default=0, metavar="N", help="Show N documents from all over it.")
@click.option("--seed", default=0, show_default=True, help="Which documents --samples takes.")
@click.option("--document", "documents", type=click.IntRange(0), multiple=True, metavar="J", help="Show document J.")
@click.option("--tokens", type=click.IntRange(1), default=256, show_default=True, help="Of each document, at most.")
@click.option("--picture", type=click.Path(dir_okay=False), metavar="FILE", help="Draw the lengths: .png, .svg, .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(
    prefix: str,
    tokenizer: str | None,
    samples: int,
    seed: int,
    documents: tuple[int, ...],
    tokens: int,
    picture: str | None,
    as_json: bool,
) -> None:
    """Show what a token file holds: type, counts, lengths and, where the tokenizer is known, text.

    PREFIX may be any Megatron token file's, ours or not, or a folder PREFIX.parts; PREFIX.bin and PREFIX.idx are taken
    too.

    \b
    herd prep inspect data/corpus
    herd prep inspect data/corpus --samples 3 --document 17 --picture lengths.png
    """
    from data_prep.joined import open_tokens
    from data_prep.parts_file import read_meta
    from data_prep.survey import bars, draw, survey_lengths

    prefix = prefix.removesuffix(".bin").removesuffix(".idx")
    data, meta = open_tokens(prefix), read_meta(prefix)
    lengths = survey_lengths(data.lengths)
    facts = _facts(prefix, data, meta)
    if lengths.count:
        facts["length"] = lengths.facts()
        facts["histogram"] = [dict(zip(("from", "to", "sequences"), row, strict=True)) for row in lengths.bins()]
        facts["first_ids"] = data.get(0, 0, min(32, int(data.lengths[0]))).tolist()
    decoder = _decoder(tokenizer, meta)
    if lengths.count and decoder is not None:
        try:
            facts["first_text"] = decoder.decode(data.get(0, 0, min(tokens, int(data.lengths[0]))).tolist())
        except UserError as error:
            facts["warning"] = str(error)
    chosen = _chosen(len(data.documents) - 1, documents, samples, seed)
    shown = [_sample(data, number, tokens, decoder) for number in chosen]
    if shown:
        facts["samples"] = shown
    if picture is not None:
        try:
            draw(lengths, picture, Path(prefix).name)
        except (OSError, ValueError) as error:
            raise UserError(f"{picture} cannot be drawn: {error}; name a .png in a folder that exists", 2) from error
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    for name in ("histogram", "samples"):
        facts.pop(name, None)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:,}"
        elif name == "first_text":
            value = repr(value)  # control characters of a stranger's text stay off the terminal
        click.echo(f"{name:<17} {value}")
    for line in bars(lengths):
        click.echo(line)
    for sample in shown:
        click.echo(f"\ndocument {sample['document']:,}, {sample['tokens']:,} tokens")
        click.echo(f"  {sample['text']!r}" if "text" in sample else f"  {sample['ids']}")


def _facts(prefix: str, data: IndexedDataset, meta: dict[str, Any] | None) -> dict[str, Any]:
    """What the header tells and what is noted."""
    from data_prep.joined import Joined

    facts: dict[str, Any] = {
        "prefix": prefix,
        "dtype": str(data.dtype),
        "documents": len(data.documents) - 1,
        "sequences": len(data),
        "tokens": data.tokens,
        "bin_bytes": data.tokens * data.dtype.itemsize,
        "fingerprint": data.fingerprint,
    }
    if isinstance(data, Joined):
        facts["parts"] = len(data.parts.parts)
    if meta:
        facts |= {name: meta[name] for name in NOTED if meta.get(name) is not None}
        if isinstance(size := meta.get("text_bytes"), int) and data.tokens:
            facts["bytes_per_token"] = round(size / data.tokens, 3)
        if any(name in meta and meta[name] != facts[name] for name in ("documents", "tokens")):
            facts["warning"] = f"{prefix}.meta.json counts {meta.get('documents')} documents: it is of other files"
    return facts


def _decoder(given: str | None, meta: dict[str, Any] | None) -> Tokenizer | None:
    from data_prep.tokenizers import load_tokenizer

    path = given or (meta or {}).get("tokenizer")
    return load_tokenizer(path) if path and (given or Path(path).exists()) else None


def _chosen(count: int, documents: tuple[int, ...], samples: int, seed: int) -> list[int]:
    """Document numbers that were asked for, then the sampled ones, rising."""
    for number in documents:
        if number >= count:
            raise UserError(f"--document {number}: there are {count:,} documents, from 0", 2)
    return [*documents, *sorted(random.Random(seed).sample(range(count), min(samples, count)))]


def _sample(data: IndexedDataset, number: int, limit: int, decoder: Tokenizer | None) -> dict[str, Any]:
    ids = data.document(number, limit).tolist()
    first, last = int(data.documents[number]), int(data.documents[number + 1])
    size = int(data.lengths[first:last].sum(dtype="int64"))
    return {"document": number, "tokens": size, **({"ids": ids} if decoder is None else {"text": decoder.decode(ids)})}
