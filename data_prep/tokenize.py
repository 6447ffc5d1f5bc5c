"""From text to a token file: a plan of parts, workers that make them, and a merge.

    inputs ──plan──▶ parts, made by any number of processes on any number of nodes ──merge──▶ PREFIX.bin, PREFIX.idx

The plan does not depend on who works; each document is encoded by itself; parts are merged in the plan's order. So the
bytes written depend on the input and the settings alone. Work may be killed at any moment: a rerun skips what is done
(see data_prep/parts.py), and does again what has changed since.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_prep import tokenizers
from data_prep.account import finish
from data_prep.claims import Claims, sweep
from data_prep.errors import UserError
from data_prep.held_engine import choose_engine, give_up
from data_prep.inputs import File, check_keys, describe, expand_inputs
from data_prep.merge import merge_parts
from data_prep.options import DEFAULTS, Options, default_workers
from data_prep.parts import disk_error, part_is_whole, read_json, remove_part, remove_parts, write_json
from data_prep.plan import Unit, make_plan, part_size, settings_digest
from data_prep.pool import cells, run_here, run_workers
from data_prep.progress import Progress
from data_prep.work import POLL_SECONDS, Counters, Job, PartMismatchError, done_parts

__all__ = ["Options", "tokenize"]

MERGING = "merging.json"
FORMAT = 1  # of what parts hold; a change makes all anew


def tokenize(
    inputs: Sequence[str | Path], tokenizer: str | Path, output_prefix: str | Path, options: Options = DEFAULTS
) -> dict[str, Any]:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.meta.json (or, see Options, PREFIX.parts); return what meta.json holds.

    inputs: files, folders, globs. tokenizer: its file or folder. Raises UserError; whatever happens, nothing
    half-written is left under the output's name, and finished parts stay for the next call.
    """
    prefix = str(output_prefix)
    if prefix.endswith(("/", os.sep)) or not Path(prefix).name:
        raise UserError(f"{prefix}: is a folder; name the files too, as in {prefix.rstrip('/')}/corpus", 2)
    folder = Path(f"{prefix}.parts")
    sweep(folder.parent, f".{folder.stem}.*")
    if not folder.exists():
        _refuse_existing(prefix, options)
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least 1", 2)
    files = [describe(path) for path in expand_inputs(inputs)]
    loaded = tokenizers.load_tokenizer(tokenizer)
    for wanted, role, option in ((options.append_eod, "eod", "--no-eod"), (options.prepend_bos, "bos", "--no-bos")):
        if wanted and getattr(loaded, role) is None:
            name = {"eod": "end-of-document", "bos": "begin-of-text"}[role]
            raise UserError(
                f"{loaded.path}: names no {name} token; put its tokenizer_config.json beside it, or use {option}", 2
            )
    check_keys(files, options.reading.key)
    settings = _settings(loaded, options)
    made_of = settings_digest({**settings, "files": [[str(f.path), f.form, f.size, f.mtime_ns] for f in files]})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if options.merge and not options.overwrite and _existing(prefix):
            if meta := _made(prefix, made_of):  # killed before it could clear away, or another was faster
                remove_parts(folder)
                return meta
            if read_json(folder / MERGING).get("made_of") != made_of:
                _refuse_existing(prefix, options)
            options = replace(options, overwrite=True)  # what is there was being put there by this very merge
        part_bytes = _part_bytes(folder, files, options.part_bytes)
        units = make_plan(files, settings_digest(settings), part_bytes, options.reading.text_documents == "file")
        with Progress(options.progress) as progress:
            _make_parts(folder, units, files, loaded, options, progress)
        if not options.merge:
            return finish(folder, units, files, loaded, options, made_of)
        return _merge(folder, prefix, units, files, loaded, options, made_of)
    except _DamagedPartsError:
        return tokenize(inputs, tokenizer, output_prefix, options)
    except (OSError, UserError) as error:
        if options.merge and not folder.exists() and (meta := _made(prefix, made_of)):
            return meta  # by the same command, given twice at the same time: it has cleared away under our feet
        if isinstance(error, OSError):
            raise disk_error(error.filename or folder, error) from error
        raise


class _DamagedPartsError(Exception):
    """Parts that were no more what had been written are removed; they are to be made anew."""


def _existing(prefix: str) -> list[Path]:
    return [path for ending in (".bin", ".idx", ".meta.json") if (path := Path(f"{prefix}{ending}")).exists()]


def _refuse_existing(prefix: str, options: Options) -> None:
    existing = _existing(prefix)
    if existing and not options.overwrite and options.merge:
        raise UserError(f"{existing[0]} exists; choose another --output, or --overwrite", 2)


def _made(prefix: str, made_of: str) -> dict[str, Any] | None:
    """The account of what lies under the output's name, if it is whole and made of just this input and settings."""
    meta = read_json(Path(f"{prefix}.meta.json"))
    return meta if meta.get("made_of") == made_of and len(_existing(prefix)) == 3 else None


