"""Hugging Face directories out: a checkpoint streamed tensor by tensor into safetensors, whole or not at all.

One process, no process group. The tensors' sizes are known before the first is read, so each file's header is written
first and the data follows as it comes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data_prep.errors import UserError
from data_prep.tokenizers import HF_FILES, load_tokenizer
from llama.config import Model, Recipe
from llama.hf.card import describe, write_card
from llama.hf.config import config_json, read_json
from llama.hf.weights import DTYPES, hf_name, parameter_shapes, some
from llama.model.llama import Llama

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one file, as the checkpoints of the big models have; a larger tensor has a file of its own."""
CHUNK = 1 << 22
"""Elements cast and written at a time, so that a cast needs little memory beside its tensor."""
SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}

Reader = Callable[[str], torch.Tensor]
"""Our parameter's name to its values, whole, on the CPU or elsewhere; padded rows of the vocabulary may follow."""


def open_checkpoint(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> Reader:
    """Reads one parameter at a time from a DCP folder; UserError unless all of `shapes` is there."""
    from llama.checkpoint_format import SafeReader  # the engine behind it takes 0.8 s to load, and imports need it not

    reader = SafeReader(checkpoint)
    try:
        metadata = reader.read_metadata()
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: is no complete checkpoint (it has no .metadata); choose another step") from None
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{checkpoint}/.metadata: is damaged ({error!r}); choose another step") from error
    # DCP asks again at each tensor, and the index of a thousand ranks takes seconds to unpickle.
    reader.read_metadata = lambda *args, **kwargs: metadata  # type: ignore[method-assign]
    stored = metadata.state_dict_metadata
    missing = [f"model.{name}" for name in shapes if f"model.{name}" not in stored]
    if missing:
        raise UserError(f"{checkpoint}: {some(missing)} missing; is this a checkpoint of this recipe's model?")
    for name, shape in shapes.items():
        item = stored[f"model.{name}"]
        # The vocabulary's padding may differ from the recipe's; only the tokenizer's rows are taken.
        if not isinstance(item, TensorStorageMetadata) or item.size[0] < shape[0] or tuple(item.size[1:]) != shape[1:]:
            found = list(item.size) if isinstance(item, TensorStorageMetadata) else "no tensor"
            raise UserError(f"{checkpoint}: model.{name} is {found} and the recipe's model needs {list(shape)}")

    def read(name: str) -> torch.Tensor:
        item = stored[f"model.{name}"]
        assert isinstance(item, TensorStorageMetadata)
        tensor = torch.empty(item.size, dtype=item.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # DCP remarks that there is no process group; none is wanted
                dcp.load({f"model.{name}": tensor}, storage_reader=reader, no_dist=True)
        except (Exception, dcp.CheckpointException) as error:  # the latter is only a BaseException
            raise UserError(
                f"{checkpoint}: model.{name} cannot be read ({_cause(error)}); choose another step"
            ) from error
        return tensor

    return read


def _cause(error: BaseException) -> str:
    """The innermost line of DCP's nested reports, without its advice."""
    return (str(error).strip().splitlines() or [repr(error)])[-1].split(". ")[0][:160]


def _plan(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_shard_size: int) -> list[list[str]]:
    """Our names, in order, cut into files of at most `max_shard_size` bytes."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * itemsize
        if files[-1] and filled + size > max_shard_size:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _pieces(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> Iterator[memoryview]:
    """The tensor's bytes in `dtype`, a piece at a time; UserError where a value is not finite."""
    for piece in tensor.detach().reshape(-1).split(CHUNK):
        cast = piece.to(device="cpu", dtype=dtype)
        if not cast.isfinite().all():
            if piece.isfinite().all():
                raise UserError(
                    f"{name}: a value of {piece.abs().max():.3g} does not fit {dtype}; use --dtype bfloat16", 2
                )
            raise UserError(f"{name}: holds NaN or infinity; the run had diverged, export an earlier --step")
        yield memoryview(cast.contiguous().view(torch.uint8).numpy())


def _write_file(
    path: Path, names: list[str], shapes: Mapping[str, tuple[int, ...]], read: Reader, dtype: torch.dtype
) -> None:
    """One safetensors file of our parameters `names` under Hugging Face's names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + torch.Size(shapes[name]).numel() * dtype.itemsize
        header[hf_name(name)] = {"dtype": SAFETENSORS[dtype], "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned, as the format asks of writers
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name)[: shapes[name][0]]
            if tuple(tensor.shape) != shapes[name]:
                raise UserError(f"{name} has shape {list(tensor.shape)} and the model needs {list(shapes[name])}")
            for piece in _pieces(tensor, dtype, name):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _write_weights(folder: Path, config: Model, read: Reader, dtype: torch.dtype, max_shard_size: int) -> None:
    shapes = parameter_shapes(config)
    plan = _plan(shapes, dtype.itemsize, max_shard_size)
    if len(plan) == 1:
        return _write_file(folder / "model.safetensors", plan[0], shapes, read, dtype)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        file = f"model-{number:05}-of-{len(plan):05}.safetensors"
        _write_file(folder / file, names, shapes, read, dtype)
        weight_map |= {hf_name(name): file for name in names}
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
    write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def write_json(path: Path, keys: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(keys, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Until the file's bytes are on the disk."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_target(to: Path, overwrite: bool, mark: str) -> None:
    """Refuse to lose anything that is not an earlier export."""
    if not to.exists():
        return
    if not to.is_dir():
        raise UserError(f"{to}: exists and is no folder; choose another", 2)
    held = list(to.iterdir())
    if held and not overwrite:
        raise UserError(f"{to}: is not empty; choose another folder, or --overwrite replaces it", 2)
    if held and (not (to / mark).is_file() or any(path.is_dir() for path in held)):
        raise UserError(
            f"{to}: holds something else than an earlier export (no {mark}) and is not replaced; choose another folder",
            2,
        )


def _token_ids(tokenizer: Path | None, config: Model) -> dict[str, Any]:
    """bos_token_id and eos_token_id as the tokenizer's model directory says, else as the tokenizer does."""
    if tokenizer is None:
        return {}
    keys: dict[str, Any] = {}
    if tokenizer.is_dir():
        for file in ("config.json", "generation_config.json"):  # the later one knows more ends of a turn
            found = read_json(tokenizer / file) if (tokenizer / file).is_file() else {}
            keys |= {key: found[key] for key in ("bos_token_id", "eos_token_id") if found.get(key) is not None}
    loaded = load_tokenizer(tokenizer)
    if loaded.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer}: has {loaded.vocab_size} tokens and the model only {config.vocab_size}; "
            "give the tokenizer that the model was trained with",
            2,
        )
    return {"bos_token_id": loaded.bos, "eos_token_id": loaded.eod} | keys


