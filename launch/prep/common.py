"""What the verbs of `herd prep` share."""

from __future__ import annotations

from typing import Any

import click

from data_prep.errors import UserError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class Verb(click.Command):
    """A verb whose UserError is one line and an exit code, whoever calls it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"herd: {error}", err=True)
            ctx.exit(error.code)
