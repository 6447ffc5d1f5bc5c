"""`herd prep demo-text`: the embedded demo's text and tokenizer."""

from __future__ import annotations

from pathlib import Path

import click

from launch.prep.common import SETTINGS, Verb


@click.command("demo-text", cls=Verb, context_settings=SETTINGS)
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--megabytes", type=click.FloatRange(0.1, 30), default=6.0, show_default=True, help="How much text.")
@click.option(
    "--vocab-size", type=click.IntRange(512), default=4096, show_default=True, help="Pieces of the tokenizer."
)
def command(directory: str, megabytes: float, vocab_size: int) -> None:
    """Write real text and a tokenizer trained on it, with nothing downloaded: Python's reference, docs and source.

    \b
    herd prep demo-text data/demo
    herd prep tokenize data/demo/text.jsonl --tokenizer data/demo --output data/demo/corpus
    """
    from data_prep.demo_text import train_tokenizer, write_demo_text

    text = write_demo_text(directory, megabytes)
    model = train_tokenizer(text, Path(directory) / "tokenizer.model", vocab_size)
    click.echo(f"{text}: {text.stat().st_size / 1e6:.1f} MB of text\n{model}: {vocab_size:,} pieces")
