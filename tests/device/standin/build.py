"""Builds the stand-in's C++ once for a source, a torch and a Python, and keeps it for later runs."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_name("neuron.cpp")
NAME = "herd_standin"


def compiler() -> str | None:
    """Command of a C++ compiler, as CXX names it or as systems call it."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))),
        None,
    )


def obstacle() -> str | None:
    """Why the stand-in cannot be built here; None where it can."""
    if compiler() is None:
        return "no C++ compiler here to build the neuron stand-in with; install g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"no Python.h in {sysconfig.get_path('include')}, which the neuron stand-in is built with; install python3-dev"
    return None


def library() -> Path:
    """The built library. The first call takes half a minute, others find it in ~/.cache/herd-tests.

    Raises RuntimeError with the compiler's own words.
    """
    facts = (
        SOURCE.read_bytes(),
        repr(torch.__version__).encode(),
        sys.version.encode(),
        sysconfig.get_platform().encode(),
    )
    key = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "herd-tests"
    built = cache / f"{NAME}-{key}.so"
    if built.is_file():
        return built
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test runs at once: one builds, the others wait
        if not built.is_file():
            aside = built.with_suffix(f".{os.getpid()}.so")
            done = subprocess.run(_command(aside), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the neuron stand-in does not build: {done.stderr[:4000]}")
            aside.replace(built)
    return built


def _command(target: Path) -> list[str]:
    """By hand, so that no ninja is needed."""
    from torch.utils import cpp_extension

    compile_with = compiler()
    assert compile_with is not None
    libraries = cpp_extension.library_paths()
    return [
        compile_with, "-shared", "-fPIC", "-std=c++20", "-O1", "-fvisibility=hidden", f"-DTORCH_EXTENSION_NAME={NAME}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))),
        str(SOURCE), "-o", str(target),
        *(f"-L{path}" for path in libraries), "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python",
    ]  # fmt: skip


def load() -> ModuleType:
    """The library as a Python module; what it registers is registered by that."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library()))
    spec = importlib.util.spec_from_file_location(NAME, loader.path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[NAME] = module
    return module
