"""Memory and time of `herd prep tokenize` as input grows, and on input that is hard on memory.

python benchmarks/prep_scale.py [--only NAME ...] [--folder DIR] runs the real command in a session of its own and notes the
peak of each of its processes (VmHWM, which counts libraries that all share; and USS, what it alone holds, sampled):

- size_1, size_4, size_16: 200 MB of real text, and 4 and 16 times as much (hard links to it);
- line_60mb, line_60mb_wide: records of 60 MB, the second with one character that makes Python's string 4 bytes a letter;
- text_2gb: one text file, which is one document;
- bomb_lines, bomb: a zstd file that is 30,000 times smaller than its lines of one letter, or than its only line;
- parquet_group, parquet_books: row groups of 1 GB, the second of 200 books, which the writer puts into one page: the one
  case whose memory is not ours to bound (data_prep/parquet.py);
- all_bad: 100 MB of short lines of which none is a record;
- plan_50gb, plan_5tb, plan_small_files: no encoding; sparse files, all parts planted as done: what the plan, a look at all
  parts and the adding up take. plan_small_files has 200,000 files of 25 MB.

Writes benchmarks/results/prep_scale-CPU.json; needs 7 GB of disk, which it gives back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data_prep import demo_text  # noqa: E402
from tests import material  # noqa: E402

MB = 1_000_000
SAMPLE_SECONDS = 0.1


def peak_mb(pid: int) -> int:
    """The most memory that a process had so far (ru_maxrss would count the one it was forked from)."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def watch(process: subprocess.Popen[str]) -> dict[int, dict[str, Any]]:
    """Until it ends: the peaks of all processes of its session, in MiB."""
    seen: dict[int, dict[str, Any]] = {}
    while process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            try:
                words = " ".join(one.cmdline())
                name = "worker" if "spawn_main" in words else "parent" if one.pid == process.pid else "other"
                facts = seen.setdefault(one.pid, {"name": name, "peak_mb": 0, "uss_mb": 0})
                facts["peak_mb"] = max(facts["peak_mb"], peak_mb(one.pid))
                facts["uss_mb"] = max(facts["uss_mb"], one.memory_full_info().uss >> 20)
            except (psutil.Error, OSError):
                continue
        time.sleep(SAMPLE_SECONDS)
    return seen


def run(inputs: Path, tokenizer: Path, output: Path, *words: str) -> dict[str, Any]:
    """The real command; what it says of itself, and its processes' peaks."""
    command = [sys.executable, "-m", "launch.cli", "prep", "tokenize", str(inputs), "--tokenizer", str(tokenizer)]
    command += ["--output", str(output), "--workers", "2", "--json", *words]
    start = time.perf_counter()
    with (output.with_suffix(".out")).open("w+") as out, (output.with_suffix(".err")).open("w+") as errors:
        process = subprocess.Popen(
            command, cwd=HERE.parent, stdout=out, stderr=errors, text=True, start_new_session=True
        )
        try:
            seen = watch(process)
        except psutil.Error:
            seen = {}
        process.wait()
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        told, said = out.read(), errors.read()
    meta = json.loads(told) if process.returncode == 0 else {}
    facts = {name: meta.get(name) for name in ("documents", "tokens", "text_bytes", "bad_lines", "engine")}
    if process.returncode:
        facts["refused"] = said.strip().splitlines()[-1][:300]
    peaks = {
        f"{name}_{kind}": max((one[kind] for one in seen.values() if one["name"] == name), default=None)
        for name in ("parent", "worker")
        for kind in ("peak_mb", "uss_mb")
    }
    return {"exit_code": process.returncode, "seconds": round(seconds, 1), **facts, **peaks}


# Inputs


def real_text(folder: Path, megabytes: int) -> Path:
    """JSON Lines of Python's documentation and sources, repeated to that size."""
    path, target = demo_text.write_demo_text(folder, megabytes=min(megabytes, 40)), folder / "real.jsonl"
    data = path.read_bytes()
    with target.open("wb") as file:
        while file.tell() < megabytes * MB:
            file.write(data)
    path.unlink()
    return target


