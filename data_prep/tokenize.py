"""From text to a token file: a plan of parts, workers that make them, and a merge.

    inputs ──plan──▶ parts, made by any number of processes on any number of nodes ──merge──▶ PREFIX.bin, PREFIX.idx

The plan does not depend on who works; each document is encoded by itself; parts are merged in the plan's order. So the
bytes written depend on the input and the settings alone. Work may be killed at any moment: a rerun skips what is done
(see data_prep/parts.py), and does again what has changed since.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from data_prep import engines, tokenizers
from data_prep.claims import Claims, left_behind, signature
from data_prep.errors import UserError
from data_prep.indexed import token_dtype
from data_prep.inputs import PARQUET, TEXT, File, check_keys, describe, expand_inputs
from data_prep.merge import merge_parts
from data_prep.parts import LIST, disk_error, part_is_whole, remove_part, write_json
from data_prep.parts_file import read_meta
from data_prep.plan import PART_NAME, Unit, make_plan, part_size, settings_digest
from data_prep.pool import cells, run_here, run_workers
from data_prep.progress import Progress
from data_prep.readers import SHOWN, Reader, Reading, Tally
from data_prep.work import POLL_SECONDS, Counters, Job, PartMismatchError, done_parts

__all__ = ["Options", "default_workers", "herd_version", "read_meta", "tokenize"]

SAMPLE_BYTES, SAMPLE_FILES = 2_000_000, 16  # of the input, for the choice of the engine
ENGINE, MERGING = "engine.json", "merging.json"
FORMAT = 1  # of what parts hold; a change makes all anew


@dataclass(frozen=True)
class Options:
    """What is asked of `tokenize` beside input, tokenizer and output.

    key: where a record's text is (None: text or content, found file by file). append_eod, prepend_bos: the tokenizer's
    end-of-document and begin-of-text ids around each document. parse_special: control tokens spelled in the text become
    control ids. text_documents: what a document is in a text file, file or line. engine: auto, official, or a fast
    one's name. workers: processes (None: all cores). max_bad: share of bad lines above which nothing is written.
    allow_damaged: take what can be read of damaged packed files. part_bytes: size of a part (None: from the input's).
    task: (index, count) of a node among several that work together; then nothing is merged. merge: write PREFIX.bin and
    .idx; else leave the folder of parts. keep_parts: leave it although it was merged.
    """

    reading: Reading = field(default_factory=Reading)
    append_eod: bool = True
    prepend_bos: bool = False
    parse_special: bool = False
    engine: str = "auto"
    workers: int | None = None
    max_bad: float = 0.01
    allow_damaged: bool = False
    part_bytes: int | None = None
    task: tuple[int, int] = (0, 1)
    merge: bool = True
    keep_parts: bool = False
    overwrite: bool = False
    progress: bool = False


def default_workers() -> int:
    """Cores this process may use (a Slurm job's share, not the whole node's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def herd_version() -> str:
    """The installed version, or "unknown" when herd runs from a bare checkout."""
    try:
        return importlib.metadata.version("herd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def tokenize(
    inputs: Sequence[str | Path], tokenizer: str | Path, output_prefix: str | Path, options: Options = Options()
) -> dict[str, Any]:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.meta.json (or, see Options, PREFIX.parts); return what meta.json holds.

    inputs: files, folders, globs. tokenizer: its file or folder. Raises UserError; whatever happens, nothing
    half-written is left under the output's name, and finished parts stay for the next call.
    """
    prefix = str(output_prefix)
    if prefix.endswith(("/", os.sep)) or not Path(prefix).name:
        raise UserError(f"{prefix}: is a folder; name the files too, as in {prefix.rstrip('/')}/corpus", 2)
    folder = Path(f"{prefix}.parts")
    _sweep(folder.parent, f".{folder.stem}.*")
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
        _sweep(folder)
        if options.merge and not options.overwrite and _existing(prefix):
            if meta := _made(prefix, made_of):  # killed before it could clear away, or another was faster
                _remove(folder)
                return meta
            if _read_json(folder / MERGING).get("made_of") != made_of:
                _refuse_existing(prefix, options)
            options = replace(options, overwrite=True)  # what is there was being put there by this very merge
        part_bytes = _part_bytes(folder, files, options.part_bytes)
        units = make_plan(files, settings_digest(settings), part_bytes, options.reading.text_documents == "file")
        with Progress(options.progress) as progress:
            _make_parts(folder, units, files, loaded, options, progress)
        if not options.merge:
            return _finish(folder, units, files, loaded, options, made_of)
        return _merge(folder, prefix, units, files, loaded, options, made_of)
    except _DamagedPartsError:
        return tokenize(inputs, tokenizer, output_prefix, options)
    except (OSError, UserError) as error:
        if options.merge and not folder.exists() and (meta := _made(prefix, made_of)):
            return meta  # by the same command, given twice at the same time: it has cleared away under our feet
        if isinstance(error, OSError):
            raise disk_error(error.filename or folder, error) from error
        raise


def _sweep(folder: Path, pattern: str = ".*") -> None:
    """Remove what processes that are gone left aside."""
    for path in left_behind(folder, pattern):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
    meta = _read_json(Path(f"{prefix}.meta.json"))
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
        _finish(folder, units, files, loaded, options, made_of)
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
            _remove(folder)
        return meta


def _remove(folder: Path) -> None:
    """Remove the parts: first from where others look, who may be writing this moment."""
    aside = folder.with_name(f".{folder.name}.{signature()}.done")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


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


def _sample(files: Sequence[File], reading: Reading) -> list[str]:
    """Texts from all over the input: the engine is chosen on them."""
    chosen = [files[i * len(files) // min(len(files), SAMPLE_FILES)] for i in range(min(len(files), SAMPLE_FILES))]
    generator, texts, reader = random.Random(0), [], Reader(reading)
    for file in chosen:
        room = SAMPLE_BYTES // len(chosen)
        plain = file.form not in (PARQUET, TEXT) and not file.path.name.endswith((".gz", ".zst"))
        start = int(generator.random() * max(0, file.size - room)) if plain else 0
        for batch in reader.read(file, start, None):
            texts += [text for text in batch.texts if len(text) <= room]
            room -= batch.text_bytes
            if room <= 0:
                break
        reader.close()
    return texts


def _choose_engine(
    folder: Path, files: Sequence[File], loaded: tokenizers.Tokenizer, options: Options, progress: Progress
) -> str:
    """The engine to work with: as chosen before in this folder, or chosen now; engines that proved wrong never again."""
    held = _held_engine(folder)
    asked = {"wanted": options.engine, "tokenizer": tokenizers.sha256(loaded.path), "special": options.parse_special}
    if held.get("asked") == asked and held.get("name"):
        return str(held["name"])
    refused = held.get("wrong", {})
    choice = engines.choose(
        loaded, _sample(files, options.reading), folder, options.engine, refused, special=options.parse_special
    )
    speeds = ", ".join(f"{name} {speed:.0f} MB/s" for name, speed in choice.speeds.items())
    progress.say(f"engine: {choice.name}, the same ids as the official tokenizer on a sample ({speeds} a core)")
    for name, why in choice.refused.items():
        progress.say(f"not {name}: {why}")
    write_json(folder / ENGINE, {"name": choice.name, "asked": asked, "speeds": choice.speeds, "wrong": refused})
    return choice.name


def _held_engine(folder: Path) -> dict[str, Any]:
    return _read_json(folder / ENGINE)


def _read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} when it is not there or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


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
        engine = _choose_engine(folder, files, loaded, options, progress)
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
            _give_up(folder, engine, str(error))
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


def _give_up(folder: Path, engine: str, why: str) -> None:
    held = _held_engine(folder)
    write_json(folder / ENGINE, {"wrong": {**held.get("wrong", {}), engine: why}})
    for path in folder.glob("*.json"):
        if not PART_NAME.search(path.name.removesuffix(".json")):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(path.read_text()).get("engine") == engine:
                remove_part(folder, path.name.removesuffix(".json"))


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


def _finish(
    folder: Path,
    units: Sequence[Unit],
    files: Sequence[File],
    loaded: tokenizers.Tokenizer,
    options: Options,
    made_of: str,
) -> dict[str, Any]:
    """Add up all parts, write the log of bad lines and parts.json; what becomes meta.json.

    Raises UserError when too much was bad, when a file is damaged or has changed meanwhile, when nothing is there.
    """
    if changed := [file.path for file in files if describe(file.path) != file]:
        raise UserError(
            f"{changed[0]}: changed while it was read ({len(changed)} of {len(files)} file(s) did); run the same command "
            f"again, which reads such files anew"
        )
    tally, parts, damaged, kept = Tally(), [], {}, set()
    text_bytes = checked = 0
    lines: dict[str, int] = {}  # of each file, in the parts before
    log_path = Path(f"{str(folder).removesuffix('.parts')}.rejected.jsonl")
    shown: list[str] = []
    used: set[str] = set()
    aside = log_path.with_name(f".{log_path.name}.{signature()}.tmp")
    logged = 0
    with aside.open("wb") as log:
        for unit in units:
            for part, sidecar in done_parts(folder, unit):
                if sidecar is None:
                    raise UserError(
                        f"{folder}: part {part.name} is missing; run the same command again, which makes it"
                    )
                kept.add(part.name)
                tally.add(Tally.of_json(sidecar["tally"]))
                text_bytes, checked = text_bytes + sidecar["text_bytes"], checked + sidecar["checked_documents"]
                used.add(sidecar["engine"])
                names = ("documents", "sequences", "tokens", "bin_xxh3", "idx_xxh3")
                parts.append({"name": part.name, **{name: sidecar[name] for name in names}})
                before = {i: lines.get(span["file"], 0) for i, span in enumerate(sidecar["spans"])}
                for fault in _log_of(folder, part.name):
                    fault["line"] += before[fault.pop("span")]
                    log.write(msgspec.json.encode(fault) + b"\n")
                    logged += 1
                    if not fault["kept"] and len(shown) < SHOWN:
                        detail = f" ({fault['detail']})" if fault["detail"] else ""
                        shown.append(f"{fault['file']}:{fault['line']}: {fault['cause']}{detail}")
                for span in sidecar["spans"]:
                    lines[span["file"]] = lines.get(span["file"], 0) + span["lines"]
                    if span["damage"]:
                        damaged[span["file"]] = f"{span['damage']} after line {lines[span['file']]:,}"
        log.flush()
        os.fsync(log.fileno())
    if logged:
        aside.replace(log_path)
    else:
        aside.unlink()
        log_path.unlink(missing_ok=True)
    tally.check(options.max_bad, [*shown, f"all in {log_path}"])
    if damaged and not options.allow_damaged:
        told = "; ".join(f"{path}: {why}" for path, why in list(damaged.items())[:SHOWN])
        raise UserError(
            f"{len(damaged)} file(s) cannot be read to the end: {told}. All else is done and kept: fetch them again and "
            f"run the same command, or take what could be read with --allow-damaged"
        )
    if not tally.documents:
        _remove(folder)
        raise UserError(f"{files[0].path}: no document in {len(files)} file(s), {tally.lines:,} lines; check the input")
    for path in folder.glob("*.json"):  # of an earlier input or setting
        if PART_NAME.search(name := path.name.removesuffix(".json")) and name not in kept:
            remove_part(folder, name)
    for path in folder.glob("*.claim"):  # of a worker that died when its part was done
        if path.stem in kept:
            path.unlink(missing_ok=True)
    _sweep(folder)
    dtype = token_dtype(loaded.vocab_size).newbyteorder("<")
    meta = {
        "herd_version": herd_version(),
        "made_of": made_of,
        "tokenizer": str(loaded.path.resolve()),
        "tokenizer_sha256": tokenizers.sha256(loaded.path),
        "tokenizer_kind": loaded.kind,
        "engine": sorted(used),
        "checked_documents": checked,
        "vocab_size": loaded.vocab_size,
        "bos": loaded.bos,
        "eod": loaded.eod,
        "append_eod": options.append_eod,
        "prepend_bos": options.prepend_bos,
        "parse_special": options.parse_special,
        "dtype": str(dtype),
        "documents": tally.documents,
        "tokens": sum(part["tokens"] for part in parts),
        "text_bytes": text_bytes,
        "lines": tally.lines,
        "blank_lines": tally.blank,
        "repaired_documents": tally.repaired,
        "bad_lines": tally.bad_lines,
        "bad_causes": dict(sorted(tally.bad.items())),
        "bad_examples": shown,
        "filtered": dict(sorted(tally.filtered.items())),
        "damaged": damaged,
        "key": options.reading.key,
        "filters": asdict(options.reading.filters) if options.reading.filters else None,
        "inputs": [{"path": str(file.path), "bytes": file.size} for file in files],
    }
    write_json(folder / LIST, {"herd_parts": 1, "dtype": dtype.str, "parts": parts, "meta": meta})
    return meta


def _log_of(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """A part's bad lines. Read as bytes: a text's own line separators, such as U+2028, end no line of the log."""
    with contextlib.suppress(FileNotFoundError), (folder / f"{name}.log.jsonl").open("rb") as log:
        for line in log:
            yield msgspec.json.decode(line)
