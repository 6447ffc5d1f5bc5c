"""A run's compiled graphs: found from an earlier job, counted, and kept for the next one.

The compiler's own cache cannot be shared over a network: its temporary names are made of process and thread numbers, and
it locks with flock. So each node compiles into a folder of its own that lasts as long as the process, and what all nodes
share are packs of that folder: a pack for each distinct node, named by its content. Packs hold files and not
torch.compiler.save_cache_artifacts(), which leaves out what the C++ compiler made: on CPUs nine tenths of the time.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import socket
import tarfile
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama import compile_manifest as manifests
from llama.compile_manifest import NOTHING, Verdict
from llama.config import Recipe
from llama.device import Device, local_rank
from llama.layout import Layout
from llama.run_folder import now

ORPHANED = 3600.0
"""Seconds after which a pack that no manifest names is removed: none takes so long between the two."""
_DATA_ALONE: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on


@dataclass(frozen=True)
class Count:
    """Graphs: forward, backward and validation of a block are three. Over all ranks, each of which has its own."""

    total: int = 0
    compiled: int = 0
    cached: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return f"Total graphs: {self.total} / compiled: {self.compiled} / cached: {self.cached} / failed: {self.failed}"

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)))

    def __sub__(self, other: Count) -> Count:
        return Count(*(a - b for a, b in zip(self.numbers(), other.numbers(), strict=True)))

    def numbers(self) -> tuple[int, int, int, int]:
        """Total, compiled, cached, failed."""
        return self.total, self.compiled, self.cached, self.failed


class Graphs:
    """The graphs of one run. `load` before the model is compiled; `count` and `save` when it has taken steps.

    All three are collective: every rank calls them. Without train.compile they do nothing.
    """

    def __init__(self, recipe: Recipe, device: Device, layout: Layout):
        self.active, self.backend = recipe.train.compile, device.compile_backend
        node_type = os.environ.get("HERD_NODE_TYPE") or {"cuda": "gpu"}.get(device.type, device.type)
        about = {"backend": self.backend, "node_type": node_type, "device": device.name}
        self.parts = manifests.parts(recipe, layout) | about if self.active else about
        self.folder = manifests.shelf(self.backend, node_type) / manifests.key(self.parts)
        self.local: Path | None = None
        """What this node compiles into."""
        self.manifest: dict[str, Any] = {}
        self.found: list[dict[str, Any]] = []
        """Packs that this node has unpacked; known on the node's first rank alone."""
        self.failed = 0
        """Graphs of this rank that could not be compiled."""
        self.before, self.kept = _counted(), 0
        self.neffs = _neffs() if self.backend == "neuron" else 0
        self.steps, self.validated = 0, False

    def load(self) -> Verdict:
        """Put what an earlier job compiled where the compiler looks for it."""
        if not self.active:
            return NOTHING
        verdict = Verdict(False, "")
        if dist.get_rank() == 0:
            self.manifest = manifests.read(self.folder)
            warm = bool(self.manifest)
            verdict = Verdict(True, manifests.in_words(self.manifest)) if warm else manifests.judge(self.parts)
        # One rank reads, so that all act on the same, whatever a file server shows to each.
        told = [(self.folder, self.parts, self.manifest, verdict)]
        dist.broadcast_object_list(told, src=0)
        self.folder, self.parts, self.manifest, verdict = told[0]
        trouble: list[str] = []
        if local_rank() == 0:
            self.local, trouble = _own_folder(), []
            if self.manifest:
                trouble = self._unpack(self.local)
        answers = _gather((_first_of_node(), self.local, trouble))
        self.local = next(folder for first, folder, _ in answers if first == _first_of_node() and folder)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.local)
        _forgo_headers()
        troubles = sorted({line for _, _, lines in answers for line in lines})
        return Verdict(False, "; ".join(troubles)) if troubles else verdict

    def _unpack(self, local: Path) -> list[str]:
        """Unpack what this node's ranks compiled; what is in the way of that, in words."""
        ranks, trouble = _ranks_of_node(), []
        missing, others = set(ranks), False
        for pack in self.manifest["packs"]:
            if not set(ranks) & set(pack["ranks"]):
                continue
            if pack["cpu"] != manifests.cpu():
                others = True  # its machine code may hold instructions that this one has not
                continue
            try:
                data = (self.folder / pack["name"]).read_bytes()
                if pack["name"] != _name(data):
                    raise ValueError("its content is not what was written")
                with tarfile.open(fileobj=io.BytesIO(data)) as files:
                    files.extractall(local, **_DATA_ALONE)
            except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
                trouble.append(f"{self.folder / pack['name']} is passed over: {error}")
                continue
            self.found.append(pack)
            missing -= set(pack["ranks"])
        if missing and not trouble and self.backend == "inductor":
            why = "those there are for another processor" if others else f"rank {min(missing)} has none there"
            trouble.append(f"no graphs for {socket.gethostname()}: {why}")
        return trouble

    def own_count(self) -> Count:
        """Of this rank, since `load`."""
        counted = _counted() - self.before
        if self.backend == "neuron":  # counts nothing itself: what its shared cache has not grown by was in it
            new = min(counted.total, max(0, _neffs() - self.neffs))
            counted = replace(counted, compiled=new, cached=counted.total - new)
        # A graph that failed was counted as compiled, unless it failed before any compiler saw it.
        compiled = max(0, counted.compiled - self.failed)
        return Count(compiled + counted.cached + self.failed, compiled, counted.cached, self.failed)

    def count(self) -> Count:
        """Of all ranks, since `load`."""
        return sum(_gather(self.own_count()), Count()) if self.active else Count()

    def after_step(self, validated: bool = False) -> str | None:
        """Keep what a cold run compiles, when it has: after its second step, and after its first validation.

        So that an attempt after this one is warm. What is in the way of that, in words.
        """
        self.steps += 1
        first = validated and not self.validated
        self.validated |= validated
        return self.save() if self.steps == 2 or first else None

    def save(self, seconds: float | None = None) -> str | None:
        """Keep what was compiled since `load` for other jobs; what is in the way of that, in words."""
        count = self.count()
        if not self.active or (count.compiled == self.kept and self.manifest):
            return None
        self.kept = count.compiled
        pack: dict[str, Any] | None = None
        trouble: str | None = None
        if local_rank() == 0 and self.local is not None:
            digest = _digest(self.local)
            pack = {"digest": digest, "cpu": manifests.cpu(), "ranks": _ranks_of_node()}
            known = next((p for p in self.found if (p["digest"], p["cpu"]) == (digest, pack["cpu"])), None)
            pack["name"] = known["name"] if known else None
        packs = [pack for pack in _gather(pack) if pack]
        # Nodes with the same graphs need one pack: the first of them writes it.
        alike = {(p["digest"], p["cpu"]): p for p in reversed(packs)}
        if pack and pack["name"] is None and alike[pack["digest"], pack["cpu"]]["ranks"] == pack["ranks"]:
            assert self.local is not None
            try:
                pack["name"] = _pack(self.local, self.folder)
            except OSError as error:
                trouble = f"graphs cannot be kept in {self.folder}: {error.strerror or error}"
        answers = _gather((pack, trouble))
        trouble = next((text for _, text in answers if text), None)
        if trouble is None:
            trouble = self._leave_manifest([p for p, _ in answers if p], count, seconds)
        return trouble

    def _leave_manifest(self, packs: list[dict[str, Any]], count: Count, seconds: float | None) -> str | None:
        """Write the manifest, on the first rank; what is in the way of that, told to all."""
        names = {(p["digest"], p["cpu"]): p["name"] for p in reversed(packs) if p["name"]}
        packs = [p | {"name": names[p["digest"], p["cpu"]]} for p in packs]
        told: list[Any] = [None, None]
        if dist.get_rank() == 0:
            current = manifests.read(self.folder)
            mine = {p["cpu"] for p in packs}
            others = [p for p in current.get("packs", []) if p["cpu"] not in mine]
            facts: dict[str, Any] = {
                "graphs": {"total": count.total, "compiled": count.compiled},
                "packs": [*packs, *others],
                "job": os.environ.get("SLURM_JOB_ID"),
                "host": socket.gethostname(),
                "time": now(),
                "seconds": seconds,
            }
            try:
                # Another job may have left more meanwhile: this one's, with validation, before ours has validated.
                more = current != self.manifest and current.get("graphs", {}).get("total", 0) > count.total
                if not more:
                    manifests.write(self.folder, self.parts, facts)
                    _remove_orphans(self.folder, {p["name"] for p in facts["packs"]})
                told = [None, manifests.read(self.folder)]
            except OSError as error:
                told = [f"graphs cannot be kept in {self.folder}: {error.strerror or error}", self.manifest]
        dist.broadcast_object_list(told, src=0)
        self.manifest = told[1]
        if self.local is not None and local_rank() == 0:
            self.found = [p for p in self.manifest.get("packs", []) if set(p["ranks"]) & set(_ranks_of_node())]
        trouble: str | None = told[0]
        return trouble


