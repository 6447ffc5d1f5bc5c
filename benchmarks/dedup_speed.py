"""Documents a second and what is found: `herd prep dedup` beside datasketch, on real text with planted near duplicates.

    python benchmarks/dedup_speed.py --corpus en.jsonl --key text --documents 50000

The corpus is cut into sections; some of them are put in again later with words changed, deleted or added, at a Jaccard
similarity known from an implementation of its own, words and sets in plain Python. All sides read the same JSONL, take
word 5-grams at a threshold of 0.7 and write the lines that stay; datasketch in its faster form (xxhash, update_batch)
besides the documented one. One core each, then ours with two workers. Timed are whole processes, from their start to
their end, and, as `without_start`, both without what Python and imports take before the first line is read.
Recall is over planted documents whose source stayed; a removal is false when the true similarity with the document that
it went for (datasketch: with any that it found) is below the threshold.
Writes benchmarks/results/dedup_speed-CPU.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
N, THRESHOLD = 5, 0.7
SECTION = 1500  # characters, about; sections end at paragraphs
PLANTED = 0.06  # of all documents
_WORDS = re.compile(r"[^\W_]+")


def slow_words(text: str) -> list[str]:
    """Words as `--unit word` has them: letters, marks and digits; written without looking at the tool's code."""
    lowered = unicodedata.normalize("NFC", text).lower()
    if lowered.isascii():
        return _WORDS.findall(lowered)
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in lowered).split()


def slow_set(text: str) -> set[tuple[str, ...]]:
    words = slow_words(text)
    return {tuple(words[i : i + N]) for i in range(max(1, len(words) - N + 1))} if words else set()


def slow_jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def sections(corpus: Path, key: str, count: int) -> list[str]:
    """Texts of about SECTION characters, cut at paragraphs, the same each time; spread over the whole corpus."""
    found: list[str] = []
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            part: list[str] = []
            size = 0
            for paragraph in json.loads(line)[key].split("\n\n"):
                part.append(paragraph)
                size += len(paragraph) + 2
                if size >= SECTION:
                    found.append("\n\n".join(part))
                    part, size = [], 0
            if size >= 200:
                found.append("\n\n".join(part))
    chosen = random.Random(1).sample(range(len(found)), min(count, len(found)))
    return [found[i] for i in sorted(chosen)]


def edited(text: str, target: float, chance: random.Random, pool: list[str]) -> str:
    """The text with as many words changed, deleted or added as bring it near the similarity `target`."""
    words = text.split(" ")
    shingles = max(1, len(slow_words(text)) - N + 1)
    edits = max(1, round(shingles * (1 - target) / (N * (1 + target))))
    for _ in range(edits):
        at, kind = chance.randrange(len(words)), chance.random()
        if kind < 0.6:
            words[at] = chance.choice(pool)
        elif kind < 0.8 and len(words) > 1:
            del words[at]
        else:
            words.insert(at, chance.choice(pool))
    return " ".join(words)


