"""Killed at any moment, in any way, `herd prep tokenize` goes on when it is given again, and writes the same bytes.

benchmarks/prep_soak.py kills one job a hundred times.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from data_prep import demo_text
from data_prep.errors import UserError
from data_prep.tokenize import Options, tokenize

ROOT = Path(__file__).parents[3]
HERD = (sys.executable, "-m", "launch.cli", "prep", "tokenize")
WORKERS = 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 1,000 pieces, and in corpus/ four megabytes of English in files of every kind."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_text, "_modules", list)
        text = demo_text.write_demo_text(folder, megabytes=1)
    demo_text.train_tokenizer(text, folder / "tokenizer.model", vocab_size=1000)
    lines, corpus = text.read_bytes().splitlines(keepends=True), folder / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").write_bytes(b"".join(lines * 3))
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines * 2), 1))
    (corpus / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines * 2)))
    table = arrow.table({"text": [json.loads(line)["text"] for line in lines]})
    parquet.write_table(table, corpus / "d.parquet", row_group_size=10)
    return folder


@pytest.fixture(scope="module")
def wanted(demo: Path) -> list[bytes]:
    """What an undisturbed run writes."""
    tokenize([demo / "corpus"], demo, demo / "undisturbed", Options(workers=1))
    return output(demo / "undisturbed")


def output(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx")]


# Between any two steps on the disk

STEPS = ("replace", "rename", "unlink", "link", "fsync", "rmdir", "ftruncate")


def dies_at_step(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a forked process, which is gone before its step `number`; False when it has fewer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in processes with threads
        pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        return code == 9
    left = number

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return step(*arguments, **options)

        return do

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    try:
        work()
    except BaseException as error:
        print(f"{error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def test_killed_between_any_two_steps_on_the_disk(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("data_prep.engines.choice.probes", lambda _: ["a"])
    lines = (demo / "text.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:6]) + b"bad\n")
    options = Options(workers=1, engine="official", part_bytes=30_000, max_bad=0.5)
    run = lambda: tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", options)  # noqa: E731
    run()
    names, wanted, steps = sorted(path.name for path in tmp_path.iterdir()), output(tmp_path / "out"), 0
    assert names == ["a.jsonl", "out.bin", "out.idx", "out.meta.json", "out.rejected.jsonl"]
    while True:
        for path in tmp_path.glob("out*"):
            path.unlink()
        if not dies_at_step(steps, run):
            break
        try:
            run()
        except UserError as error:  # all was done but the leave-taking
            assert "out.bin exists" in str(error) and not (tmp_path / "out.parts").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == names, steps
        assert output(tmp_path / "out") == wanted
        steps += 1
    assert steps > 40


# Signals to the real command


class Command:
    """`herd prep tokenize` in a session of its own, so that all its processes can be told."""

    def __init__(self, demo: Path, prefix: Path, *words: str) -> None:
        self.folder = Path(f"{prefix}.parts")
        if (
            signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        ):  # as shells have it in the background; it would be inherited
            signal.signal(signal.SIGINT, signal.default_int_handler)
        words = ("--workers", str(WORKERS), "--engine", "official", "--part-size", "100K", *words)
        self.process = subprocess.Popen(
            [*HERD, str(demo / "corpus"), "--tokenizer", str(demo), "--output", str(prefix), *words],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def workers(self) -> list[psutil.Process]:
        """Processes that make parts: of the spawned ones, those that run our code."""
        found = []
        for process in session(self.process.pid):
            try:
                if "spawn_main" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for_parts(self, more: int, seconds: float = 30) -> None:
        """Until that many parts more are done, or the command ended."""
        before, end = len(done(self.folder)), time.monotonic() + seconds
        while len(done(self.folder)) < before + more and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)

    def end(self) -> tuple[int, str]:
        """Its exit code and stderr; no process of it may be left."""
        try:
            _, errors = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            alive = [(p.pid, p.status(), p.cmdline()[-3:], p.num_threads()) for p in session(self.process.pid)]
            os.killpg(self.process.pid, signal.SIGKILL)
            files = {path.name: path.stat().st_size for path in sorted(self.folder.glob("*"))}
            pytest.fail(f"it hangs: {alive}, of {files}")
        end = time.monotonic() + 10
        while (left := session(self.process.pid)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not left
        assert "Traceback" not in errors or self.process.returncode == -signal.SIGKILL, errors
        return self.process.returncode, errors


def session(number: int) -> list[psutil.Process]:
    """All living processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def done(folder: Path) -> dict[str, int]:
    """Finished parts, and when each was."""
    return {
        path.name: path.stat().st_mtime_ns for path in folder.glob("*-????-*.json") if not path.name.startswith(".")
    }


