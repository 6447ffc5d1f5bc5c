"""Weights of a Hugging Face directory, read box by box into any layout: names, files, checks.

Source: the checkpoints that transformers writes, and the safetensors format
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from data_prep.errors import UserError
from llama.config import Model
from llama.hf.config import model_config, read_json
from llama.model.llama import Llama
from llama.parallel.shards import Box

logger = logging.getLogger(__name__)

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Types of weights that are read, by their names in safetensors."""

NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Our parameter names and Hugging Face's; {} is the layer."""
VOCABULARY = ("embed.weight", "head.weight")
"""Parameters with a row for each token id, padded here and not there."""


def hf_name(name: str) -> str:
    """Hugging Face's name of our parameter."""
    parts = name.split(".")
    if parts[0] != "layers":
        return NAMES[name]
    return NAMES[".".join(["layers", "{}", *parts[2:]])].format(parts[1])


def parameter_shapes(config: Model) -> dict[str, tuple[int, ...]]:
    """Our parameters in the model's order with their shapes as Hugging Face stores them: the vocabulary unpadded.

    A tied output is no parameter of its own.
    """
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Llama(config).named_parameters()}
    return {name: (config.vocab_size, *s[1:]) if name in VOCABULARY else s for name, s in shapes.items()}


def some(names: Iterable[str], limit: int = 3) -> str:
    """A few of the names, and how many more."""
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    """safetensors' name of the type."""
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; UserError when bytes are missing."""
    damaged = f"{path}: is truncated or not a safetensors file; fetch it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise UserError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` where it came from")
            length = int.from_bytes(start, "little")
            if size < 8 + length:
                raise UserError(damaged)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
        entries = {name: Entry(path, item["dtype"], tuple(item["shape"])) for name, item in header.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(damaged) from error
    if end != size:
        raise UserError(f"{path}: is {size} bytes long and must be {end}; fetch it again")
    return entries


def find_tensors(directory: str | Path) -> dict[str, Entry]:
    """Every tensor of a Hugging Face directory, from model.safetensors or the files that its index names.

    Only headers are read. Raises UserError for a missing, truncated or inconsistent file.
    """
    folder = Path(directory)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # where both are, transformers takes this one too
        return read_header(single)
    if not index.is_file():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such directory; give a Hugging Face model directory", 2)
        if any(folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{folder}: has only pytorch_model.bin, a pickle; convert it: load it with transformers and "
                "save_pretrained, which writes model.safetensors",
                2,
            )
        raise UserError(
            f"{folder}: has neither model.safetensors nor its index; give a Hugging Face model directory", 2
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: has no weight_map; fetch it again")
    files = set(weight_map.values())
    gone = [file for file in files if not (folder / file).is_file()]
    if gone:
        raise UserError(f"{folder}: {some(gone)} of {index.name} missing; fetch the rest of the checkpoint")
    headers = {file: read_header(folder / file) for file in sorted(files)}
    lost = [name for name, file in weight_map.items() if name not in headers[file]]
    if lost:
        raise UserError(f"{index}: {some(lost)} not in the file it names; fetch index and files of one version")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _compare_configs(directory: Path, config: Model) -> None:
    """Refuse a recipe under which the directory's weights would compute something else."""
    theirs = model_config(directory)
    shape = ("vocab_size", "num_layers", "num_heads", "kv_heads", "head_size", "tie_embeddings")
    differ = [key for key in shape if getattr(config, key) != getattr(theirs, key)]
    if not math.isclose(config.norm_eps, theirs.norm_eps, rel_tol=1e-5):  # GGUF's float32 makes 9.999999747e-06 of 1e-5
        differ.append("norm_eps")
    for key in differ:
        wanted, found = getattr(config, key), getattr(theirs, key)
        key = {"kv_heads": "num_kv_heads", "head_size": "head_dim"}.get(key, key)
        raise UserError(f"model.{key}={wanted} but {directory}/config.json has {found}; set model.{key}={found}", 2)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    # Stretching a context changes these on purpose.
    for key in ("rope_theta", "rope_scaling"):
        wanted, found = getattr(config, key), getattr(theirs, key)
        if wanted != found:
            logger.warning(
                "model.%s=%s but %s was trained with %s; is the change meant?", key, wanted, directory, found
            )


def checkpoint_reader(directory: str | Path, config: Model) -> Callable[[str, Box], torch.Tensor]:
    """`read(name, box)` for llama.parallel.shards.fill_parameters, over a Hugging Face directory.

    `read` gives the box's values in the file's type, from a memory map that lives no longer than its result, so a rank
    holds its shard and at most one tensor. Rows past the tokenizer's vocabulary are zero; a tied output reads the
    embedding. Everything is checked before: UserError when a tensor is missing, left over, of a wrong shape or type,
    when a file is missing or truncated, or when `config` is not the directory's model.
    """
    folder = Path(directory)
    entries = find_tensors(folder)
    if (folder / "config.json").is_file():
        _compare_configs(folder, config)
    shapes = parameter_shapes(config)
    wanted = {hf_name(name): shape for name, shape in shapes.items()}
    missing = [name for name in wanted if name not in entries]
    if missing:
        hint = "; set model.tie_embeddings=true" if missing == [NAMES["head.weight"]] else ""
        raise UserError(
            f"{folder}: {some(missing)} missing{hint or '; the recipe asks for another model, or fetch it again'}"
        )
    for name, shape in wanted.items():
        found = entries[name]
        if found.shape != shape:
            raise UserError(
                f"{found.file}: {name} has shape {list(found.shape)} and the model needs {list(shape)}; "
                "change the recipe's model to the checkpoint's",
                2,
            )
        if found.dtype not in DTYPES:
            raise UserError(f"{found.file}: {name} is {found.dtype}; {', '.join(DTYPES)} are read", 2)
    # Old checkpoints carry rotary tables; tied ones may carry the output once more, which transformers ignores too.
    ignored = {NAMES["head.weight"]} if config.tie_embeddings else set()
    extra = [n for n in entries if n not in wanted and n not in ignored and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(
            f"{folder}: the model has no place for {some(extra)}; change the recipe's model to the checkpoint's", 2
        )

    def read(name: str, box: Box) -> torch.Tensor:
        there = hf_name("embed.weight" if config.tie_embeddings and name == "head.weight" else name)
        file, dtype, shape = entries[there]
        stop = min(box[0].stop, shape[0])
        if box[0].start >= stop:
            return torch.zeros([s.stop - s.start for s in box], dtype=DTYPES[dtype])
        try:
            with safe_open(file, framework="pt") as tensors:
                part: torch.Tensor = tensors.get_slice(there)[(slice(box[0].start, stop), *box[1:])]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: {there} cannot be read: {error}; fetch the file again") from error
        if stop == box[0].stop:
            return part
        padded = part.new_zeros([s.stop - s.start for s in box])
        padded[: len(part)] = part
        return padded

    return read