def make_corpus(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Write the JSONL; return {line of a planted document: [line of its source, true similarity]}, lines from 1."""
    chance = random.Random(2)
    wanted = round(options.documents * PLANTED)
    base = sections(options.corpus, options.key, options.documents - wanted)
    pool = [word for text in chance.sample(base, 200) for word in slow_words(text)]
    planted: list[tuple[int, float, str]] = []
    while len(planted) < wanted:
        source = chance.randrange(len(base))
        text = edited(base[source], chance.uniform(THRESHOLD - 0.02, 1), chance, pool)
        true = slow_jaccard(slow_set(base[source]), slow_set(text))
        if THRESHOLD <= true < 1:
            planted.append((source, true, text))
    after: dict[int, list[int]] = {}
    for number, (source, _, _) in enumerate(planted):
        after.setdefault(chance.randrange(source, len(base)), []).append(number)
    truth: dict[str, Any] = {}
    line_of: dict[int, int] = {}
    with path.open("w", encoding="utf-8") as file:
        line = 0
        for index, text in enumerate(base):
            line += 1
            line_of[index] = line
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            for number in after.get(index, ()):
                line += 1
                source, true, copy = planted[number]
                truth[str(line)] = [line_of[source], true]
                file.write(json.dumps({"text": copy}, ensure_ascii=False) + "\n")
    return truth


def datasketch_side(path: Path, tuned: bool) -> None:
    """Run in a process of its own: dedup as datasketch's documentation does it; print what went and the time."""
    import msgspec
    import xxhash
    from datasketch import MinHash, MinHashLSH

    start = time.perf_counter()
    decoder = msgspec.json.Decoder(msgspec.defstruct("Record", [("text", str)]))
    lsh = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    extra = {"hashfunc": xxhash.xxh32_intdigest} if tuned else {}
    empty, words_of = MinHash(num_perm=128, **extra), re.compile(r"\w+")
    removed: dict[int, list[int]] = {}
    with path.open("rb") as file, path.with_suffix(".kept").open("wb") as out:
        for number, line in enumerate(file, 1):
            words = words_of.findall(decoder.decode(line).text.lower())
            grams = {" ".join(words[i : i + N]).encode() for i in range(max(1, len(words) - N + 1))}
            signature = empty.copy()
            if tuned:
                signature.update_batch(grams)
            else:
                for gram in grams:
                    signature.update(gram)
            if similar := lsh.query(signature):
                removed[number] = [int(one) for one in similar]
            else:
                lsh.insert(number, signature)
                out.write(line)
    print(json.dumps({"without_start": time.perf_counter() - start, "bands": lsh.b, "rows": lsh.r, "removed": removed}))


def ours_side(path: Path, output: Path, workers: int) -> dict[str, Any]:
    """One run of the command; what went and for what."""
    command = [sys.executable, "-m", "launch.cli", "prep", "dedup", str(path), "--output", str(output)]
    command += ["--unit", "word", "--ngram", str(N), "--threshold", str(THRESHOLD), "--workers", str(workers)]
    seconds, cpu, said = timed(command, workers == 1)
    removed = {}
    for line in (output / "removed.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        removed[record["line"]] = [record["kept_line"]]
    inside = float(said.rsplit(";", 1)[1].split()[0])  # the command's own account, after its imports
    return {"seconds": seconds, "cpu": cpu, "without_start": inside, "removed": removed}


def timed(command: list[str], one_core: bool) -> tuple[float, float, str]:
    """Seconds and seconds of CPU of a whole process with its children, and what it printed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, cwd=HERE.parent, stdout=out, stderr=subprocess.DEVNULL, preexec_fn=_one_core if one_core else None
        )
        _, status, used = os.wait4(process.pid, 0)  # with its worker processes, which it has waited for
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed")
        out.seek(0)
        return seconds, used.ru_utime + used.ru_stime, out.read()


def _one_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def judge(removed: dict[int, list[int]], truth: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Recall over planted documents, by similarity too, and false removals by the slow implementation."""
    steps = [0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
    found, all_of = [0] * len(steps), [0] * len(steps)
    for line, (source, true) in truth.items():
        if source in removed:
            continue  # its source went: nothing need be like it
        step = max(i for i, low in enumerate(steps) if true >= low)
        all_of[step] += 1
        found[step] += int(line) in removed
    false = 0
    for line, others in removed.items():
        own = slow_set(texts[line - 1])
        best = max(
            1.0 if texts[o - 1] == texts[line - 1] else slow_jaccard(own, slow_set(texts[o - 1])) for o in others
        )
        false += best < THRESHOLD
    return {
        "removed": len(removed),
        "false_removals": false,
        "planted": sum(all_of),
        "recall": round(sum(found) / sum(all_of), 4),
        "recall_from": {str(s): round(f / a, 4) for s, f, a in zip(steps, found, all_of, strict=True) if a},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("/tmp/corpus/en.jsonl"), help="JSONL of real text")
    parser.add_argument("--key", default="text")
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "dedup_speed-CPU.json")
    parser.add_argument("--side", choices=("documented", "tuned"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return datasketch_side(options.file, options.side == "tuned")
    try:
        datasketch = version("datasketch")
    except ImportError:
        sys.exit("datasketch is not installed; for this benchmark alone: pip install datasketch")
    if not options.corpus.exists():
        sys.exit(f"{options.corpus}: no such file; tools/make_corpus.py (docs: MATERIAL) makes one, or name your own")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        truth = make_corpus(options, path)
        texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        sides: dict[str, list[dict[str, Any]]] = {}
        for number in range(options.rounds):
            for workers in (1, 2):
                sides.setdefault(f"herd, {workers} worker{'s' * (workers > 1)}", []).append(
                    ours_side(path, Path(folder) / f"out-{workers}-{number}", workers)
                )
            for side in ("tuned", "documented")[: 2 if number == 0 else 1]:
                command = [sys.executable, __file__, "--side", side, "--file", str(path)]
                seconds, cpu, said = timed(command, one_core=True)
                result = {**json.loads(said), "seconds": seconds, "cpu": cpu}
                result["removed"] = {int(line): others for line, others in result["removed"].items()}
                sides.setdefault(f"datasketch, {side}", []).append(result)
        results: dict[str, Any] = {}
        for name, runs in sides.items():
            median = {k: statistics.median(run[k] for run in runs) for k in ("seconds", "cpu", "without_start")}
            results[name] = {
                "documents_per_s": round(len(texts) / median["seconds"]),
                "documents_per_s_without_start": round(len(texts) / median["without_start"]),
                "documents_per_cpu_s": round(len(texts) / median["cpu"]),
                "mb_per_s": round(path.stat().st_size / 1e6 / median["seconds"], 1),
                **{kind: [round(run[kind], 2) for run in runs] for kind in median},
                **judge(runs[0]["removed"], truth, texts),
            }
            print(f"{name}: {json.dumps(results[name])}")
        assert sides["herd, 1 worker"][0]["removed"] == sides["herd, 2 workers"][0]["removed"]
        ratio = {}
        for kind in ("documents_per_s", "documents_per_s_without_start", "documents_per_cpu_s"):
            best = max(value[kind] for name, value in results.items() if name.startswith("datasketch"))
            ratio[kind] = round(results["herd, 1 worker"][kind] / best, 2)
        print(f"one core, over the faster datasketch: {ratio}")
        report = {
            "machine": {
                "device": "CPU", "cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
                "numpy": version("numpy"), "datasketch": datasketch, "load": os.getloadavg()[0],
            },
            "command": sys.argv,
            "corpus": {"documents": len(texts), "bytes": path.stat().st_size, "planted": len(truth)},
            "over_faster_datasketch_one_core": ratio,
            "results": results,
        }  # fmt: skip
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.to}")


if __name__ == "__main__":
    main()
