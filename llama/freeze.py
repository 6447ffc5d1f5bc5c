"""Which weights of a full fine-tuning stay as they are: names and patterns to our parameters. Needs no torch."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama.targets import GROUPS, HEAD, HF_HEAD, HF_MODULES, SHORT, hf_module, linear_shape

if TYPE_CHECKING:
    from llama.config import Model

NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""A block's norms and what Hugging Face calls them."""
ENDS = {"embed": "embed", "embed_tokens": "embed", "norm": "norm", HEAD: HEAD, HF_HEAD: HEAD}
LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?(?:\.(.+))?")


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Our parameters with the shapes of the whole model, the vocabulary without padded rows; a tied output is no
    parameter of its own."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (model.vocab_size, model.hidden_size)}
    for i in range(model.num_layers):
        shapes |= {f"layers.{i}.{norm}.weight": (model.hidden_size,) for norm in NORMS}
        shapes |= {f"layers.{i}.{inner}.weight": linear_shape(f"layers.{i}.{inner}", model) for inner in HF_MODULES}
    shapes["norm.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        shapes["head.weight"] = linear_shape(HEAD, model)
    return shapes


def frozen(patterns: Sequence[str], model: Model) -> list[str]:
    """Our names of the parameters that `patterns` (the recipe's train.freeze) mean, in the model's order.

    Raises ValueError for a pattern that means nothing, and when nothing would be left to train.
    """
    shapes = parameter_shapes(model)
    found: set[str] = set()
    for pattern in patterns:
        found |= _meant(pattern, model, list(shapes))
    if patterns and len(found) == len(shapes):
        raise ValueError(f"train.freeze={','.join(patterns)} freezes every weight; leave some to train")
    return [name for name in shapes if name in found]


def counts(patterns: Sequence[str], model: Model) -> tuple[int, int]:
    """Weights that are trained, and all."""
    still, sizes = set(frozen(patterns, model)), parameter_shapes(model)
    return sum(math.prod(s) for n, s in sizes.items() if n not in still), sum(map(math.prod, sizes.values()))


def _meant(pattern: str, model: Model, names: list[str]) -> set[str]:
    """The parameters that one pattern names."""
    layers = LAYERS.fullmatch(pattern)
    if layers and (layers[3] is None or _inner(layers[3])):
        first, last = int(layers[1]), int(layers[2] or layers[1])
        if not first <= last < model.num_layers:
            raise ValueError(
                f"train.freeze: {pattern!r} goes beyond the model's layers, which are 0..{model.num_layers - 1}"
            )
        inner = _inner(layers[3]) if layers[3] else (*HF_MODULES, *NORMS)
        return {f"layers.{i}.{part}.weight" for i in range(first, last + 1) for part in inner}
    if pattern in ENDS:
        end = "embed" if ENDS[pattern] == HEAD and model.tie_embeddings else ENDS[pattern]
        return {f"{end}.weight"}
    if _inner(pattern):
        hits = {f"layers.{i}.{part}.weight" for i in range(model.num_layers) for part in _inner(pattern)}
        return hits | ({"norm.weight"} if pattern == "norms" else set())
    try:
        full = {name: hf_name(name) for name in names}
        # A parameter's name, or its module's.
        hits = {
            name
            for name, theirs in full.items()
            if re.fullmatch(pattern, theirs) or re.fullmatch(pattern, theirs.removesuffix(".weight"))
        }
    except re.error as error:
        raise ValueError(f"train.freeze: {pattern!r} is no regular expression: {error}") from None
    if not hits:
        words = [*ENDS, "norms", *GROUPS, *SHORT, *NORMS, *NORMS.values(), *(hf_name(name) for name in names)]
        near = difflib.get_close_matches(pattern, words, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"train.freeze: {pattern!r} names no weight; {hint}take embed_tokens, norms, lm_head, attention, mlp, q, …, "
            f"layers.0-3, layers.0-3.mlp, or a pattern that matches names such as {hf_name(names[3])}"
        )
    return hits


def _inner(word: str) -> tuple[str, ...]:
    """The parts of a block that a word means; none when it means none."""
    if word == "norms":
        return tuple(NORMS)
    for ours, theirs in NORMS.items():
        if word in (ours, theirs):
            return (ours,)
    for ours, theirs in HF_MODULES.items():
        if word in (ours, theirs):
            return (ours,)
    return GROUPS.get(word) or ((SHORT[word],) if word in SHORT else ())


def hf_name(name: str) -> str:
    """Hugging Face's name of our parameter."""
    module = name.removesuffix(".weight")
    if module in ("embed", "norm"):
        return f"model.{'embed_tokens' if module == 'embed' else module}.weight"
    part = module.split(".", 2)[-1]
    if part in NORMS:
        return f"model.layers.{module.split('.')[1]}.{NORMS[part]}.weight"
    return f"{hf_module(module)}.weight"
