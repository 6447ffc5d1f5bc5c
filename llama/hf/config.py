"""config.json of a Hugging Face directory to a Model and back.

Source: the config classes of transformers 4 and 5, their defaults included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.errors import UserError
from llama.config import Model, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""Supported values of model_type, and of architectures."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; UserError when it is not one."""
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; fetch the file again") from error
    if not isinstance(keys, dict):
        raise UserError(f"{path}: expected a JSON mapping, found {type(keys).__name__}; fetch the file again")
    return keys


def _refuse(keys: Mapping[str, Any], where: Path) -> None:
    """Raise UserError for the first key that asks for mathematics which the model does not do."""
    kind = keys.get("model_type")
    architectures = keys.get("architectures") or list(ARCHITECTURES.values())
    # transformers' MistralConfig has a window of 4096 when the key is absent, so only an explicit null is none.
    window = keys.get("sliding_window", 4096 if kind == "mistral" else None)
    partial = (_rope(keys).get("partial_rotary_factor") or keys.get("partial_rotary_factor")) or 1.0
    layer_types = set(keys.get("layer_types") or ()) - {"full_attention"}
    table: list[tuple[str, object, bool, str]] = [
        ("model_type", kind, kind in ARCHITECTURES, f"{' and '.join(ARCHITECTURES)} are supported"),
        (
            "architectures",
            architectures,
            not set(architectures).isdisjoint(ARCHITECTURES.values()),
            f"{' and '.join(ARCHITECTURES.values())} are supported",
        ),
        (
            "quantization_config",
            "…",
            not keys.get("quantization_config"),
            "quantised weights are not read; use the checkpoint in bfloat16 or float32",
        ),
        ("hidden_act", keys.get("hidden_act"), keys.get("hidden_act", "silu") == "silu", "only silu is supported"),
        ("attention_bias", True, not keys.get("attention_bias"), "projections with a bias are not supported"),
        ("mlp_bias", True, not keys.get("mlp_bias"), "projections with a bias are not supported"),
        (
            "sliding_window",
            window,
            window is None,
            "windows are not supported; set it to null there if no sequence will be longer than the window",
        ),
        ("layer_types", sorted(layer_types), not layer_types, "only full_attention is supported"),
        ("partial_rotary_factor", partial, partial == 1, "rotating a part of each head is not supported"),
        ("rope_interleaved", True, not keys.get("rope_interleaved"), "weights must be in the half-split rotary order"),
        (
            "attention_dropout",
            keys.get("attention_dropout"),
            not keys.get("attention_dropout"),
            "dropout is not supported; set it to 0",
        ),
    ]
    for key, value, fine, remedy in table:
        if not fine:
            raise UserError(f"{where}: {key}={value!r}: {remedy}", 2)


def _rope(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in either spelling: transformers 5's rope_parameters, or the older rope_scaling."""
    return dict(keys.get("rope_scaling") or keys.get("rope_parameters") or {})


def _rope_scaling(keys: Mapping[str, Any], max_position: int, where: Path) -> RopeScaling | None:
    rope = _rope(keys)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not supported; llama3 and default are", 2)
    original = rope.get("original_max_position_embeddings", max_position)
    given = {
        "factor": rope.get("factor"),
        "low_freq_factor": rope.get("low_freq_factor"),
        "high_freq_factor": rope.get("high_freq_factor"),
        "original_max_position": keys.get("original_max_position_embeddings") or original,
    }
    absent = [key for key, value in given.items() if value is None]
    if absent:
        raise UserError(f"{where}: rope type llama3 needs {', '.join(absent)}; fetch the original config.json", 2)
    return RopeScaling(**given)


def model_config(directory: str | Path) -> Model:
    """The shape of the model in a Hugging Face directory, from its config.json.

    Llama 1 to 3.2 and what shares their architecture (OpenLLaMA, SmolLM2), and Mistral without a sliding window.
    Raises UserError naming the key of anything that the model cannot do, and what would work.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: has no config.json; give a Hugging Face model directory", 2)
    keys = read_json(path)
    _refuse(keys, path)
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    absent = [key for key in needed if not isinstance(keys.get(key), int) or keys[key] < 1]
    if absent:
        raise UserError(f"{path}: {', '.join(absent)}: not there or no count; fetch the original config.json", 2)
    # What a config leaves out has the default of its transformers class.
    mistral = keys["model_type"] == "mistral"
    max_position = keys.get("max_position_embeddings") or (131072 if mistral else 2048)
    heads, hidden = keys["num_attention_heads"], keys["hidden_size"]
    head_dim = keys.get("head_dim")
    try:
        return Model(
            family=keys["model_type"],
            vocab_size=keys["vocab_size"],
            hidden_size=hidden,
            intermediate_size=keys["intermediate_size"],
            num_layers=keys["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=keys.get("num_key_value_heads", 8 if mistral else heads) or heads,
            head_dim=None if head_dim in (None, hidden / heads) else head_dim,
            max_position=max_position,
            rope_theta=_rope(keys).get("rope_theta") or keys.get("rope_theta") or 10000.0,
            rope_scaling=_rope_scaling(keys, max_position, path),
            norm_eps=keys.get("rms_norm_eps", 1e-6),
            tie_embeddings=keys.get("tie_word_embeddings") or False,
            init_std=keys.get("initializer_range", 0.02),
        )
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {found.removeprefix(': ')}", 2) from None


def config_json(
    config: Model, dtype: str, bos: int | None = None, eos: int | list[int] | None = None
) -> dict[str, Any]:
    """config.json of an export. `dtype` is the weights' type, such as bfloat16; bos and eos are the tokenizer's ids.

    Rotary keys are in the older spelling, which transformers 4 and 5 and the tools around them all read.
    """
    if config.family == "llama" and config.hidden_size % config.num_heads:
        raise UserError(
            f"transformers' Llama refuses hidden_size={config.hidden_size} that is no multiple of "
            f"num_heads={config.num_heads}; set model.family=mistral, whose mathematics are the same",
            2,
        )
    scaling = config.rope_scaling
    keys: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        },
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    extra = {"sliding_window": None} if config.family == "mistral" else {"attention_bias": False, "mlp_bias": False}
    return keys | extra
