"""From JSON Lines to a token file: several processes encode, one reads and writes, in the order of the input.

    reader (this process) ──chunks of whole lines──▶ workers: parse, encode ──ids──▶ writer (this process)

Each document is encoded by itself and results are taken in the order of their chunks, so the bytes written do not
depend on the number of workers. The output appears under its name only when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import readers, tokenizers
from data_prep.errors import UserError
from data_prep.indexed import IndexedWriter, token_dtype

PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal


@dataclass
class Encoded:
    """What became of one chunk: ids of all its documents end to end, and the length of each."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    text_bytes: int
    tally: readers.Tally


class Encoder:
    """A tokenizer and how it is used; calling it turns a chunk of lines into ids."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, append_eod: bool) -> None:
        self.tokenizer, self.dtype = tokenizer, token_dtype(tokenizer.vocab_size)
        self.tail = [tokenizer.eod] if append_eod and tokenizer.eod is not None else []

    def __call__(self, chunk: readers.Chunk) -> Encoded:
        documents, tally = readers.parse_lines(chunk)
        try:
            encoded = self.tokenizer.encode_batch([document.text for document in documents])
        except Exception:
            for document in documents:  # which one was it?
                try:
                    self.tokenizer.encode(document.text)
                except Exception as cause:
                    raise UserError(f"{document.location}: the tokenizer failed: {cause}; repair this text") from cause
            raise
        flat: list[int] = []
        for ids in encoded:
            flat += ids
            flat += self.tail
        lengths = np.array([len(ids) + len(self.tail) for ids in encoded], dtype=np.int64)
        return Encoded(np.array(flat, dtype=self.dtype), lengths, len(chunk.data), tally)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(path: str, append_eod: bool) -> None:
    """Make a worker ready: the parent alone answers Ctrl-C, and a worker ends when its parent is gone."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _encoder = Encoder(tokenizers.load_tokenizer(path), append_eod)


def _work(chunk: readers.Chunk) -> Encoded:
    assert _encoder is not None
    return _encoder(chunk)


def encode_chunks(
    chunks: Iterator[readers.Chunk], tokenizer: tokenizers.Tokenizer, append_eod: bool, workers: int
) -> Generator[tuple[readers.Chunk, Encoded]]:
    """Each chunk with its ids, in the order of the chunks; at most two chunks a worker are in memory.

    Raises UserError when a worker process dies.
    """
    if workers <= 1:
        encoder = Encoder(tokenizer, append_eod)
        for chunk in chunks:
            yield chunk, encoder(chunk)
        return
    pool = ProcessPoolExecutor(
        workers,
        # spawn: a fork would copy this process's locks (rich's and PyTorch's threads hold some) and hang now and then
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(tokenizer.path), append_eod),
    )
    waiting: deque[tuple[readers.Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, chunk)))
            if len(waiting) >= 2 * workers:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died, most likely for want of memory; try again with fewer than --workers {workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_workers() -> int:
    """Cores this process may use (a Slurm job's share, not the whole node's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def herd_version() -> str:
    """The installed version, or "unknown" when herd runs from a bare checkout."""
    try:
        return importlib.metadata.version("herd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """Write a JSON file aside, flush it to the disk, rename. Raises UserError when the disk refuses."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(meta, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there, or write elsewhere") from error
    finally:
        aside.unlink(missing_ok=True)


