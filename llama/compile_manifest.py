"""What compiled graphs depend on, and the manifest that says which were compiled before. Needs no torch: reads fast.

    $HERD_CACHE/2.13.0+cpu-inductor-cpu/3f0c.../manifest.json     what the graphs are of, by whom, when; names of packs
                                               /pack-SHA256.tgz   files of the compiler's cache

All nodes and jobs share it: every file is written aside and renamed, packs are named by their content, and the last
manifest wins. llama/train/graphs.py fills it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llama.config import Recipe
from llama.layout import Layout
from llama.run_folder import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = ("torch", "triton", "torch-neuronx", "neuronx-cc")
"""Packages whose version decides what a graph is compiled to."""
_INITIAL = {"family", "init_std", "scaled_residual_init"}
"""Keys of `model` that no graph sees."""
_NAMED = 4
"""Differences that a line names."""


def cache_folder() -> Path:
    """Where graphs are kept for all nodes and jobs: HERD_CACHE, or beside the code as slurm/job.sh has it."""
    return Path(os.environ.get("HERD_CACHE") or ROOT / ".cache" / "compile").absolute()


def versions() -> dict[str, str]:
    """Versions of what compiles here, as far as installed."""
    found = {}
    for package in COMPILERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def code() -> str:
    """Changes with the sources that are traced into graphs."""
    digest = hashlib.sha256()
    for folder in ("model", "parallel"):
        for path in sorted((ROOT / "llama" / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def parts(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Everything that decides the graphs, by the name a person knows it by, but for the device.

    Not train.global_batch_size, steps or optimizer: a change of those compiles nothing new.
    """
    p, t = recipe.parallel, recipe.train
    model = {
        f"model.{key}": value for key, value in recipe.model.model_dump(mode="json").items() if key not in _INITIAL
    }
    settings = {key: value for key, value in sorted(os.environ.items()) if key.startswith("TORCHINDUCTOR_")}
    for elsewhere in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        settings.pop(elsewhere, None)
    return {
        **model,
        "data.seq_length": recipe.data.seq_length,
        "data.document_mask": recipe.data.document_mask,
        "train.micro_batch_size": t.micro_batch_size,
        "train.precision": t.precision,
        "train.activation_checkpointing": t.activation_checkpointing,
        "train.loss_chunk": t.loss_chunk,
        "validation": recipe.validation.interval > 0,  # its graphs keep nothing for backward
        "parallel.pipeline_parallel": layout.pipeline,
        "parallel.pipeline_schedule": p.pipeline_schedule if layout.pipeline > 1 else None,
        "parallel.stages_per_rank": p.rank_stages,
        "parallel.replicate": layout.replicate,
        "parallel.shard": layout.shard,
        "parallel.context_parallel": layout.context,
        "parallel.tensor_parallel": layout.tensor,
        "parallel.sequence_parallel": p.sequence_parallel and layout.tensor > 1,
        "parallel.reshard_after_forward": p.reshard,
        **versions(),
        "python": platform.python_version().rpartition(".")[0],
        "code": code(),
        "environment": settings,
    }  # fmt: skip


def key(parts: Mapping[str, Any]) -> str:
    """Names the folder of what has these parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def shelf(backend: str, node_type: str) -> Path:
    """Folder of everything that one torch compiles by one backend for one kind of node."""
    return cache_folder() / f"{versions().get('torch', 'torch')}-{backend}-{node_type}"


def cpu() -> str:
    """This machine's processor as the C++ compiler sees it, which compiles for it alone (-march=native)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(' '.join(sorted(flags.split())).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Verdict:
    """Whether a run finds its graphs compiled."""

    warm: bool
    why: str

    def __str__(self) -> str:
        return f"{'warm' if self.warm else 'cold'}: {self.why}"


NOTHING = Verdict(True, "this recipe compiles nothing (train.compile=false)")


def write(folder: Path, parts: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Leave a manifest, whole or not at all. Raises OSError."""
    write_json(folder / "manifest.json", {"parts": dict(parts), **facts})


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty when there is none or it is no such thing."""
    found = read_json(folder / "manifest.json")
    return found if isinstance(found.get("parts"), dict) and isinstance(found.get("packs"), list) else {}


def _all() -> Iterator[dict[str, Any]]:
    for path in sorted(cache_folder().glob("*/*/manifest.json")):
        if found := read(path.parent):
            yield found


def judge(wanted: Mapping[str, Any]) -> Verdict:
    """Whether graphs with these parts were compiled; else what the nearest differ in.

    Parts that are not given, such as the device on a login node, are not compared.
    """
    nearest, fewest = None, 0
    for manifest in _all():
        theirs = manifest["parts"]
        differs = [name for name in wanted if theirs.get(name) != wanted[name]]
        differs += [name for name in theirs if name not in wanted and name not in ("device", "backend", "node_type")]
        if not differs:
            return Verdict(True, in_words(manifest))
        if nearest is None or len(differs) < fewest:
            nearest, fewest = (theirs, differs), len(differs)
    if nearest is None:
        return Verdict(False, f"nothing was compiled into {cache_folder()} yet")
    theirs, differs = nearest
    named = [f"{name}={_short(wanted.get(name))} (compiled: {_short(theirs.get(name))})" for name in differs[:_NAMED]]
    more = f" and {len(differs) - _NAMED} more" if len(differs) > _NAMED else ""
    return Verdict(False, f"no graphs for {', '.join(named)}{more}")


def in_words(manifest: Mapping[str, Any]) -> str:
    """Whose graphs a manifest is of."""
    graphs = manifest.get("graphs", {})
    who = f"job {manifest['job']}" if manifest.get("job") else str(manifest.get("host", "unknown"))
    return f"{graphs.get('total', '?')} graphs compiled by {who} at {manifest.get('time', '?')}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={inner}" for name, inner in value.items()) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def foresee(recipe: Recipe, layout: Layout, node_type: str | None = None) -> Verdict:
    """judge() for a machine without the device, such as a login node."""
    if not recipe.train.compile:
        return NOTHING
    known = parts(recipe, layout)
    return judge(known | {"node_type": node_type} if node_type else known)
