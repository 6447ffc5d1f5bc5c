"""What all parts come to: totals, the log of bad lines, and the refusals that can only be said at the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from data_prep import tokenizers
from data_prep.claims import signature, sweep
from data_prep.errors import UserError
from data_prep.indexed import token_dtype
from data_prep.inputs import File, describe
from data_prep.options import Options, herd_version
from data_prep.parts import LIST, remove_part, remove_parts, write_json
from data_prep.plan import PART_NAME, Unit
from data_prep.readers import SHOWN, Tally
from data_prep.work import done_parts


def finish(
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
        remove_parts(folder)
        raise UserError(f"{files[0].path}: no document in {len(files)} file(s), {tally.lines:,} lines; check the input")
    for path in folder.glob("*.json"):  # of an earlier input or setting
        if PART_NAME.search(name := path.name.removesuffix(".json")) and name not in kept:
            remove_part(folder, name)
    for path in folder.glob("*.claim"):  # of a worker that died when its part was done
        if path.stem in kept:
            path.unlink(missing_ok=True)
    sweep(folder)
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
