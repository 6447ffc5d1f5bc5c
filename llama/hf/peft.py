"""Adapters in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors.

Source: the files that peft 0.21 writes (https://huggingface.co/docs/peft/developer_guides/checkpoint). Keys carry no
adapter's name: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_prep.errors import UserError
from llama.config import Lora, Recipe
from llama.hf.card import describe, write_card
from llama.hf.config import read_json
from llama.hf.export import open_checkpoint, sync_file, whole_directory, write_json, write_tokenizer
from llama.hf.weights import DTYPES, checkpoint_reader, read_header, some
from llama.parallel.adapters import adapter_shapes
from llama.parallel.shards import Box
from llama.targets import HEAD, HF_MODULES, adapted, hf_module

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""Our parameters of an adapter and PEFT's."""
REFUSED = ("use_qalora", "lora_bias", "alpha_pattern", "rank_pattern", "modules_to_save", "layer_replication",
           "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "fan_in_fan_out")  # fmt: skip
"""Keys of a config that change what an adapter computes, in ways that herd does not know."""


def peft_key(name: str) -> str:
    """PEFT's key of our parameter."""
    module, _, leaf = name.rpartition(".")
    return f"base_model.model.{hf_module(module)}.{LEAVES[leaf]}"


def adapter_config(recipe: Recipe, base: str | None) -> dict[str, Any]:
    """adapter_config.json of a run. Targets go by their short names where those mean the same linears."""
    lora = recipe.lora
    names = adapted(lora.targets, recipe.model.num_layers)
    inner = {name.split(".", 2)[2] for name in names if name != HEAD}
    if len(names) - (HEAD in names) == len(inner) * recipe.model.num_layers:
        modules = [hf.split(".")[1] for short, hf in HF_MODULES.items() if short in inner]
        modules += ["lm_head"] if HEAD in names else []
    else:
        modules = [hf_module(name) for name in names]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """A LoRA adapter's adapter_config.json; UserError when it is none, or one that computes something else."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{directory}: has no {CONFIG}; give a folder that PEFT or herd export wrote", 2)
    keys = read_json(path)
    if keys.get("peft_type") != "LORA" or not isinstance(keys.get("r"), int) or keys["r"] < 1:
        raise UserError(f"{path}: is no LoRA adapter (peft_type {keys.get('peft_type')}, r {keys.get('r')})", 2)
    odd = [key for key in REFUSED if keys.get(key)]
    odd += ["bias"] if keys.get("bias", "none") != "none" else []
    if odd:
        raise UserError(f"{path}: has {', '.join(f'{key}={keys[key]}' for key in odd)}, which herd does not know", 2)
    return keys


def adapter_lora(directory: str | Path) -> Lora:
    """The recipe section of a PEFT adapter, its targets being the linears that its weights are for."""
    keys, entries = read_adapter_config(directory), read_header(Path(directory) / WEIGHTS)
    suffix = "." + LEAVES["lora_a"]
    modules = [key.removeprefix("base_model.model.").removesuffix(suffix) for key in entries if key.endswith(suffix)]
    if not modules:
        raise UserError(f"{Path(directory) / WEIGHTS}: holds no lora_A; is it a LoRA adapter's file?", 2)
    return Lora(
        rank=keys["r"],
        alpha=keys.get("lora_alpha") or 8,
        rslora=bool(keys.get("use_rslora")),
        dora=bool(keys.get("use_dora")),
        targets=tuple(sorted(m if m == "lm_head" else m.replace(".", r"\.") for m in modules)),
    )


def adapter_reader(directory: str | Path, recipe: Recipe) -> Callable[[str, Box], torch.Tensor]:
    """`read(name, box)` of a PEFT adapter's parameters; UserError unless it is the adapter of `recipe`."""
    folder = Path(directory)
    keys, lora, file = read_adapter_config(folder), recipe.lora, folder / WEIGHTS
    said = {
        "rank": keys["r"],
        "alpha": float(keys.get("lora_alpha") or 8),
        "rslora": bool(keys.get("use_rslora")),
        "dora": bool(keys.get("use_dora")),
    }
    for key, found in said.items():
        if getattr(lora, key) != found:
            raise UserError(f"lora.{key}={getattr(lora, key)} but {folder} has {found}; set lora.{key}={found}", 2)
    entries, shapes = read_header(file), adapter_shapes(recipe)
    wanted = {peft_key(name): shape for name, shape in shapes.items()}
    missing = [key for key in wanted if key not in entries]
    extra = [key for key in entries if key not in wanted and not key.endswith("base_layer.weight")]
    if missing or extra:
        what = f"{some(missing)} missing" if missing else f"no place for {some(extra)}"
        raise UserError(f"{file}: {what}; make lora.targets those of {folder / CONFIG}", 2)
    for key, shape in wanted.items():
        if entries[key].shape != shape or entries[key].dtype not in DTYPES:
            raise UserError(
                f"{file}: {key} is {entries[key].dtype} {list(entries[key].shape)} and the model needs {list(shape)}; "
                "is the adapter another model's?",
                2,
            )

    def read(name: str, box: Box) -> torch.Tensor:
        key, rows = peft_key(name), shapes[name][0]
        stop = min(box[0].stop, rows)
        try:
            with safe_open(file, framework="pt") as tensors:
                part: torch.Tensor = tensors.get_slice(key)[(slice(min(box[0].start, stop), stop), *box[1:])]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: {key} cannot be read: {error}; fetch the file again") from error
        padded = part.new_zeros([s.stop - s.start for s in box])  # rows past the tokenizer's vocabulary
        padded[: len(part)] = part
        return padded

    return read


def export_adapter(
    checkpoint: str | Path,
    recipe: Recipe,
    to: str | Path,
    dtype: str = "float32",
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """A checkpoint of a run with adapters as a directory that PEFT loads on top of train.init_from.

    Where lm_head has an adapter its frozen weights go along, as PEFT does. Raises UserError.
    """
    shapes, target = adapter_shapes(recipe), Path(to).resolve()
    base = recipe.train.init_from
    read = open_checkpoint(Path(checkpoint), shapes)
    kind: torch.dtype = getattr(torch, dtype)
    tensors = {peft_key(name): read(name)[: shape[0]].to(kind).contiguous() for name, shape in shapes.items()}
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{checkpoint}: {some(bad)} hold NaN or infinity; export an earlier --step")
    if HEAD in adapted(recipe.lora.targets, recipe.model.num_layers) and base is not None:
        box = (slice(0, recipe.model.vocab_size), slice(0, recipe.model.hidden_size))
        frozen = checkpoint_reader(base, recipe.model)("head.weight", box)
        tensors["base_model.model.lm_head.base_layer.weight"] = frozen.contiguous()
    size = sum(tensor.nbytes for tensor in tensors.values())
    with whole_directory(target, overwrite, size, CONFIG) as aside:
        write_json(aside / CONFIG, adapter_config(recipe, None if base is None else str(Path(base).resolve())))
        write_adapter(aside / WEIGHTS, tensors)
        if tokenizer is not None:
            write_tokenizer(Path(tokenizer), aside, add_bos=True)
        write_card(aside, describe(recipe, "adapter", Path(checkpoint)), target)


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """adapter_model.safetensors, synced."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod((path.parent / CONFIG).stat().st_mode)  # safetensors lets only the owner read
    sync_file(path)
