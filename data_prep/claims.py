"""Who does which part: a file beside it, made by one process alone, which tells whether that process is still there.

Processes of one machine are told dead at once (process number and its start time); of others by a claim that nobody
has touched for a while. The worst that a wrong guess costs is a part done twice: what is written is the same, and
appears by a rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil

# After how long a silence a process of another machine is taken to be dead. Its file system may answer late.
STALE_SECONDS = float(os.environ.get("HERD_CLAIM_SECONDS", "90"))
TOUCH_SECONDS = STALE_SECONDS / 6
LEFT_SECONDS = 3600  # without a change, of a hidden file that another machine's process wrote
HEIR = ".heir"  # of the claim to remove a dead one's
_SIGNED = re.compile(r"-([0-9a-f]{8})\.(\d+)(?:\.|$)")


@cache
def machine() -> str:
    """What process numbers of two processes can be compared by: this boot of this machine, this container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def signature() -> str:
    """A part of hidden files' names that says whose they are: host, machine, process.

    Not the host's name alone: containers on several machines may share it, and each would take the others for dead.
    """
    return f"{socket.gethostname()}-{_place()}.{os.getpid()}"


def _place() -> str:
    return hashlib.blake2b(f"{socket.gethostname()} {machine()}".encode(), digest_size=4).hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def left_behind(folder: Path, pattern: str = ".*") -> list[Path]:
    """Signed files and folders of processes that are gone: this machine's at once, others' when long untouched."""
    found = []
    for path in folder.glob(pattern):
        signed = _SIGNED.search(path.name)
        with contextlib.suppress(FileNotFoundError):
            if path.suffix == HEIR:
                lives = _lives(path.read_text())
            elif signed:
                lives = _started(int(signed[2])) is not None if signed[1] == _place() else None
            else:
                continue
            if lives is False or (lives is None and time.time() - path.stat().st_mtime > LEFT_SECONDS):
                found.append(path)
    return found


def sweep(folder: Path, pattern: str = ".*") -> None:
    """Remove what processes that are gone left aside."""
    for path in left_behind(folder, pattern):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _started(pid: int) -> float | None:
    """When a process of this machine began; None when it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, OSError):
        return None


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _lives(text: str) -> bool | None:
    """Is the process that wrote this claim still there? None when that cannot be told from here."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None  # being written this moment, or cut off by a full disk
    if owner.get("host") != socket.gethostname() or owner.get("machine") != machine():
        return None
    started = _started(owner["pid"])
    return started is not None and abs(started - (owner.get("started") or 0)) < 0.05


class Claims:
    """The claims of one process on parts in `folder`. Used as a context manager: it touches them until it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._me = _identity()
        self._held: dict[Path, str] = {}  # claim -> what it holds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for path in list(self._held):
            self._release(path)

    def take(self, name: str) -> bool:
        """Claim a part; False when another process that is alive has it."""
        path = self.folder / f"{name}.claim"
        for _ in range(2):
            if self._create(path):
                return True
            if not self._clear_if_dead(path):
                return False
        return False

    def _create(self, path: Path) -> bool:
        """Make the claim with its content in one step, so that nobody ever reads half of it."""
        text = json.dumps({**self._me, "own": os.urandom(8).hex()})  # no two claims are alike
        aside = path.with_name(f".{path.name}.{signature()}")
        aside.write_text(text)
        try:
            os.link(aside, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(file, "w") as stream:
                stream.write(text)
        finally:
            aside.unlink(missing_ok=True)
        self._held[path] = text
        return True

    def release(self, name: str) -> None:
        self._release(self.folder / f"{name}.claim")

    def _release(self, path: Path) -> None:
        text = self._held.pop(path, None)
        with contextlib.suppress(OSError):
            if path.read_text() == text:  # and not of one who took this process for dead
                path.unlink()

    def _touch(self) -> None:
        while not self._end.wait(TOUCH_SECONDS):
            for path in list(self._held):
                with contextlib.suppress(OSError):
                    os.utime(path)

    def _clear_if_dead(self, path: Path) -> bool:
        """Remove the claim of a process that is gone; True when the way is free."""
        try:
            text, touched = path.read_text(), path.stat().st_mtime
        except FileNotFoundError:
            return True
        if self._alive(text, touched):
            return False
        # Removed by one process alone: another that saw it too might remove the claim that takes its place. That one
        # holds a claim of its own on the removal, so that its death in this very moment is told like any other.
        heir = path.with_name(f".{path.name.strip('.').split('.')[0]}.{_digest(text)}{HEIR}")
        if not self._create(heir):
            self._clear_if_dead(heir)
            return False
        try:
            if path.read_text() == text:
                path.unlink()
        except FileNotFoundError:
            pass
        finally:
            self._release(heir)
        return True

    def _alive(self, text: str, touched: float) -> bool:
        lives = _lives(text)
        return self._now() - touched < STALE_SECONDS if lives is None else lives

    def _now(self) -> float:
        """The file system's time: clocks of nodes may differ from it."""
        probe = self.folder / f".now.{signature()}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)