def write_tokenizer(tokenizer: Path, folder: Path, add_bos: bool) -> None:
    """Tokenizer files: the files of a Hugging Face directory as they are; of any other tokenizer what transformers needs."""
    if tokenizer.is_dir() and (tokenizer / "tokenizer_config.json").is_file():
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", *HF_FILES):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    else:
        load_tokenizer(tokenizer).save_for_transformers(folder, add_bos=add_bos)


@contextmanager
def whole_directory(to: Path, overwrite: bool, size: int, mark: str = "config.json") -> Iterator[Path]:
    """A folder to write aside, `to`.tmp, renamed to `to` when every byte is on the disk; nothing stays of a failure.

    `size`: bytes it will take. `mark`: the file that an earlier export, which `overwrite` may replace, has.
    """
    _check_target(to, overwrite, mark)
    aside, old = (to.with_name(to.name + ending) for ending in (".tmp", ".old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was interrupted
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if free < size:
            raise UserError(
                f"{to}: the export takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; choose another disk"
            )
        yield aside
        _sync_folder(aside)
        if to.exists() and any(to.iterdir()):
            shutil.rmtree(old, ignore_errors=True)
            to.rename(old)
        try:
            aside.rename(to)  # an empty folder gives way
        except OSError:
            if old.exists():
                old.rename(to)
            raise
        _sync_folder(to.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror or error}; nothing was left half-written") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_directory(
    to: Path,
    config: Model,
    read: Reader,
    dtype: str,
    tokenizer: Path | None,
    add_bos: bool,
    overwrite: bool,
    max_shard_size: int,
    card: str | None = None,
) -> None:
    """The whole directory, from a reader of our parameters; with a model card where there is one."""
    if getattr(torch, dtype, None) not in SAFETENSORS:
        raise UserError(f"dtype {dtype!r}: weights are written as bfloat16, float16 or float32", 2)
    kind: torch.dtype = getattr(torch, dtype)
    to = to.resolve()
    _check_target(to, overwrite, "config.json")
    ids = _token_ids(tokenizer, config)
    keys = config_json(config, dtype, ids.get("bos_token_id"), ids.get("eos_token_id"))
    size = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values()) * kind.itemsize
    with whole_directory(to, overwrite, size) as aside:
        write_json(aside / "config.json", keys)
        write_json(aside / "generation_config.json", {"_from_model_config": True} | ids)
        if tokenizer is not None:
            write_tokenizer(tokenizer, aside, add_bos)
        if card is not None:
            write_card(aside, card, to)
        _write_weights(aside, config, read, kind, max_shard_size)


def export(
    checkpoint: str | Path,
    recipe: Recipe | Model,
    to: str | Path,
    dtype: str = "bfloat16",
    tokenizer: str | Path | None = None,
    add_bos: bool = True,
    overwrite: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """A training checkpoint as a Hugging Face directory that AutoModelForCausalLM loads.

    Args:
        checkpoint: folder of torch.distributed.checkpoint files with keys model.<parameter>; other keys are not read.
        recipe: the run's recipe, or its model.
        to: the directory; appears whole or not at all.
        dtype: bfloat16, float16 or float32.
        tokenizer: its file, or a Hugging Face directory whose tokenizer files are copied; none are written when None.
        add_bos: whether a tokenizer that is converted here puts BOS before each text.
        overwrite: replace an earlier export.
        max_shard_size: bytes of tensors in one file.
    Memory: one tensor as stored, plus one rank's part of it while that is read. Raises UserError.
    """
    config = recipe.model if isinstance(recipe, Recipe) else recipe
    read = open_checkpoint(Path(checkpoint), parameter_shapes(config))
    source = None if tokenizer is None else Path(tokenizer)
    card = describe(recipe, "model", Path(checkpoint)) if isinstance(recipe, Recipe) else None
    write_directory(Path(to), config, read, dtype, source, add_bos, overwrite, max_shard_size, card)


def save_model(
    model: Llama,
    to: str | Path,
    dtype: str = "bfloat16",
    tokenizer: str | Path | None = None,
    add_bos: bool = True,
    overwrite: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """A whole model in this process's memory as a Hugging Face directory; otherwise as `export`."""
    parameters = dict(model.named_parameters())
    source = None if tokenizer is None else Path(tokenizer)
    write_directory(Path(to), model.config, parameters.__getitem__, dtype, source, add_bos, overwrite, max_shard_size)
