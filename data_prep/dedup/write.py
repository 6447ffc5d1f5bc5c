"""Last stage: each file's lines that stay, byte for byte in the file's own packing, and then the accounts."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup import lines
from data_prep.dedup.candidates import Catalogue, catalogue
from data_prep.dedup.plan import ACCOUNTS, MARKER, Plan
from data_prep.dedup.store import Reader, replacing
from data_prep.errors import UserError

GZIP_LEVEL, ZSTD_LEVEL = 2, 3  # isal's levels go to 3; 2 is about zlib's 3 at several times its speed


class Decisions:
    """What goes and why, mapped from the file of the stage before."""

    def __init__(self, plan: Plan):
        reader = Reader(plan.decisions)
        self.meta = reader.meta
        self.removed, self.kept = reader["removed"].astype(np.int64), reader["kept"].astype(np.int64)
        self.jaccard, self.exact, self.copy = reader["jaccard"], reader["exact"], reader["copy"]
        self.line = Reader(plan.candidates / "documents")["line"]

    def range(self, first: int, last: int) -> slice:
        """The removed among documents first to last - 1."""
        a, b = np.searchsorted(self.removed, [first, last]).tolist()
        return slice(a, b)


@lru_cache(maxsize=1)
def decisions(plan: Plan) -> Decisions:
    """The decisions, once in a process."""
    return Decisions(plan)


@contextlib.contextmanager
def _packed(file: BinaryIO, packing: str) -> Iterator[BinaryIO]:
    """A file to write plain bytes to. Its bytes depend on nothing but theirs: no time, no name."""
    if packing == lines.GZIP:
        from isal import igzip

        with igzip.IGzipFile(filename="", fileobj=file, mode="wb", compresslevel=GZIP_LEVEL, mtime=0) as packer:
            yield cast(BinaryIO, io.BufferedWriter(packer, 1 << 20))
    elif packing == lines.ZSTD:
        import zstandard

        packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).stream_writer(file, closefd=False)
        with packed:
            yield cast(BinaryIO, packed)
    else:
        yield file


def _staying(data: bytes, keep: NDArray[np.bool_]) -> bytes:
    """The lines of a block for which `keep` is true."""
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10) + 1
    if len(ends) < len(keep):
        ends = np.append(ends, len(data))  # the last line has no end
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    begins = np.concatenate([[0], ends])
    view = memoryview(data)
    return b"".join([view[a:b] for a, b in begins[edges].reshape(-1, 2).tolist()])


def write_file(plan: Plan, number: int) -> None:
    """Write one file's staying lines, then the mark with its account."""
    file, known, decided = plan.files[number], catalogue(plan), decisions(plan)
    first, last = known.file_range(number)
    documents = np.arange(first, last)
    _, staying = known.place(documents, decided.line[first:last])
    chosen = decided.range(first, last)
    alive = np.ones(last - first, dtype=bool)
    alive[decided.removed[chosen] - first] = False
    staying = staying[alive]
    bytes_in = bytes_out = 0
    for mark in plan.written(number).parent.glob(f"{number:06d}-*"):
        mark.unlink(missing_ok=True)  # of other settings: the file they tell of is replaced now
    with replacing(plan.target(file)) as out, _packed(out, file.packing) as packed:
        for block in lines.read_blocks(file.path):
            bytes_in += block.overlong or len(block.data)
            a, b = np.searchsorted(staying, [block.line, block.line + block.count]).tolist()
            keep = np.zeros(block.count, dtype=bool)
            keep[staying[a:b] - block.line] = True
            part = block.data if keep.all() else _staying(block.data, keep)
            packed.write(part)
            bytes_out += len(part)
        packed.flush()
    pieces = [piece for piece in known.pieces if piece["file"] == number]
    sums = {name: sum(piece[name] for piece in pieces) for name in ("lines", "blank", "bad", "filtered", "documents")}
    copies = int(decided.copy[chosen].sum())
    account = {
        "file": str(file.path),
        "output": file.name,
        **sums,
        "exact_removed": copies,
        "near_removed": chosen.stop - chosen.start - copies,
        "kept": len(staying),
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "size_on_disk": plan.target(file).stat().st_size,
    }
    _write_json(plan.written(number), account)


def is_written(plan: Plan, number: int) -> bool:
    """Whether a file's output is there, whole, of these settings."""
    try:
        account = json.loads(plan.written(number).read_text(encoding="utf-8"))
        return bool(plan.target(plan.files[number]).stat().st_size == account["size_on_disk"])
    except (OSError, ValueError):
        return False


def _write_json(path: Any, value: Any) -> None:
    with replacing(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "surrogateescape"))


