"""What a checkpoint is on disk: names, manifest, training state, whether it is whole, and a reader that runs no code.

A folder `RUN/checkpoints/step-00000100` of torch.distributed.checkpoint files with keys `model.NAME`,
`optimizer.NAME.exp_avg` and `optimizer.NAME.exp_avg_sq`, and a manifest `herd.json` with the training state and a
checksum of every file. llama/train/checkpoint.py writes and resumes them; exports read them.
"""

from __future__ import annotations

import json
import pickle
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from data_prep.errors import UserError
from llama.run_folder import MANIFEST

FORMAT = 1
ASIDE = ".writing"


@dataclass
class TrainState:
    """Everything beside weights and moments that decides the next step."""

    step: int = 0
    """Steps done, skipped ones included."""
    updates: int = 0
    """Optimizer updates made: AdamW's own step count."""
    consumed_samples: int = 0
    """The absolute cursor into the sample order."""
    trained_tokens: int = 0
    """Tokens that had a label."""
    skipped_steps: int = 0
    order_samples: int = 0
    """Samples that the order was laid out for at the first start."""
    data_fingerprint: str = ""
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """What the guard compares the next loss with."""
    recent_norms: list[float] = field(default_factory=list)
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_step: int = 0
    """Step of that validation; 0: none yet."""
    awaited_loss: float | None = None
    """Validation loss that the next ones must improve on."""
    validations_waited: int = 0
    """Validations since then."""


# The names in torch's checkpoint index. Names, not modules: torch's own modules import others, and "os.system" could be
# reached through them.
_INDEX_HOLDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "_codecs": {"encode"},
}  # fmt: skip


class _SafeUnpickler(pickle.Unpickler):
    """Reads torch's checkpoint index, a pickle, and refuses every class that such an index does not hold."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _INDEX_HOLDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint index does not hold {module}.{name}")


class SafeReader(dcp.FileSystemReader):
    """torch's reader, but nothing in the index can run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _SafeUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"a checkpoint index is no {type(metadata).__name__}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest; UserError when it is damaged or of another format."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{checkpoint}: checkpoint format {manifest['format']}, this herd reads {FORMAT}; use the herd that wrote it"
            )
        shapes = {"state": dict, "model": dict, "files": dict}
        wrong = [key for key, kind in shapes.items() if not isinstance(manifest[key], kind)]
        state = set(manifest["state"]) - {f.name for f in fields(TrainState)}
        if wrong or state:
            raise ValueError(f"unusable {', '.join(wrong + sorted(state))}")
        return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint / MANIFEST}: damaged: {error!r}; delete the folder, an older checkpoint is used then"
        ) from None


def checksum(path: Path) -> int:
    """CRC-32 of a file: damage, not forgery, is what it must notice, at the disk's speed."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def damage(checkpoint: Path, verify: bool, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's files; with `verify` also checksums of this part of them. None: nothing seen."""
    try:
        files = sorted((name, int(size), int(crc)) for name, (size, crc) in read_manifest(checkpoint)["files"].items())
    except UserError as error:
        return str(error)
    except (TypeError, ValueError):
        return f"{checkpoint / MANIFEST}: its list of files is damaged"
    for i, (name, size, crc) in enumerate(files):
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if verify and i % parts == part and checksum(path) != crc:
            return f"{path} does not match its checksum"
    try:
        if part == 0:
            SafeReader(checkpoint).read_metadata()
    except Exception as error:  # whatever unpickling garbage may raise
        return f"{checkpoint / '.metadata'} cannot be read: {error}"
    return None