def is_compile_error(error: BaseException) -> bool:
    """Whether a graph could not be compiled, and not something else failed."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    ours = ("torch._dynamo.exc.", "torch._inductor.exc.", "torch._functorch.")
    return any(name.startswith(ours) for name in names)


def reason(error: BaseException) -> str:
    """A compiler's error in one line: its inmost cause, and of a C++ compiler's pages the first error."""
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    line = next((line for line in lines if "error:" in line), lines[0] if lines else "no message")
    return f"{type(inner).__name__}: {line}"


def _counted() -> Count:
    """What torch has counted in this process so far.

    Inductor counts forward and backward each; where it did not run there is only Dynamo's count, of both as one. A graph
    that Inductor cannot cache ("bypass") is compiled by each process anew.
    """
    from torch._dynamo.utils import counters

    inductor = counters["inductor"]
    cached = inductor["fxgraph_cache_hit"]
    compiled = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
    total = cached + compiled or counters["stats"]["unique_graphs"]
    return Count(total, total - cached, cached)


def _forgo_headers() -> None:
    """Have Inductor compile C++ without a precompiled header: it makes that even for kernels that it then finds.

    On a fresh disk that is half of a warm start on CPUs, while a cold one gains a fifth. Changes keys, so cold or warm;
    who sets the variable has chosen.
    """
    import torch._inductor.config as inductor

    given = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS" in os.environ
    if hasattr(inductor, "cpp_cache_precompile_headers") and not given:
        inductor.cpp_cache_precompile_headers = False


def _neffs() -> int:
    """Executables in the cache that Neuron's own compiler shares between nodes; nobody here has run that."""
    folder = Path(os.environ.get("TORCH_NEURONX_NEFF_CACHE_DIR", ""))
    return sum(1 for _ in folder.rglob("*.neff")) if folder.name else 0


