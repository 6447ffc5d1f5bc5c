"""`herd prep`: one verb a module, imported only when it is called."""

from __future__ import annotations

import importlib

import click

from launch.prep.common import SETTINGS

# verb -> module below launch.prep that defines a click command named `command`
VERBS = {
    "tokenize": "tokenize",
    "merge": "merge",
    "verify": "verify",
    "split": "split",
    "inspect": "inspect",
    "dedup": "dedup",
    "blend": "blend",
    "conversations": "conversations",
    "demo-text": "demo_text",
}


class Verbs(click.Group):
    """Loads a verb's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"launch.prep.{VERBS[name]}").command
        return command


@click.group(name="prep", cls=Verbs, context_settings=SETTINGS)
def command() -> None:
    """Text in, token files out.

    \b
    herd prep tokenize corpus.jsonl.gz --tokenizer tokenizer.model --output data/corpus
    """
