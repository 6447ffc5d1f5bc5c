"""`herd merge`: an adapter folded into its base, as a Hugging Face directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    from llama.config import Recipe

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
)


def _prompts(tokenizer: Path | None, vocab_size: int) -> list[list[int]]:
    """Ids to compare on: some text by the tokenizer, or ids spread over the vocabulary."""
    if tokenizer is None:
        return [[(7 + 7919 * i) % vocab_size for i in range(24)]]
    from data_prep.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    start = [] if loaded.bos is None else [loaded.bos]
    return [[*start, *loaded.encode(text)] for text in PROMPTS]


def recipe_of(base: Path, adapter: Path) -> tuple[Recipe, Path]:
    """A recipe that stands for base and adapter, and the base's directory."""
    from llama import hf
    from llama import recipe as recipes
    from llama.hf.peft import adapter_lora

    model = hf.model_config(base)
    keys = {
        "name": "merge",
        "model": model.model_dump(),
        "data": {"seq_length": 1},
        "train": {"steps": 1, "global_batch_size": 1, "init_from": str(base)},
        "lora": adapter_lora(adapter).model_dump(),
    }
    return recipes.build(keys, str(adapter)), base


@click.command(short_help="An adapter folded into its base.")
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Type of the weights. [default: the base's]"
)
@click.option("--check/--no-check", default=True, show_default=True, help="Compare logits; takes 4 bytes a weight.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
def command(base: Path, adapter: Path, to: Path, dtype: str | None, check: bool, overwrite: bool) -> None:
    """Fold ADAPTER into BASE and write a whole model that loads anywhere.

    BASE is a Hugging Face directory in 16 or 32 bits, or the folder of a run that trained all weights. ADAPTER is a
    folder in PEFT's format, or the folder of a run with lora.rank. What an adapter learned on a 4-bit base is folded into
    the 16-bit one.

    \b
    herd merge SmolLM2-135M runs/smollm2_lora --to merged
    herd merge Llama-3.1-8B adapter --to merged --no-check
    """
    import tempfile

    from llama import hf
    from llama.hf.merge import compare, merge
    from llama.hf.weights import find_tensors
    from llama.recipe import load

    began, given, run = time.monotonic(), base, adapter
    with tempfile.TemporaryDirectory(prefix="herd-merge-") as folder:
        if (adapter / "recipe.yaml").is_file():
            adapter = _exported(adapter, Path(folder) / "adapter")
        if (base / "recipe.yaml").is_file():
            own = load(str(base / "recipe.yaml"))
            if own.lora.rank:
                raise UserError(
                    f"{base}: is a run with adapters, not a base; give the weights it started from, {own.train.init_from}",
                    2,
                )
            base = _exported(base, Path(folder) / "base")
        recipe, base = recipe_of(base, adapter)
        tokenizer = base if any(base.glob("tokenizer.*")) else None
        stored = find_tensors(base)[hf.hf_name("layers.0.attention.q.weight")].dtype
        kind = dtype or {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")
        read, read_adapter = hf.checkpoint_reader(base, recipe.model), hf.adapter_reader(adapter, recipe)
        merge(recipe, read, read_adapter, to, kind, tokenizer, overwrite, _card(recipe, given, run))
        size = sum(path.stat().st_size for path in to.glob("*.safetensors"))
        click.echo(f"{base} + {adapter} -> {to}: {size / 1e6:,.1f} MB in {kind}, {time.monotonic() - began:.1f} s")
        if check:
            found = compare(recipe, read, read_adapter, to, _prompts(tokenizer, recipe.model.vocab_size))
            click.echo(
                f"logits of the merged model against base and adapter, in fp32: at most {found.difference:.3g} apart "
                f"(logits up to {found.size:.3g}, the adapter moves them by up to {found.effect:.3g}); "
                f"{found.same:.0%} of next tokens the same"
            )
            if found.difference > max(0.5 * found.effect, 0.02 * found.size):
                raise UserError(f"{to}: the merged model computes something else than base and adapter; do not use it")
            if found.difference > 0.5 * found.effect and kind != "float32":
                click.echo(
                    f"herd: warning: {kind} rounds most of what this adapter changes away: it was trained little; "
                    "--dtype float32 keeps it",
                    err=True,
                )


def _card(recipe: Recipe, base: Path, adapter: Path) -> str:
    """The model card: what the adapter's run tells, or its own card."""
    from llama.hf.card import CARD, describe, training_of
    from llama.recipe import load
    from llama.run_folder import complete

    if (adapter / "recipe.yaml").is_file():
        return describe(load(str(adapter / "recipe.yaml")), "merged", complete(adapter)[-1], base)
    return describe(recipe, "merged", None, base, training_of(adapter / CARD))


def _exported(run: Path, to: Path) -> Path:
    """A run's newest checkpoint as a directory of Hugging Face or of PEFT."""
    from launch.export import command as export

    export.main([str(run), "--to", str(to), "--dtype", "float32", "--no-mlflow"], standalone_mode=False)
    return to