def _gather(mine: Any) -> list[Any]:
    """`mine` of every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _first_of_node() -> int:
    """The first rank on this node: torchrun numbers a node's ranks one after the other."""
    return dist.get_rank() - local_rank()


def _ranks_of_node() -> list[int]:
    first = _first_of_node()
    return list(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _own_folder() -> Path:
    """A new folder on this node's own disk, for as long as this process lives; those of dead ones are removed.

    New each time: a compiler that was killed leaves half a library, which the next would load.
    """
    base = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/herd-inductor-{os.getuid()}")
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    if base.stat().st_uid != os.getuid():  # code is loaded from there
        base = Path(tempfile.mkdtemp(prefix="herd-inductor-"))
    for left in base.glob("graphs-*"):
        with contextlib.suppress(OSError), (left / ".alive").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="graphs-", dir=base))
    alive = os.open(folder / ".new", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(alive, fcntl.LOCK_EX)  # held until the process is gone
    (folder / ".new").rename(folder / ".alive")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _files(local: Path) -> Iterator[Path]:
    """Files of the compiler's cache worth keeping, relative to it, in order: no locks, nothing half written."""
    for path in sorted(local.rglob("*")):
        inside = path.relative_to(local)
        if path.is_file() and inside.parts[0] != "locks" and not path.name.startswith("."):
            yield inside


def _digest(local: Path) -> str:
    """Which graphs a folder holds. The files of one graph may differ in bits, and are named by them."""
    names = (path.parent if path.parts[0] in ("fxgraph", "aotautograd") else path for path in _files(local))
    return hashlib.sha256("\n".join(dict.fromkeys(map(str, names))).encode()).hexdigest()[:16]


def _name(data: bytes) -> str:
    return f"pack-{hashlib.sha256(data).hexdigest()[:32]}.tgz"


def _pack(local: Path, folder: Path) -> str:
    """Write a folder's files as a pack into `folder`, whole or not at all; the pack's name. Raises OSError."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as pack:
        for inside in _files(local):
            pack.add(local / inside, str(inside), recursive=False)
    data = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".pack.{uuid.uuid4().hex}"
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / _name(data))
    finally:
        aside.unlink(missing_ok=True)
    return _name(data)


def _remove_orphans(folder: Path, named: set[str]) -> None:
    """Packs that the manifest does not name, and that no other job is about to name."""
    clock = (folder / "manifest.json").stat().st_mtime  # the file server's own
    for pack in (*folder.glob("pack-*.tgz"), *folder.glob(".pack.*")):
        with contextlib.suppress(OSError):
            if pack.name not in named and clock - pack.stat().st_mtime > ORPHANED:
                pack.unlink()