def read_meta(prefix: str | Path) -> dict[str, Any] | None:
    """What PREFIX.meta.json holds; None for token files that others wrote. Raises UserError when it is damaged."""
    path = Path(f"{prefix}.meta.json")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; remove it to do without it") from error
    return meta if isinstance(meta, dict) else None


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing when not `shown`; all on stderr."""

    def __init__(self, total_bytes: int, shown: bool) -> None:
        self.total, self.shown, self.start = max(1, total_bytes), shown, time.monotonic()
        self._next = self.start + PLAIN_SECONDS
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self.total)
        return self

    def update(self, position: int, text_bytes: int, documents: int, tokens: int) -> None:
        """Say how far we are: `position` in bytes of the input on disk, `text_bytes` after decompression."""
        now = time.monotonic()
        seconds = max(1e-9, now - self.start)
        speed = f"{text_bytes / 1e6 / seconds:.1f} MB/s, {documents:,} documents, {tokens:,} tokens"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(position, self.total), description=speed)
        elif self.shown and now >= self._next:
            self._next = now + PLAIN_SECONDS
            left = seconds * (self.total - position) / max(1, position)
            print(f"{position / self.total:.1%}, {speed}, {left:.0f} s left", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def tokenize(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output_prefix: str | Path,
    key: str | None = None,
    append_eod: bool = True,
    workers: int | None = None,
    max_bad: float = 0.01,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.meta.json from JSON Lines; return what meta.json holds.

    inputs: files, folders, globs. tokenizer: its file or folder. key: where the text is (None: text or content, found
    by itself). append_eod: put the tokenizer's end-of-document id after each document. workers: processes (None: all
    cores). max_bad: share of bad lines (0 to 1) above which nothing is written. progress: report on stderr.
    Raises UserError; whatever happens, no half-written file is left under the output's name.
    """
    prefix = str(output_prefix)
    if prefix.endswith(("/", os.sep)) or not Path(prefix).name:
        raise UserError(f"{prefix}: is a folder; name the files too, as in {prefix.rstrip('/')}/corpus", 2)
    targets = [Path(f"{prefix}{ending}") for ending in (".bin", ".idx", ".meta.json")]
    existing = [path for path in targets if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists; choose another --output, or --overwrite", 2)
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1", 2)
    paths = readers.expand_inputs(inputs)
    loaded = tokenizers.load_tokenizer(tokenizer)
    if append_eod and loaded.eod is None:
        raise UserError(
            f"{loaded.path}: names no end-of-document token; put its tokenizer_config.json beside it, or use --no-eod",
            2,
        )
    workers = default_workers() if workers is None else workers
    sizes = {path: path.stat().st_size for path in paths}
    tally, documents, text_bytes = readers.Tally(), 0, 0
    behind = dict(zip(paths, np.cumsum([0, *sizes.values()]).tolist(), strict=False))  # bytes of the files before each
    with (
        IndexedWriter(prefix, token_dtype(loaded.vocab_size)) as writer,
        Progress(sum(sizes.values()), progress) as report,
        contextlib.closing(encode_chunks(readers.chunks_of(paths, key), loaded, append_eod, workers)) as results,
    ):
        for chunk, encoded in results:
            writer.add_documents(encoded.tokens, encoded.lengths)
            tally.add(encoded.tally)
            documents += len(encoded.lengths)
            text_bytes += encoded.text_bytes
            report.update(behind[chunk.path] + chunk.position, text_bytes, documents, writer.tokens)
        tally.check(max_bad)
        if not documents:
            raise UserError(f"{paths[0]}: no document in {len(paths)} file(s), {tally.lines:,} lines; check the input")
        targets[2].unlink(missing_ok=True)  # so that an old account never stands beside new tokens
    meta = {
        "herd_version": herd_version(),
        "tokenizer": str(loaded.path.resolve()),
        "tokenizer_sha256": tokenizers.sha256(loaded.path),
        "tokenizer_kind": loaded.kind,
        "vocab_size": loaded.vocab_size,
        "bos": loaded.bos,
        "eod": loaded.eod,
        "append_eod": append_eod,
        "dtype": str(writer.dtype),
        "documents": documents,
        "tokens": writer.tokens,
        "text_bytes": text_bytes,
        "lines": tally.lines,
        "blank_lines": tally.blank,
        "repaired_documents": tally.repaired,
        "bad_lines": tally.bad_lines,
        "bad_causes": dict(sorted(tally.bad.items())),
        "bad_examples": tally.examples,
        "key": key,
        "inputs": [{"path": str(path), "bytes": sizes[path]} for path in paths],
    }
    write_meta(targets[2], meta)
    return meta
