"""Tokenizing real text: `herd prep tokenize` beside its peers, same cores, same corpus, one run; and are the bytes equal?

    git clone https://github.com/NVIDIA/Megatron-LM megatron-lm
    pip install gigatoken triton einops datatrove dill loguru multiprocess orjson     (for the peers; herd needs none of them)
    python benchmarks/prep_speed.py --corpus en.jsonl --corpus ml.jsonl --llama2 tokenizer.model --llama3 tokenizer.model \\
        --megatron megatron-lm

Each tool is run as its user would, as a process of its own: on the whole corpus, and on its first two megabytes, whose
time is taken to be start-up (imports, loading and certifying tokenizers) and is given apart. Megatron-LM's
preprocess_data.py and preprocess_data_fast.py and datatrove run on two shards of one file as they document; a peer that
cannot run is named with the reason. `bare` is the fast engine alone, in as many processes, on text that is in memory
already: what no tool can pass. The quick tools are also run on --times copies of the corpus: what the others take more
than the first gives the speed that a large corpus sees, free of start-up and of workers that end unevenly; keep both
below the 8 GB from which herd loads and compares every engine, which is start-up too. Of several rounds the best time of
each counts. Memory is taken and given back before each run: the host of a virtual machine may have to find a page when
it is first used, which would be charged to whichever tool comes first (10 of 23 CPU seconds, once). Text is counted as
the bytes of the JSON Lines. Writes benchmarks/results/prep_speed-CPU.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
HEAD = 2_000_000  # bytes of the run whose time is start-up
TOUCHED = 5 << 30  # bytes of memory that are used before each run: what tool and page cache will take
QUICK = ("herd", "megatron preprocess_data_fast.py")
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, key, tokenizer, output, workers = *sys.argv[1:5], int(sys.argv[5])
if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder, text_key=key),
            DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, shuffle_documents=False, save_index=True),
        ],
        tasks=workers, workers=workers, logging_dir=output + "/logs", skip_completed=False,
    ).run()
"""


