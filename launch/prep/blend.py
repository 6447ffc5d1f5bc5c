"""`herd prep blend`: what a blend comes to, before it is trained on."""

from __future__ import annotations

import json

import click

from launch.prep.common import SETTINGS, Verb


@click.command("blend", cls=Verb, context_settings=SETTINGS)
@click.argument("blend")
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--tokens", metavar="N", help="Tokens of the whole, such as 300B, where no RECIPE says it.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, with the weight of every token file.")
def command(blend: str, recipe: str | None, overrides: tuple[str, ...], tokens: str | None, as_json: bool) -> None:
    """Show what each source of BLEND gives: share, tokens drawn, epochs, repeats.

    BLEND is a YAML file of sources with weights, epochs or token budgets, which data.train=BLEND trains on. With RECIPE
    (and overrides) the figures are those of its run.

    \b
    tokens: 1T              # the whole; needed when weights stand beside epochs or tokens
    sources:
      - {path: web, weight: 7}           # relative to this file
      - {path: code, epochs: 2}
      - {path: 'books-*', tokens: 20B}   # files of a pattern share by their tokens

    \b
    herd prep blend blend.yaml --tokens 300B
    herd prep blend blend.yaml llama3.2_1b_gpu train.steps=20000
    """
    from data_prep.errors import UserError
    from llama.config import BlendKeys
    from llama.data import blend_file, blend_plan

    if tokens is not None and recipe is not None:
        raise UserError("--tokens and RECIPE both name the whole; give one of them", 2)
    if recipe is not None:
        from llama import recipe as recipes

        resolved = recipes.load(recipe, [*overrides, f"data.train={json.dumps(blend)}"])
        plan = blend_plan.plan_training(resolved, blend_file.open_sources(resolved.data.train))
    else:
        read = blend_file.read_blend(blend)
        try:
            whole = BlendKeys(tokens=tokens or read.tokens, sources=read.sources).tokens  # type: ignore[arg-type]
        except ValueError:
            raise UserError(f"--tokens {tokens}: not a number of tokens, such as 500M, 20B or 1.5T", 2) from None
        opened = blend_file.open_sources(read.sources)
        plan = blend_plan.plan_tokens(read.sources, opened, whole, named=tokens is None and whole is not None)
    if as_json:
        click.echo(json.dumps(plan.as_json(), ensure_ascii=False, indent=2))
        return
    for line in plan.lines():
        click.echo(line)
