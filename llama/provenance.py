"""What a run was made of: version of this code and what was changed in it, versions of packages, deciding variables."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from llama.run_folder import RunFolder, write_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "pydantic", "tokenizers", "safetensors", "tensorboard", "torch-neuronx", "transformers")
# Named one by one, since an environment holds passwords and keys too.
VARIABLES = re.compile(r"^(HERD|NCCL|FI|NEURON|TORCH|PYTORCH|OMP|MKL|GLOO|SLURM|CUDA|MALLOC|LD_LIBRARY|PYTHON)")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|JWT", re.IGNORECASE)
LIMIT = 4 << 20
"""Bytes of uncommitted changes that are kept."""


def _git(*words: str) -> str | None:
    """What git says of this checkout; None where it is none, or git is missing or slow."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(ROOT), *words]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
        return done.stdout
    return None


def version() -> str:
    """Commit of this code, with "+" when files were changed since; the package's version outside a checkout."""
    commit = (_git("rev-parse", "--short=12", "HEAD") or "").strip()
    if commit:
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("herd")
    return "unknown"


def record(run: RunFolder) -> str:
    """Write code.json, code.diff and environment.json; the version in short. Raises OSError."""
    name = version()
    code: dict[str, Any] = {"version": name, "folder": str(ROOT), "commit": (_git("rev-parse", "HEAD") or "").strip()}
    changes = (_git("diff", "HEAD") or "") if name.endswith("+") else ""
    code["changes"] = len(changes)
    write_json(run.path / "code.json", code)
    (run.path / "code.diff").write_text(changes[:LIMIT], encoding="utf-8")
    packages = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[package] = metadata.version(package)
    variables = {k: v for k, v in sorted(os.environ.items()) if VARIABLES.match(k) and not SECRET.search(k)}
    facts = {
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version,
        "packages": packages,
        "variables": variables,
    }
    write_json(run.path / "environment.json", facts)
    return name