def linked(folder: Path, source: Path, times: int) -> None:
    for number in range(times):
        os.link(source, folder / f"{number:04}.jsonl")


def one_line(folder: Path, source: Path, extra: str) -> None:
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()[:40_000]]
    text = extra + "\n\n".join(texts)
    while len(text) < 60 * MB:
        text += text
    for number in range(2):
        (folder / f"{number}.jsonl").write_text(json.dumps({"text": text[: 59 * MB]}, ensure_ascii=False) + "\n")


def one_text(folder: Path, source: Path) -> None:
    texts = "\n\n".join(json.loads(line)["text"] for line in source.read_text().splitlines()[:20_000]).encode()
    with (folder / "a.txt").open("wb") as file:
        while file.tell() < 2000 * MB:
            file.write(texts + b"\n\n")


def bomb(folder: Path, source: Path, line: bytes) -> None:
    """1 GB of lines, or of one line."""
    import zstandard

    with (
        (folder / "a.jsonl.zst").open("wb") as file,
        zstandard.ZstdCompressor(level=19).stream_writer(file) as writer,
    ):
        writer.write(source.read_bytes()[: 20 * MB].rpartition(b"\n")[0] + b"\n")  # so that there is something to keep
        writer.write(b'{"text": "')
        for _ in range(1000):
            writer.write((line * (MB // len(line) + 1))[:MB])
        writer.write(b'"}\n')


def parquet_file(folder: Path, source: Path, join: int, rows: int) -> None:
    """`rows` texts, each of `join` lines of the source end to end, in one row group."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()[:60_000]]
    values = [f"{i} " + "\n".join(texts[(i * join + k) % len(texts)] for k in range(join)) for i in range(rows)]
    parquet.write_table(arrow.table({"text": values}), folder / "a.parquet", row_group_size=rows, compression="zstd")


def bad_lines(folder: Path, source: Path) -> None:
    linked(folder, source, 1)
    (folder / "b.jsonl").write_bytes(b'{"a": 1, "b": [2]}\nno record\n' * (100 * MB // 29))


# Plans without work; run by itself, so that the peak is its own

PLAN = """
import json, re, sys, time
from pathlib import Path
from data_prep import tokenizers
from data_prep.inputs import describe, expand_inputs
from data_prep.plan import make_plan, part_size, settings_digest
from data_prep.account import finish
from data_prep.options import Options
from data_prep.tokenize import _state
from data_prep.work import done_parts
folder, tokenizer, plant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "plant"
parts = folder / "out.parts"
parts.mkdir(exist_ok=True)
seconds, last = {}, time.perf_counter()
def step(name):
    global last
    now = time.perf_counter()
    seconds[name], last = round(now - last, 2), now
files = [describe(path) for path in expand_inputs([folder / "in"])]
step("list_files")
units = make_plan(files, "0" * 20, part_size(files), True)
step("plan")
if plant:
    sidecar = {
        "last": True, "disk_bytes": 1 << 28, "text_bytes": 1 << 28, "engine": "fastokens", "checked_documents": 200,
        "tally": {"lines": 60000, "documents": 60000, "blank": 0, "repaired": 0, "bad": {}, "filtered": {}},
        "documents": 60000, "sequences": 60000, "tokens": 1 << 26, "dtype": "<u2", "seconds": 3.5, "host": "n", "pid": 7,
        "bin_xxh3": "0" * 32, "idx_xxh3": "0" * 32,
    }
    for unit in units:
        part = unit.part(0)
        spans = [{"file": str(s.file.path), "start": s.start, "stop": s.stop, "lines": 9, "damage": ""} for s in part.spans]
        (parts / f"{part.name}.json").write_text(json.dumps({"part": part.name, "spans": spans, **sidecar}, indent=2))
        with (parts / f"{part.name}.bin").open("wb") as file:
            file.truncate(1 << 27)
        (parts / f"{part.name}.idx").touch()
else:
    left, done = _state(parts, units)
    assert not left
    step("look_at_all_parts")
    meta = finish(parts, units, files, tokenizers.load_tokenizer(tokenizer), Options(), "")
    assert meta["documents"] == 60000 * len(units)
    step("add_up")
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
    total = sum(file.size for file in files)
    print(json.dumps({"files": len(files), "parts": len(units), "bytes": total, "seconds": seconds, "peak_mb": peak}))
"""


def plan(folder: Path, tokenizer: Path, count: int, size: int) -> dict[str, Any]:
    """`count` sparse files of `size` bytes, all done."""
    for number in range(count):
        path = folder / "in" / f"{number // 1000:03}" / f"{number:06}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
    figures: dict[str, Any] = {}
    for action in ("plant", "look"):
        words = [sys.executable, "-c", PLAN, str(folder), str(tokenizer), action]
        done = subprocess.run(words, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout or "{}")
    return figures


def write(path: Path, results: dict[str, Any], name: str) -> None:
    """Show a case and note all so far."""
    print(name, json.dumps(results[name]), flush=True)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.release()}
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of the above; the others stay as they were noted")
    parser.add_argument("--megabytes", type=int, default=200, help="of size_1")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder when not given")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "prep_scale-CPU.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="herd-prep-scale-") as name:
        base = Path(name)
        source, llama3 = real_text(base, options.megabytes), material.llama3_tokenizer_model()
        small = base / "tokenizer.model"
        with source.open("rb") as file:
            (base / "some.jsonl").write_bytes(file.read(2 * MB).rpartition(b"\n")[0])
        demo_text.train_tokenizer(base / "some.jsonl", small, vocab_size=1000)
        cases: dict[str, tuple[Callable[[Path], object], Path, tuple[str, ...]]] = {
            **{f"size_{n}": (partial(linked, source=source, times=n), llama3, ()) for n in (1, 4, 16)},
            "size_1_small_vocabulary": (lambda into: linked(into, source, 1), small, ()),
            "line_60mb": (lambda into: one_line(into, source, ""), llama3, ()),
            "line_60mb_wide": (lambda into: one_line(into, source, "\U0001f999"), small, ()),
            "text_2gb": (lambda into: one_text(into, source), llama3, ()),
            "bomb_lines": (lambda into: bomb(into, source, b'a"}\n{"text": "a'), llama3, ("--max-bad", "1")),
            "bomb": (lambda into: bomb(into, source, b"a"), llama3, ()),
            "parquet_group": (lambda into: parquet_file(into, source, 1, 80_000), llama3, ()),
            "parquet_books": (lambda into: parquet_file(into, source, 300, 200), llama3, ()),
            "all_bad": (lambda into: bad_lines(into, source), llama3, ("--max-bad", "1")),
        }
        plans = {"plan_50gb": (200, 1 << 28), "plan_5tb": (20_000, 1 << 28), "plan_small_files": (200_000, 25 * MB)}
        unknown = set(options.only or ()) - {*cases, *plans}
        if unknown:
            parser.error(f"no case {', '.join(unknown)}; there are {', '.join([*cases, *plans])}")
        results: dict[str, Any] = json.loads(options.to.read_text())["results"] if options.only else {}
        for name, (make, tokenizer, words) in cases.items():
            if not options.only or name in options.only:
                work = base / "work"
                (work / "in").mkdir(parents=True)
                make(work / "in")
                size = sum(path.stat().st_size for path in (work / "in").iterdir())
                results[name] = {"input_bytes": size, **run(work / "in", tokenizer, work / "out", *words)}
                write(options.to, results, name)
                shutil.rmtree(work)
        for name, (count, size) in plans.items():
            if not options.only or name in options.only:
                results[name] = plan(base / "work", small, count, size)
                write(options.to, results, name)
                shutil.rmtree(base / "work")


if __name__ == "__main__":
    main()