def begun(folder: Path) -> set[str]:
    """Parts that were begun and not finished: their files aside."""
    asides = {path.name[1:].split(".")[0] for path in folder.glob(".*.bin")}
    return {name for name in asides if not (folder / f"{name}.json").exists()}


WAYS: dict[str, tuple[int, str, int]] = {  # signal, to whom, exit code
    "all_killed": (signal.SIGKILL, "group", -9),
    "parent_killed": (signal.SIGKILL, "parent", -9),
    "all_terminated": (signal.SIGTERM, "group", 143),
    "parent_terminated": (signal.SIGTERM, "parent", 143),
    "interrupted": (signal.SIGINT, "group", 1),  # as Ctrl-C does
}


def test_stopped_in_any_way_it_goes_on_and_writes_the_same(demo: Path, wanted: list[bytes], tmp_path: Path) -> None:
    draw, prefix = random.Random(), tmp_path / "out"
    folder = Path(f"{prefix}.parts")
    known: dict[str, int] = {}
    for way, (number, whom, code) in WAYS.items():
        command = Command(demo, prefix, "--keep-parts")
        command.wait_for_parts(draw.randrange(1, 4))
        (os.killpg if whom == "group" else os.kill)(command.process.pid, number)
        ended, errors = command.end()
        assert ended == code, way
        assert ("goes on from there" in errors) == (number != signal.SIGKILL) and "Errno" not in errors
        now = done(folder)
        assert len(now) > len(known) and {name: now.get(name) for name in known} == known, way  # none made again
        assert len(begun(folder)) <= 2 * WORKERS, way  # being made, being flushed
        known = now
    command = Command(demo, prefix, "--keep-parts")
    for _ in range(2):
        command.wait_for_parts(2)
        if workers := command.workers():
            draw.choice(workers).kill()  # the command replaces it
    assert command.end()[0] == 0 and output(prefix) == wanted
    now = done(folder)
    assert {name: now.get(name) for name in known} == known
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or path.suffix == ".claim"]
    assert {path.name for path in tmp_path.iterdir()} == {"out.bin", "out.idx", "out.meta.json", "out.parts"}


def test_the_same_command_twice_at_once_makes_each_part_once(demo: Path, wanted: list[bytes], tmp_path: Path) -> None:
    for seconds in (0.15, 0.4, 0.7):  # nor do those count that are stopped before: in imports, in loading
        command = Command(demo, tmp_path / "out")
        time.sleep(seconds)
        os.killpg(command.process.pid, signal.SIGTERM)
        assert command.end()[0] in (143, -15)  # the latter: before Python runs our code
    first, second = (Command(demo, tmp_path / "out", "--part-size", "20K") for _ in range(2))
    seen: dict[str, set[str]] = {}
    while first.process.poll() is None or second.process.poll() is None:
        for path in first.folder.glob(".*.bin"):  # who writes which part
            name, writer = path.name[1:].split(".", 1)
            seen.setdefault(name, set()).add(writer)
    assert (first.end()[0], second.end()[0]) == (0, 0)
    assert output(tmp_path / "out") == wanted
    assert len(seen) > 5 and max(map(len, seen.values())) == 1
    assert len({writer for writers in seen.values() for writer in writers}) > WORKERS
    assert {path.name for path in tmp_path.iterdir()} == {"out.bin", "out.idx", "out.meta.json"}