def _write_lines(path: Any, records: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape"))


def write_accounts(plan: Plan) -> dict[str, Any]:
    """Write removed.jsonl, bad.jsonl, filtered.jsonl, examples.md and, last, report.json; return the report."""
    from data_prep.dedup.examples import write_examples

    known, decided = catalogue(plan), decisions(plan)
    _write_lines(plan.output / "removed.jsonl", _removed(plan, known, decided))
    _write_lines(plan.output / "bad.jsonl", _left_out(plan, known, "bad"))
    if plan.settings.log_filtered:
        _write_lines(plan.output / "filtered.jsonl", _left_out(plan, known, "filtered"))
    else:
        (plan.output / "filtered.jsonl").unlink(missing_ok=True)
    write_examples(plan, known, decided)
    report = make_report(plan, known, decided)
    _write_json(plan.output / "report.json", report)
    return cast(dict[str, Any], json.loads(json.dumps(report)))  # as a reader of the file has it


def make_report(plan: Plan, known: Catalogue, decided: Decisions) -> dict[str, Any]:
    """The account of the whole, see `herd prep dedup --help`."""
    files = [json.loads(plan.written(number).read_text(encoding="utf-8")) for number in range(len(plan.files))]
    names = ("lines", "blank", "bad", "filtered", "documents", "exact_removed", "near_removed", "kept")
    totals = {name: sum(file[name] for file in files) for name in (*names, "bytes_in", "bytes_out")}
    causes: dict[str, Counter[str]] = {"bad": Counter(), "filtered": Counter()}
    for piece in known.pieces:
        for kind, counter in causes.items():
            counter.update(dict(piece[f"{kind}_causes"]))
    near = ~decided.copy
    settings = describe(plan)
    return {
        **totals,
        "near_clusters": len(np.unique(decided.kept[near])),
        "largest_clusters": _largest(plan, known, decided),
        "pairs_compared": decided.meta.get("compared", 0),
        "documents_in_full_buckets": decided.meta.get("limited", 0),
        "bad_causes": dict(sorted(causes["bad"].items())),
        "bad_examples": known.bad_examples(),
        "filtered_causes": dict(sorted(causes["filtered"].items())),
        "settings": settings,
        "digest": plan.verify_key,
        "files": files,
    }


def describe(plan: Plan) -> dict[str, Any]:
    """The settings as the report names them; those that do not change the output are left out."""
    inner = ("task_bytes", "partition_entries")
    return {name: value for name, value in asdict(plan.settings).items() if name not in inner}


def _largest(plan: Plan, known: Catalogue, decided: Decisions) -> list[dict[str, Any]]:
    """The kept documents that most others went for, and how many of either kind."""
    kept, counts = np.unique(decided.kept, return_counts=True)
    order = np.lexsort((kept, -counts))[:10]
    file, line = known.place(kept[order], decided.line[kept[order]])
    return [
        {"file": str(plan.files[f].path), "line": n, "removed": count}
        for f, n, count in zip(file.tolist(), line.tolist(), counts[order].tolist(), strict=True)
    ]


def _removed(plan: Plan, known: Catalogue, decided: Decisions) -> Iterator[dict[str, Any]]:
    names = [str(file.path) for file in plan.files]
    for at in range(0, len(decided.removed), 1 << 16):
        part = slice(at, at + (1 << 16))
        removed, kept = decided.removed[part], decided.kept[part]
        places = (*known.place(removed, decided.line[removed]), *known.place(kept, decided.line[kept]))
        columns = [column.tolist() for column in (*places, decided.jaccard[part], decided.exact[part])]
        for file, line, kept_file, kept_line, value, exact in zip(*columns, strict=True):
            yield {
                "file": names[file],
                "line": line,
                "kind": "exact" if exact else "near",
                "kept_file": names[kept_file],
                "kept_line": kept_line,
                "jaccard": value,
            }


def _left_out(plan: Plan, known: Catalogue, kind: str) -> Iterator[dict[str, Any]]:
    number = 0
    for part in known.parts:
        for index, piece in enumerate(part.meta["pieces"]):
            path, before = str(plan.files[piece["file"]].path), int(known.lines_before[number])
            causes = [cause for cause, _ in piece[f"{kind}_causes"]]
            found = zip(part[f"{kind}_line{index}"].tolist(), part[f"{kind}_cause{index}"].tolist(), strict=True)
            for line, cause in found:
                yield {"file": path, "line": before + line, "cause": causes[cause]}
            number += 1


def claim(plan: Plan) -> None:
    """Make the output folder ours. Raises UserError when it holds files that are not ours to replace."""
    marker = plan.output / MARKER
    if not marker.exists():
        taken = [plan.target(file) for file in plan.files] + [plan.output / name for name in ACCOUNTS]
        for path in taken:
            if path.exists():
                raise UserError(f"{path} exists and is not of herd prep dedup; choose another --output", 2)
        with replacing(marker) as file:
            file.write("".join(f"{name}\n" for name in ACCOUNTS).encode())


def drop_report(plan: Plan) -> None:
    """Remove an older report, so that it never stands beside files that it does not tell of."""
    path = plan.output / "report.json"
    try:
        if json.loads(path.read_text(encoding="utf-8"))["digest"] == plan.verify_key:
            return
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    path.unlink(missing_ok=True)