class Peak(threading.Thread):
    """The largest resident memory that any process below one had, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.most, self.done = psutil.Process(pid), 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.1):
            try:
                for each in (self.process, *self.process.children(recursive=True)):
                    self.most = max(self.most, each.memory_info().rss)
            except psutil.Error:
                continue


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and peak MB of one process; raises RuntimeError with its last words when it fails."""
    len(b"\1" * min(TOUCHED, psutil.virtual_memory().available // 2))
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    ) as run:
        peak = Peak(run.pid)
        peak.start()
        said = run.communicate()[0]
        seconds = time.perf_counter() - start
        peak.done.set()
    if run.returncode:
        raise RuntimeError(said.strip().splitlines()[-1][:300] if said.strip() else f"exit code {run.returncode}")
    return seconds, peak.most // 1_000_000


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _bare(barrier: Any, json_path: str, paths: list[str], key: str, cpu: int, part: tuple[int, int], pipe: Any) -> None:
    os.sched_setaffinity(0, {cpu})
    import fastokens
    import msgspec

    record = msgspec.defstruct("Record", [("text", str, msgspec.field(name=key))], gc=False)
    texts = [x.text for path in paths for x in msgspec.json.Decoder(record).decode_lines(Path(path).read_bytes())]
    texts = texts[part[0] :: part[1]]
    engine = fastokens.Tokenizer.from_file(json_path)
    batches, batch, size = [], [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > 1 << 19:
            batches.append(batch)
            batch, size = [], 0
    batches.append(batch)
    engine.encode_batch_flat(["warm"], add_special_tokens=False, split_special_tokens=True)
    barrier.wait()
    start = time.perf_counter()
    for batch in batches:
        engine.encode_batch_flat(batch, add_special_tokens=False, split_special_tokens=True)
    pipe.send(time.perf_counter() - start)


def bare(json_path: Path, paths: list[Path], key: str, workers: int) -> float:
    """Seconds that the engine alone takes for all texts, on `workers` processes."""
    context = multiprocessing.get_context("spawn")
    barrier, cpus, pipes = context.Barrier(workers), sorted(os.sched_getaffinity(0)), []
    for i in range(workers):
        ours, theirs = context.Pipe(False)
        asked = (barrier, str(json_path), [str(p) for p in paths], key, cpus[i % len(cpus)], (i, workers), theirs)
        context.Process(target=_bare, args=asked).start()
        pipes.append(ours)
    return max(pipe.recv() for pipe in pipes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", action="append", required=True, type=Path, help="JSON Lines; key text or content")
    parser.add_argument("--llama2", type=Path, required=True)
    parser.add_argument("--llama3", type=Path, required=True)
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--extra", type=Path, help="a folder of packages that the peers need (pip install --target)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="of the quick ones; the best counts")
    parser.add_argument("--quick", action="store_true", help="only the bare engine and the quick tools")
    parser.add_argument("--times", type=int, default=4, help="copies of the corpus for the quick tools")
    parser.add_argument("--to", type=Path, default=HERE / "results/prep_speed-CPU.json")
    asked = parser.parse_args()

    sys.path.insert(0, str(HERE.parent))
    from data_prep.tokenizers import load_tokenizer

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="herd-prep-speed-") as name:
        work = Path(name)
        for kind in ("llama2", "llama3"):
            load_tokenizer(getattr(asked, kind)).save_for_transformers(work / kind, add_bos=False)
        for corpus in asked.corpus:
            key = next(k for k in ("text", "content") if k in json.loads(corpus.open().readline()))
            shards = work / f"shards-{corpus.stem}"
            shards.mkdir()
            lines = corpus.read_bytes().splitlines(keepends=True)
            for i in range(asked.workers):
                (shards / f"{i}.jsonl").write_bytes(
                    b"".join(lines[i * len(lines) // asked.workers : (i + 1) * len(lines) // asked.workers])
                )
            head = work / f"{corpus.stem}-head.jsonl"
            (work / "headshards").mkdir(exist_ok=True)
            size, few = 0, []
            for line in lines:
                few.append(line)
                size += len(line)
                if size > HEAD:
                    break
            head.write_bytes(b"".join(few))
            del lines
            for kind in ("llama2", "llama3"):
                results += compare(asked, work, kind, corpus, head, shards, key)
    facts = {
        "command": "python benchmarks/prep_speed.py " + " ".join(sys.argv[1:]),
        "machine": {"cpu": _cpu(), "cores_used": asked.workers, "python": platform.python_version()},
        "versions": {
            name: _version(name)
            for name in ("fastokens", "gigatoken", "tokenizers", "sentencepiece", "tiktoken", "datatrove", "msgspec")
        },
        "results": results,
    }
    asked.to.parent.mkdir(parents=True, exist_ok=True)
    asked.to.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"wrote {asked.to}")


def compare(
    asked: Any, work: Path, kind: str, corpus: Path, head: Path, shards: Path, key: str
) -> list[dict[str, Any]]:
    """One tokenizer on one corpus, all tools."""
    size = corpus.stat().st_size / 1e6
    model, directory = getattr(asked, kind), work / kind
    path = os.pathsep.join(str(p) for p in (asked.megatron, asked.extra) if p)
    theirs = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    hf = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(directory),
        "--tokenizer-hf-no-include-special-tokens",
    ]
    official = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model)] if kind == "llama2" else hf
    base = ["--json-keys", key, "--append-eod", "--output-prefix"]

    python, workers = sys.executable, str(asked.workers)
    scripts = asked.megatron / "tools" if asked.megatron else Path()

    def ours(file: Path, output: Path) -> list[str]:
        told = ["--tokenizer", str(model), "--output", str(output), "--workers", workers, "--overwrite"]
        return [python, "-m", "launch.cli", "prep", "tokenize", str(file), *told]

    def megatron(file: Path, output: Path) -> list[str]:
        told = ["--input", str(file), *base, str(output), *official, "--workers", workers, "--log-interval", "100000"]
        return [python, str(scripts / "preprocess_data.py"), *told]

    def fast(file: Path, output: Path) -> list[str]:
        told = ["--input", str(file), *base, str(output), *hf, "--use-gigatoken"]
        return [python, str(scripts / "preprocess_data_fast.py"), *told]

    def datatrove(file: Path, output: Path) -> list[str]:
        folder = shards
        if file == head:
            folder = work / "headshards"
            shutil.copy(head, folder / "0.jsonl")
        return [python, "-c", DATATROVE, str(folder), key, str(directory / "tokenizer.json"), str(output), workers]

    tools: dict[str, Any] = {"herd": (ours, {"PYTHONPATH": str(HERE.parent)}, asked.rounds)}
    if asked.megatron:
        tools["megatron preprocess_data.py"] = (megatron, theirs, 1)
        tools["megatron preprocess_data_fast.py"] = (fast, theirs, asked.rounds)
    tools["datatrove"] = (datatrove, theirs, 1)
    if asked.quick:
        tools = {tool: how for tool, how in tools.items() if tool in QUICK}
    found: dict[str, dict[str, Any]] = {}
    for round_number in range(asked.rounds):
        seconds = bare(directory / "tokenizer.json", [corpus], key, asked.workers)
        line = found.setdefault("bare engine", {"seconds": seconds})
        line["seconds"] = min(line["seconds"], seconds)
        for tool, (command, environment, rounds) in tools.items():
            if round_number >= rounds or "failed" in found.get(tool, {}):
                continue
            output = work / f"{tool.split()[-1].replace('.py', '')}-{kind}-{corpus.stem}"
            try:
                startup, _ = timed(command(head, output), environment)
                whole, peak = timed(command(corpus, output), environment)
            except RuntimeError as error:
                found[tool] = {"failed": str(error)}
                continue
            line = found.setdefault(tool, {"seconds": whole, "startup": startup, "peak_mb": peak})
            if whole - startup < line["seconds"] - line["startup"]:
                line |= {"seconds": whole, "startup": startup}
            line["peak_mb"] = max(line["peak_mb"], peak)
            written = next(
                (p for p in (Path(f"{output}.bin"), Path(f"{output}_{key}_document.bin")) if p.exists()), None
            )
            if written and tool in QUICK:
                large = work / "large.jsonl"
                with large.open("wb") as file:
                    for _ in range(asked.times):
                        file.write(corpus.read_bytes())
                more, peak = timed(command(large, work / "large"), environment)
                line["large"] = min(line.get("large", more), more)
                line["once"] = min(line.get("once", whole), whole)
                line["peak_mb"] = max(line["peak_mb"], peak)
                large.unlink()
            if written:
                line["sha256"] = {"bin": sha256(written), "idx": sha256(written.with_suffix(".idx"))}
                written.unlink()
                written.with_suffix(".idx").unlink()
            shutil.rmtree(output, ignore_errors=True)
    lines = []
    for tool, line in found.items():
        if "failed" not in line:
            working = line["seconds"] - line.get("startup", 0.0)
            if "large" in line:
                longer = line.pop("large") - line.pop("once")
                line["mb_per_second_at_scale"] = round(size * (asked.times - 1) / max(1e-9, longer), 1)
            line["mb_per_second"] = round(size / line["seconds"], 1)
            line["mb_per_second_without_startup"] = round(
                (size - (HEAD / 1e6 if "startup" in line else 0)) / max(1e-9, working), 1
            )
        line = {k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}
        lines.append({"tokenizer": kind, "corpus": corpus.name, "mb": round(size, 1), "tool": tool, **line})
        if "failed" in line:
            shown = line["failed"]
        else:
            names = ("mb_per_second_without_startup", "mb_per_second", "mb_per_second_at_scale", "peak_mb")
            shown = "{:8.1f} MB/s ({} with start-up, {} at scale), peak {} MB".format(
                *(line.get(n, "-") for n in names)
            )
        print(f"{kind} {corpus.name} {tool:35} {shown}", flush=True)
    mine = found["herd"].get("sha256")
    for tool in tools:
        if tool != "herd" and "sha256" in found.get(tool, {}):
            print(
                f"{kind} {corpus.name} {tool}: bytes {'equal' if found[tool]['sha256'] == mine else 'DIFFER'}",
                flush=True,
            )
    return lines


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
