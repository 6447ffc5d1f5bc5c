"""Which linears of a model adapters go on: names, groups and patterns to our module names. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.config import Model

HF_MODULES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""A block's linears and what Hugging Face calls them."""
HEAD, HF_HEAD = "head", "lm_head"
GROUPS = {
    "all-linear": tuple(HF_MODULES),
    "attention": ("attention.q", "attention.k", "attention.v", "attention.o"),
    "mlp": ("mlp.gate", "mlp.up", "mlp.down"),
}
"""Words for several; all-linear leaves the output projection out, as PEFT does."""
SHORT = {inner.split(".")[1]: inner for inner in HF_MODULES} | {
    hf.split(".")[1]: inner for inner, hf in HF_MODULES.items()
}
"""q and q_proj alike."""
ROW_PARALLEL = ("attention.o", "mlp.down")
"""Linears that tensor parallelism cuts along their input."""


def hf_module(name: str) -> str:
    """Hugging Face's name of our linear: layers.3.attention.q is model.layers.3.self_attn.q_proj."""
    if name == HEAD:
        return HF_HEAD
    _, layer, inner = name.split(".", 2)
    return f"model.layers.{layer}.{HF_MODULES[inner]}"


def linear_shape(name: str, model: Model) -> tuple[int, int]:
    """(out, in) of our linear in the whole model; the output projection without padded rows."""
    if name == HEAD:
        return model.vocab_size, model.hidden_size
    inner = name.split(".", 2)[2]
    width, kv_width = model.num_heads * model.head_size, model.kv_heads * model.head_size
    return {
        "attention.q": (width, model.hidden_size),
        "attention.k": (kv_width, model.hidden_size),
        "attention.v": (kv_width, model.hidden_size),
        "attention.o": (model.hidden_size, width),
        "mlp.gate": (model.intermediate_size, model.hidden_size),
        "mlp.up": (model.intermediate_size, model.hidden_size),
        "mlp.down": (model.hidden_size, model.intermediate_size),
    }[inner]


def all_linears(num_layers: int) -> list[str]:
    """Every linear by our name, in the model's order, the output projection last."""
    return [f"layers.{i}.{inner}" for i in range(num_layers) for inner in HF_MODULES] + [HEAD]


def adapted(targets: Sequence[str], num_layers: int) -> list[str]:
    """Our names of the linears that `targets` mean, in the model's order.

    A target is a linear's name (q or q_proj, lm_head), a group (GROUPS), or a regular expression that must match the
    whole of Hugging Face's module name, as PEFT has it. Raises ValueError for one that means nothing.
    """
    known = all_linears(num_layers)
    found: set[str] = set()
    for target in targets:
        if target in (HEAD, HF_HEAD):
            hits = {HEAD}
        elif target in GROUPS or target in SHORT:
            inner = GROUPS.get(target) or (SHORT[target],)
            hits = {name for name in known if name != HEAD and name.split(".", 2)[2] in inner}
        else:
            try:
                hits = {name for name in known if re.fullmatch(target, hf_module(name))}
            except re.error as error:
                raise ValueError(f"lora.targets: {target!r} is no regular expression: {error}") from None
        if not hits:
            raise ValueError(
                f"lora.targets: {target!r} names no linear; take q, k, v, o, gate, up, down, lm_head, attention, mlp, "
                f"all-linear, or a pattern that matches names such as {hf_module(known[0])}"
            )
        found |= hits
    return [name for name in known if name in found]
