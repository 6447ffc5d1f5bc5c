"""Claims: of those who want a part one gets it; the dead, and only they, lose theirs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep import claims
from data_prep.claims import Claims, left_behind, signature

CONTEXT = multiprocessing.get_context("spawn")


def refuse(*_: object) -> None:
    raise OSError(95, "Operation not supported")


def race(folder: Path, count: int, links: bool, start: Any, end: Any, out: Any) -> None:
    """Take what can be had of `count` parts, at the same time as others."""
    if not links:
        os.link = refuse  # type: ignore[assignment]
    with Claims(folder) as mine:
        start.wait()
        out.put([i for i in range(count) if mine.take(f"part-{i}")])
        end.wait()  # alive until all are through


def winners(folder: Path, count: int, processes: int, links: bool) -> list[list[int]]:
    start, end, out = CONTEXT.Barrier(processes), CONTEXT.Barrier(processes), CONTEXT.Queue()
    running = [CONTEXT.Process(target=race, args=(folder, count, links, start, end, out)) for _ in range(processes)]
    for process in running:
        process.start()
    found = [out.get(timeout=60) for _ in running]
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    return found


@pytest.mark.parametrize("links", [True, False], ids=["hard_links", "no_hard_links"])
@pytest.mark.parametrize("dead", [False, True], ids=["free", "of_the_dead"])
def test_of_several_who_race_for_a_part_exactly_one_gets_it(tmp_path: Path, dead: bool, links: bool) -> None:
    count = 600
    if dead:
        left = Claims(tmp_path)
        left._me["started"] -= 1000  # another process had this number once
        assert all(left.take(f"part-{i}") for i in range(count))
    found = winners(tmp_path, count, 3, links)
    assert Counter(i for won in found for i in won) == Counter(range(count))
    assert sum(bool(won) for won in found) > 1 or not dead  # or there was no race
    assert list(tmp_path.iterdir()) == []  # each gave back what it had, and nothing else is left


def held_by_another(folder: Path, then: str) -> subprocess.Popen[str]:
    """A process that claims "a" and then does what `then` says."""
    code = f"""
import os, sys, time
from pathlib import Path
from data_prep.claims import Claims
mine = Claims(Path(sys.argv[1]))
assert mine.take("a")
print("taken", flush=True)
{then}
"""
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    return process


def test_a_live_process_keeps_its_claim_and_a_killed_one_loses_it_at_once(tmp_path: Path) -> None:
    process = held_by_another(tmp_path, "time.sleep(60)")
    mine = Claims(tmp_path)
    os.utime(tmp_path / "a.claim", (0, 0))  # on its own machine silence says nothing
    assert not mine.take("a")
    process.send_signal(signal.SIGSTOP)
    assert not mine.take("a")
    process.kill()
    time.sleep(0.2)  # killed and not waited for: a zombie, which has its number still
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    assert mine.take("a")
    process.wait()
    mine.release("a")
    assert list(tmp_path.iterdir()) == []


def test_a_recycled_process_number_is_no_owner(tmp_path: Path) -> None:
    first, mine = Claims(tmp_path), Claims(tmp_path)
    assert first.take("a") and not mine.take("a")
    owner = json.loads((tmp_path / "a.claim").read_text())
    (tmp_path / "a.claim").write_text(json.dumps({**owner, "started": owner["started"] - 5}))
    assert mine.take("a")


def test_a_claim_of_another_machine_holds_until_it_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "STALE_SECONDS", 30)
    path, mine = tmp_path / "a.claim", Claims(tmp_path)
    for owner in ({"host": "far", "machine": "boot", "pid": 1, "started": 1.0}, {**mine._me, "machine": "container"}):
        path.write_text(json.dumps(owner))
        assert not mine.take("a")
        os.utime(path, (time.time() - 29, time.time() - 29))
        assert not mine.take("a")
        os.utime(path, (time.time() - 31, time.time() - 31))
        assert mine.take("a")
        mine.release("a")
    path.write_text("")  # being written this moment, where there are no hard links
    assert not mine.take("a")
    os.utime(path, (0, 0))
    assert mine.take("a")


def test_claims_are_touched_while_they_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.01)
    with Claims(tmp_path) as mine:
        assert mine.take("a")
        os.utime(tmp_path / "a.claim", (0, 0))
        end = time.monotonic() + 5
        while (tmp_path / "a.claim").stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert time.time() - (tmp_path / "a.claim").stat().st_mtime < 5
    assert list(tmp_path.iterdir()) == []


def test_who_was_taken_for_dead_does_not_give_back_what_is_anothers(tmp_path: Path) -> None:
    slow, mine = Claims(tmp_path), Claims(tmp_path)
    assert slow.take("a")
    (tmp_path / "a.claim").unlink()
    assert mine.take("a")
    slow.release("a")
    assert (tmp_path / "a.claim").exists()
    mine.release("a")
    assert list(tmp_path.iterdir()) == []


def test_the_death_of_one_that_removes_a_dead_claim_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mine = tmp_path / "a.claim", Claims(tmp_path)
    dying = [Claims(tmp_path) for _ in range(4)]
    for each in dying:
        each._me["started"] -= 1000
    assert dying[0].take("a")
    with monkeypatch.context() as patch:  # each is killed when it has made its heir
        patch.setattr(Claims, "_release", lambda *_: None)
        unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda self, **how: how and unlink(self, **how))
        for each in dying[1:]:
            each._clear_if_dead(path)
    assert len(list(tmp_path.glob(".*.heir"))) == 3
    start, looks = time.monotonic(), 1
    while not mine.take("a"):
        looks += 1
    assert looks <= 4 and time.monotonic() - start < 5
    mine.release("a")
    assert list(tmp_path.iterdir()) == []


def test_who_removes_a_dead_claim_on_another_machine_is_left_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "STALE_SECONDS", 30)
    dead, far, mine = Claims(tmp_path), Claims(tmp_path), Claims(tmp_path)
    dead._me["started"] -= 1000
    assert dead.take("a")
    far._me["host"] = "far"
    with monkeypatch.context() as patch:
        patch.setattr(Claims, "_release", lambda *_: None)
        assert far._clear_if_dead(tmp_path / "a.claim")
    (heir,) = tmp_path.glob(".*.heir")
    heir_text = heir.read_text()
    (tmp_path / "a.claim").write_text(dead._held[tmp_path / "a.claim"])
    assert not mine.take("a") and heir.read_text() == heir_text
    os.utime(heir, (time.time() - 31, time.time() - 31))
    assert not mine.take("a") and not heir.exists()
    assert mine.take("a")


def test_what_the_dead_left_behind_is_found_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, pid = signature().rsplit(".", 1)
    assert int(pid) == os.getpid()
    names = {f".a.{here}.{gone.pid}.bin", f".b.{here}.{gone.pid}", ".c.far-0123abcd.7.bin"}
    others = {f".a.{here}.{pid}.bin", ".d.far-0123abcd.8.bin", ".hidden", ".x-0123.7", f"b.{here}.{gone.pid}"}
    for name in names | others:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".c.far-0123abcd.7.bin", (0, 0))  # another machine's, and old
    heirs = {"dead": 1000, "alive": 0}
    for name, ago in heirs.items():
        mine = Claims(tmp_path)
        mine._me["started"] -= ago
        mine._create(tmp_path / f".{name}.heir")
    (tmp_path / ".far.heir").write_text('{"host": "far"}')
    assert {path.name for path in left_behind(tmp_path)} == names | {".dead.heir"}
