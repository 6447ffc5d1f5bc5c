"""Who does which part: a file beside it, made by one process alone, which tells whether that process is still there.

Processes of one machine are told dead at once (process number and its start time); of others by a claim that nobody
has touched for a while. The worst that a wrong guess costs is a part done twice: what is written is the same, and
appears by a rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

# After how long a silence a process of another machine is taken to be dead. Its file system may answer late.
STALE_SECONDS = float(os.environ.get("HERD_CLAIM_SECONDS", "90"))
TOUCH_SECONDS = STALE_SECONDS / 6


def _machine() -> str:
    """What process numbers of two processes can be compared by: this boot of this machine, this container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> float | None:
    """When a process of this machine began; None when it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, OSError):
        return None


class Claims:
    """The claims of one process on parts in `folder`. Used as a context manager: it touches them until it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._held: set[Path] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for path in list(self._held):
            self.release(path.name.removesuffix(".claim"))

    def take(self, name: str) -> bool:
        """Claim a part; False when another process that is alive has it."""
        path = self.folder / f"{name}.claim"
        for _ in range(2):
            if self._create(path):
                self._held.add(path)
                return True
            if not self._clear_if_dead(path):
                return False
        return False

    def _create(self, path: Path) -> bool:
        """Make the claim with its content in one step, so that nobody ever reads half of it."""
        aside = path.with_name(f".{path.name}.{self._me['host']}.{os.getpid()}")
        aside.write_text(json.dumps(self._me))
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
                json.dump(self._me, stream)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def release(self, name: str) -> None:
        path = self.folder / f"{name}.claim"
        self._held.discard(path)
        path.unlink(missing_ok=True)

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
        aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.dead")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return True
        mine = aside.read_text() == text
        if not mine:  # another process was faster, and this was its new claim
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return mine

    def _alive(self, text: str, touched: float) -> bool:
        try:
            owner = json.loads(text)
        except ValueError:
            owner = {}  # being written this moment, or cut off by a full disk
        if owner.get("host") == self._me["host"] and owner.get("machine") == self._me["machine"]:
            started = _started(owner["pid"])
            return started is not None and abs(started - (owner.get("started") or 0)) < 0.05
        return self._now() - touched < STALE_SECONDS

    def _now(self) -> float:
        """The file system's time: clocks of nodes may differ from it."""
        probe = self.folder / f".now.{socket.gethostname()}.{os.getpid()}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)
