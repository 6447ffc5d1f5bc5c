"""`herd generate`: continue a prompt with a Hugging Face directory, text appearing as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch

    from data_prep.tokenizers import Tokenizer
    from llama.config import Model
    from llama.model.llama import Llama
    from llama.parallel.shards import Box

LOOK_BACK = 8
"""Ids decoded again before each new one: a tokenizer may spell an id by those before it, such as a leading space."""


def stream_text(decode: Callable[[Sequence[int]], str], before: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """Text of `ids` as it becomes certain, the concatenation being the text that follows `before`.

    A character of several bytes may need several ids, and a half of it decodes to U+FFFD: text that ends so is held
    back until more ids come, and let go as it is at the end.
    """
    window = list(before[-LOOK_BACK:])
    shown = decode(window)
    text = shown
    for number in ids:
        window.append(number)
        text = decode(window)
        if len(text) <= len(shown) or text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        window = window[-LOOK_BACK:]
        shown = text = decode(window)
    if len(text) > len(shown):
        yield text[len(shown) :]


def stop_ids(directory: Path, tokenizer: Tokenizer) -> list[int]:
    """Ids that end a text: those of generation_config.json or config.json, and the tokenizer's own."""
    from llama.hf.config import read_json

    found = {tokenizer.eod} if tokenizer.eod is not None else set()
    for name in ("generation_config.json", "config.json"):
        keys: dict[str, Any] = read_json(directory / name) if (directory / name).is_file() else {}
        ends = keys.get("eos_token_id")
        found |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return sorted(found)


def starts_with_bos(directory: Path, tokenizer: Tokenizer) -> bool:
    """Whether texts begin with BOS, as AutoTokenizer would have it.

    tokenizer_config.json's add_bos_token says so, else what tokenizer.json itself adds; a lone SentencePiece or
    tiktoken file adds BOS, as Llama's do.
    """
    from llama.hf.config import read_json

    if tokenizer.bos is None:
        return False
    config = directory / "tokenizer_config.json"
    said = read_json(config).get("add_bos_token") if config.is_file() else None
    if isinstance(said, bool):
        return said
    if tokenizer.kind != "huggingface":
        return True
    from tokenizers import Tokenizer as Fast

    ids: list[int] = Fast.from_file(str(tokenizer.path)).encode("").ids
    return ids[:1] == [tokenizer.bos]


def load_model(directory: Path, device: str | None) -> Llama:
    """The directory's model on one device, in the type of its weights."""
    from llama import hf
    from llama.hf.weights import DTYPES, find_tensors

    config = hf.model_config(directory)
    dtype = DTYPES[find_tensors(directory)[hf.hf_name("embed.weight")].dtype]
    return fill_model(config, hf.checkpoint_reader(directory, config), dtype, device)


def fill_model(
    config: Model, read: Callable[[str, Box], torch.Tensor], dtype: torch.dtype, device: str | None
) -> Llama:
    """A model of what `read` gives on one device, in `dtype` (float32 for float16 on a CPU, which crawls)."""
    import torch

    from llama.device import find_device
    from llama.model.llama import Llama
    from llama.parallel.shards import fill_parameters

    try:
        where = find_device(device).torch()
    except ValueError as error:
        raise UserError(f"--device: {error}", 2) from None
    with torch.device("meta"):
        model = Llama(config)
    if dtype == torch.float16 and where.type == "cpu":
        dtype = torch.float32
    model = model.to(dtype).to_empty(device=where)
    model.tie()
    fill_parameters(model, read)
    return model.eval()


@click.command(short_help="Continue a prompt.")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest continuation.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="0 takes the likeliest token; above it, draws, the higher the wilder.",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1), default=1.0, show_default=True,
    help="Draw among the likeliest tokens that hold this share of the probability.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--device", help="Where to run: cpu, cuda or neuron; the accelerator if there is one.")
def command(
    directory: Path, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int, device: str | None
) -> None:
    """Continue PROMPT with the model in DIRECTORY, a Hugging Face directory such as `herd export` writes.

    \b
    herd generate exported "Once upon a time"
    herd generate exported "The reason is" --max-tokens 200 --temperature 0.8 --top-p 0.95
    """
    from data_prep.tokenizers import load_tokenizer
    from llama.model.generate import generate

    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(prompt)
    if tokenizer.bos is not None and starts_with_bos(directory, tokenizer):
        ids = [tokenizer.bos, *ids]
    if not ids:
        raise UserError("the prompt is empty and this tokenizer begins texts with nothing; give some text", 2)
    model = load_model(directory, device)
    config = model.config
    if max(ids) >= config.vocab_size:
        raise UserError(
            f"{tokenizer.path}: has more tokens than the model's {config.vocab_size}; is it another model's?"
        )
    if len(ids) >= config.max_position:
        raise UserError(
            f"the prompt has {len(ids)} tokens and the model's context ends at {config.max_position}; shorten it", 2
        )
    sys.stdout.write(prompt)
    answer = generate(model, ids, max_tokens, stop_ids(directory, tokenizer), temperature, top_p, seed)
    # Padding of the vocabulary is never predicted, but a model may have rows that its tokenizer does not use.
    known = (number for number in answer if number < tokenizer.vocab_size)
    for text in stream_text(tokenizer.decode, ids, known):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
