"""The five stages in order, or one of them, or one node's share of one."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.dedup import write
from data_prep.dedup.candidates import find_candidates
from data_prep.dedup.plan import ACCOUNTS, MARKER, Plan, Settings, make_plan
from data_prep.dedup.pool import Pool, default_workers
from data_prep.dedup.signatures import make_signatures
from data_prep.dedup.store import Reader
from data_prep.dedup.verify import decide, make_shingles, verify
from data_prep.errors import UserError

STAGES = ("signatures", "candidates", "shingles", "verify", "write")


def dedup(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: Settings | None = None,
    workers: int | None = None,
    stage: str | None = None,
    share: tuple[int, int] = (0, 1),
    keep_work: bool = False,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Write the documents that stay and the accounts to the folder `output`; return what report.json holds.

    stage: only this one of STAGES. share: (i, n), of n equal shares of its parts only number i from 0; `candidates`
    and `verify` are not shared. None is returned when files are left to write. keep_work: leave OUTPUT/.work, so that
    another threshold costs little; single stages always leave it. Raises UserError.
    """
    plan = make_plan(inputs, output, settings or Settings())
    if stage is None and (report := _finished(plan)):
        if not keep_work:
            shutil.rmtree(plan.work, ignore_errors=True)
        return report
    write.claim(plan)
    with _lock(plan, alone=stage is None) as locked, Pool(plan, workers or default_workers(), progress) as pool:
        if stage is None and locked:
            _sweep(plan)
        for before in STAGES[: STAGES.index(stage)] if stage else ():
            _require(plan, before)
        for name in STAGES if stage is None else (stage,):
            _run_stage(plan, pool, name, share)
        left = [number for number in range(len(plan.files)) if not write.is_written(plan, number)]
        if left or (stage or "write") != "write":
            return None
        report = write.write_accounts(plan)
    if stage is None and not keep_work:
        shutil.rmtree(plan.work, ignore_errors=True)
    return report


def _finished(plan: Plan) -> dict[str, Any] | None:
    """The report of a run that has done all this already, if its output is still there."""
    try:
        report: dict[str, Any] = json.loads((plan.output / "report.json").read_text(encoding="utf-8"))
        sizes = [file["size_on_disk"] for file in report["files"]]
        whole = sizes == [plan.target(file).stat().st_size for file in plan.files]
        return report if whole and report["digest"] == plan.verify_key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _lock(plan: Plan, alone: bool) -> Iterator[bool]:
    """Keep a second whole run out of the same folder; single stages may be many at a time. False: cannot lock here."""
    try:
        plan.work.mkdir(parents=True, exist_ok=True)
        file = (plan.work / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write {plan.work}: {error.strerror}; free space there, or write elsewhere") from error
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{plan.output}: another herd prep dedup writes there; wait for it, or end it") from None
        except OSError:
            yield False  # a file system without locks: parts are written so that two runs do no harm
            return
        yield True


def _sweep(plan: Plan) -> None:
    """Remove what killed runs left half-written. Only for who is alone."""
    left = list(plan.work.rglob("*.tmp"))
    for target in [plan.target(file) for file in plan.files] + [plan.output / name for name in (*ACCOUNTS, MARKER)]:
        left += target.parent.glob(f".{glob.escape(target.name)}.*.tmp")
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _run_stage(plan: Plan, pool: Pool, stage: str, share: tuple[int, int]) -> None:
    """Make what is missing of a stage."""
    tasks = range(len(plan.tasks))
    if stage == "signatures":
        _make(pool, stage, make_signatures, tasks, plan.signature_file, share)
    elif stage == "candidates":
        if not plan.candidates.is_dir():
            find_candidates(plan, pool)
    elif stage == "shingles":
        _make(pool, stage, make_shingles, tasks, plan.shingle_file, share)
    elif stage == "verify":
        if not plan.decisions.exists():
            parts = range(Reader(plan.candidates / "members").meta["tasks"])
            _make(pool, stage, verify, parts, plan.verify_file, (0, 1))
            decide(plan, parts)
    else:
        write.drop_report(plan)
        files = range(len(plan.files))[share[0] :: share[1]]
        pool.run(stage, write.write_file, [number for number in files if not write.is_written(plan, number)])


def _make(
    pool: Pool,
    stage: str,
    work: Callable[[Plan, int], None],
    parts: Sequence[int],
    path: Callable[[int], Path],
    share: tuple[int, int],
) -> None:
    """Make those parts of a share whose files are not there."""
    pool.run(stage, work, [part for part in parts[share[0] :: share[1]] if not path(part).exists()])


def _require(plan: Plan, stage: str) -> None:
    """Raise UserError when a stage before has not been finished with these inputs and settings."""
    made: dict[str, list[Path]] = {
        "signatures": [plan.signature_file(task) for task in range(len(plan.tasks))],
        "candidates": [plan.candidates],
        "shingles": [plan.shingle_file(task) for task in range(len(plan.tasks))],
        "verify": [plan.decisions],
    }
    missing = [path for path in made[stage] if not path.exists()]
    if missing:
        raise UserError(
            f"{plan.output}: {len(missing)} of {len(made[stage])} parts of --stage {stage} are missing"
            f" (first: {missing[0].name}); run it first, with the same inputs and settings",
            2,
        )
