"""`herd prep inspect`: what a token file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from launch.prep.common import SETTINGS, Verb


@click.command("inspect", cls=Verb, context_settings=SETTINGS)
@click.argument("prefix")
@click.option("--tokenizer", metavar="PATH", help="To show text. [default: the one that PREFIX.meta.json names]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(prefix: str, tokenizer: str | None, as_json: bool) -> None:
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
