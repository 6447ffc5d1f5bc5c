"""`python -m launch.node_check`: whether training can start on this node at all, in 0.1 s and without torch.

slurm/node.sh runs it before torchrun, so that a node whose Python, disk or devices are broken is named, instead of the
others waiting for it in a rendezvous. Comparing nodes with one another comes later, in llama/train/preflight.py.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from llama import node

RANK = 90000
"""A node's last words are filed under this and its number: no training rank has got that far."""
# A node that lacks the environment's Python comes here with another, which may not manage the next import.
if sys.version_info < (3, 11):  # noqa: UP036
    name, number = node.node_name(), RANK + int(os.environ.get("SLURM_NODEID", "0"))
    text = f"{sys.executable} is Python {sys.version.split()[0]}, older than 3.11"
    print(f"herd: node {name} cannot train: {text}", file=sys.stderr, flush=True)
    if "HERD_RUN" in os.environ:
        folder = Path(os.environ["HERD_RUN"], "logs", f"attempt-{int(os.environ.get('HERD_ATTEMPT', '1')):04d}")
        word = {"kind": "node", "text": text, "rank": number, "host": name, "nodes": [name], "time": time.time()}
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"failed-rank{number:05d}.json").write_text(json.dumps(word))
    sys.exit(1)

from llama.run_folder import Kind, LastWords, RunFolder, read_json  # noqa: E402

MODULES = ("torch", "numpy", "pydantic", "yaml", "click", "safetensors", "tensorboard", "psutil")
"""What training imports, looked for and not loaded."""
CORES = {"trn1": 2, "trn2": 8, "trn3": 8}
"""NeuronCores of a chip, of which each is a /dev/neuronN."""
TEMPORARY = 64 << 20
"""Bytes below which compilers that write to the temporary folder fail."""
FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE = 60.0
"""Seconds for this node's disks to answer; a dead file server never does."""

Problem = tuple[Kind, str]
"""Whose it is, as in LastWords, and what is wrong."""


def problems(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[Problem]:
    """What keeps training from starting on this node; a full disk is the user's, as it is full for all nodes."""
    found: list[Problem] = []
    wanted = (*MODULES, "torch_neuronx") if environment.get("HERD_NODE_TYPE", "").startswith("trn") else MODULES
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        found.append(("node", f"{sys.executable} finds no {', '.join(missing)}"))
    for name, what in (("HERD_RUN", "run folder"), ("HERD_CACHE", "compile cache")):
        if name not in environment:
            continue
        if error := node.unwritable(Path(environment[name])):
            kind: Kind = "user" if error.errno in FULL else "node"
            found.append((kind, f"{what} {node.folder_in_words(Path(environment[name]), error)}"))
    temporary = Path(environment.get("TMPDIR", "/tmp"))
    if error := node.unwritable(temporary):
        found.append(("node", node.folder_in_words(temporary, error)))
    elif (free := node.free_bytes(temporary)) is not None and free < TEMPORARY:
        found.append(("node", f"{temporary} has {free >> 20} MiB free"))
    found += [("node", text) for text in missing_devices(environment, devices)]
    if master := environment.get("MASTER_ADDR"):
        try:
            socket.getaddrinfo(master, None)
        except OSError as error:
            found.append(("node", f"the first node's name {master} is not known here: {error.strerror or error}"))
    return found


def missing_devices(environment: Mapping[str, str], devices: Path) -> list[str]:
    """Devices that ranks were counted on and that are not there."""
    kind, ranks = environment.get("HERD_NODE_TYPE", "cpu"), int(environment.get("HERD_RANKS_PER_NODE", "0"))
    if kind == "gpu":
        name, needed = "nvidia", max(ranks, int(environment.get("SLURM_GPUS_ON_NODE") or 0))
    elif kind in CORES:
        name = "neuron"
        needed = -(
            -ranks * int(environment.get("NEURON_LOGICAL_NC_CONFIG") or (1 if kind == "trn1" else 2)) // CORES[kind]
        )
    else:
        return []
    there = sum(1 for path in devices.glob(f"{name}*") if re.fullmatch(rf"{name}\d+", path.name))
    return [f"{there} of {needed} devices {devices}/{name}N are there"] if there < needed else []


def fewer_ranks(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The node that found fewer devices than the job's first node or than which the first node did, and how many.

    Each node counts its own, and torchrun would only say that the ranks do not fit the layout.
    """
    job = read_json(RunFolder(Path(environment["HERD_RUN"])).job) if "HERD_RUN" in environment else {}
    nodes, expected = job.get("nodes") or [], job.get("ranks_per_node")
    mine = int(environment.get("HERD_RANKS_PER_NODE", "0"))
    if str(job.get("job")) != environment.get("SLURM_JOB_ID") or not (nodes and expected and mine) or mine == expected:
        return None
    fewer, name = (mine, node.node_name()) if mine < expected else (expected, str(nodes[0]))
    return name, f"room for {fewer} ranks where others have {max(mine, expected)}"


def main() -> int:
    """Check this node; 0 when it is well. Else a line, last words in the run folder, and 1."""
    name, results = node.node_name(), []
    worker = threading.Thread(target=lambda: results.append(problems(os.environ)), daemon=True)
    worker.start()
    worker.join(PATIENCE)
    if worker.is_alive():  # nor can last words be written then
        print(
            f"herd: node {name} cannot train: its disks do not answer within {PATIENCE:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    found = results[0] if results else [("node", "its check failed, see above")]
    kind: Kind = "user" if found and all(kind == "user" for kind, _ in found) else "node"
    blamed, text = name, "; ".join(text for _, text in found)
    if not found:
        short = fewer_ranks(os.environ)
        if short is None:
            return 0
        blamed, text = short
    print(f"herd: node {blamed} cannot train: {text}", file=sys.stderr, flush=True)
    if "HERD_RUN" in os.environ:
        number = RANK + int(os.environ.get("SLURM_NODEID", "0"))
        word = LastWords(kind, text, number, host=name, nodes=(blamed,) if kind == "node" else ())
        RunFolder(Path(os.environ["HERD_RUN"])).leave_word(int(os.environ.get("HERD_ATTEMPT", "1")), word)
    return 1


if __name__ == "__main__":
    sys.exit(main())