def _merge(
    folder: Path,
    prefix: str,
    units: Sequence[Unit],
    files: Sequence[File],
    loaded: tokenizers.Tokenizer,
    options: Options,
    made_of: str,
) -> dict[str, Any]:
    """Join the parts, unless the same command, given twice, is at it: then wait for that."""
    with Claims(folder) as claims:
        waited = False
        while not claims.take("merge"):
            waited = True
            time.sleep(POLL_SECONDS)
        if (waited or not options.overwrite) and (meta := _made(prefix, made_of)):
            return meta
        _refuse_existing(prefix, options)
        finish(folder, units, files, loaded, options, made_of)
        # From here on files of the output's name are ours, should a kill leave but some of them.
        write_json(folder / MERGING, {"made_of": made_of})
        try:
            meta = merge_parts(folder, prefix, workers=_workers(options), overwrite=options.overwrite)
        except UserError:
            if not _remove_damaged(folder, units):
                raise
            raise _DamagedPartsError from None
        (folder / MERGING).unlink()
        if not options.keep_parts:
            remove_parts(folder)
        return meta


def _workers(options: Options) -> int:
    return default_workers() if options.workers is None else options.workers


def _settings(loaded: tokenizers.Tokenizer, options: Options) -> dict[str, Any]:
    """All that decides a document's ids and whether it is kept."""
    reading = asdict(options.reading)
    return {
        "format": FORMAT,
        "tokenizer": tokenizers.sha256(loaded.path),
        "ids": [loaded.vocab_size, loaded.bos, loaded.eod],
        "reading": reading,
        "eod": options.append_eod,
        "bos": options.prepend_bos,
        "special": options.parse_special,
    }


def _part_bytes(folder: Path, files: Sequence[File], wanted: int | None) -> int:
    """The size of parts: as asked for, as this folder's parts have it, or from the input's size."""
    path = folder / "plan.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        held = int(json.loads(path.read_text())["part_bytes"])
        if wanted in (None, held):
            return held
    size = wanted or part_size(files)
    write_json(path, {"part_bytes": size})
    return size


def _make_parts(
    folder: Path,
    units: Sequence[Unit],
    files: Sequence[File],
    loaded: tokenizers.Tokenizer,
    options: Options,
    progress: Progress,
) -> None:
    """Work until every part is there. An engine that proves wrong is given up, with all that it made."""
    total = max(1, sum(unit.size for unit in units))
    while True:
        left, _ = _state(folder, units)
        if not left:
            return
        engine = choose_engine(folder, files, loaded, options, progress)
        job = Job(
            folder, units, loaded.path, engine, options.reading,
            options.append_eod, options.prepend_bos, options.parse_special,
        )  # fmt: skip
        node, nodes = options.task
        workers = max(1, min(_workers(options), sum(16 if unit.open_ended else 1 for unit in left)))
        firsts = [(node * workers + i) * len(units) // (nodes * workers) for i in range(workers)]
        counters = [Counters(cells() if workers > 1 else None) for _ in range(workers)]
        shown = _Shown(folder, units, total, counters, progress)
        try:
            if workers == 1:
                run_here(job, firsts[0], loaded, counters[0], shown.look)
            else:
                run_workers(job, firsts, counters, shown.look)
            return
        except PartMismatchError as error:
            progress.say(
                f"engine {engine} gave other ids than the official tokenizer: {error}; its parts are made anew"
            )
            give_up(folder, engine, str(error))
            if options.engine == engine:
                raise UserError(
                    f"engine {engine} gave other ids than the official tokenizer: {error}; use --engine auto"
                ) from None


def _state(folder: Path, units: Sequence[Unit]) -> tuple[list[Unit], int]:
    """Units that are not done, and the bytes on disk of the parts that are."""
    left, done = [], 0
    for unit in units:
        for part, sidecar in done_parts(folder, unit):
            if sidecar is None:
                left.append(unit)
            else:
                done += part.size or sidecar["disk_bytes"]
    return left, done


def _remove_damaged(folder: Path, units: Sequence[Unit]) -> int:
    """Remove parts that are no more what was written, as a failing disk or a stray copy leaves them; how many."""
    removed = 0
    for unit in units:
        for part, sidecar in list(done_parts(folder, unit)):
            if sidecar is not None and not part_is_whole(folder, sidecar):
                remove_part(folder, part.name)
                removed += 1
    return removed


class _Shown:
    """Adds up what the workers of this process show, and now and then what others have finished."""

    def __init__(
        self, folder: Path, units: Sequence[Unit], total: int, counters: Sequence[Counters], progress: Progress
    ) -> None:
        self.folder, self.units, self.total = folder, units, total
        self.counters, self.progress = counters, progress
        self._next, self._finished = 0.0, 0

    def look(self) -> None:
        if not self.progress.shown:
            return
        now = time.monotonic()
        if now >= self._next:  # a look at every sidecar: rarely, when there are many
            _, self._finished = _state(self.folder, self.units)
            self._next = now + max(0.5, 20 * (time.monotonic() - now))
        sums = [sum(each.cells[i] for each in self.counters) for i in range(len(Counters.FIELDS))]
        self.progress.update(min(1.0, (self._finished + sums[0]) / self.total), sums[1], sums[2], sums[3])
