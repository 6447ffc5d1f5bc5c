"""A small tokenizer with ChatML's control tokens, and conversations, for tests without material."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from llama.config import Recipe
from tests.dist.layouts import recipe

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None = CHATML, letters: int = 246) -> Path:
    """A byte-level tokenizer without merges, with what transformers keeps beside it; 256 letters spell any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:letters]
    built = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<|end|>")])
    built.save(str(folder / "tokenizer.json"))
    keys = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    keys |= {"chat_template": template} if template is not None else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    return folder


def write_talks(path: Path, count: int = 60, seed: int = 0, rounds: int = 2, **more: Any) -> Path:
    """Conversations of one to `rounds` rounds whose answers follow from their questions."""
    random = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(count):
            messages = []
            for _ in range(random.integers(1, rounds + 1)):
                word = "".join(random.choice(list("abcdef"), random.integers(1, 8)))
                messages += [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]
            file.write(json.dumps({"messages": messages} | more) + "\n")
    return path


def chat_recipe(folder: Path, talks: Path | str, **changes: Any) -> Recipe:
    """The tests' tiny network on conversations, in sequences of 160 tokens."""
    keys: dict[str, Any] = dict(
        data__train=str(talks), data__tokenizer=str(folder / "tokenizer"), data__seq_length=160, data__split="80,20,0",
        model__max_position=256, chat__truncation="drop",
    )  # fmt: skip
    return recipe(**(keys | changes)).model_copy(update={"run_dir": str(folder / "run")})
