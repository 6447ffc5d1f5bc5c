"""One worker: walks over the plan, claims what nobody does, makes part after part.

Workers of one machine and of many nodes are alike; each begins at another place of the plan and takes what is left, so
nobody hands out work and nobody's death stops it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import engines
from data_prep.claims import Claims
from data_prep.cutting import cutter
from data_prep.encode import Encoder, EngineMismatchError
from data_prep.parts import PartWriter, read_sidecar
from data_prep.plan import Part, Unit
from data_prep.readers import Reader, Reading, Tally
from data_prep.tokenizers import Tokenizer, load_tokenizer

POLL_SECONDS = 0.5  # between looks at parts that others do; the first looks come sooner, as a part may end any moment
AHEAD = 4096  # parts of one packed file that are looked over for one that is free


@dataclass(frozen=True)
class Job:
    """All that a worker must know."""

    folder: Path
    units: Sequence[Unit]
    tokenizer: Path
    engine: str
    reading: Reading
    append_eod: bool
    prepend_bos: bool
    parse_special: bool


class Counters:
    """What a worker shows while it works: plain numbers, one writer, any number of readers."""

    FIELDS = ("disk", "text_bytes", "documents", "tokens", "parts")

    def __init__(self, cells: Any = None) -> None:
        self.cells = cells if cells is not None else [0] * len(self.FIELDS)

    def add(self, text_bytes: int, documents: int, tokens: int) -> None:
        self.cells[1] += text_bytes
        self.cells[2] += documents
        self.cells[3] += tokens

    def disk(self, consumed: int) -> None:
        """Bytes on disk of the part at hand."""
        self.cells[0] = consumed

    def part(self) -> None:
        self.cells[4] += 1
        self.cells[0] = 0


class PartMismatchError(Exception):
    """The engine was wrong in this part; the message names it."""


class Worker:
    """Makes parts in one process."""

    def __init__(self, job: Job, claims: Claims, counters: Counters, tokenizer: Tokenizer | None = None) -> None:
        self.job, self.claims, self.counters = job, claims, counters
        official = tokenizer if tokenizer is not None else load_tokenizer(job.tokenizer)
        engine = engines.load_engine(job.engine, official, job.folder, special=job.parse_special)
        cut = cutter(official, job.parse_special)
        self.encoder = Encoder(official, engine, cut, job.append_eod, job.prepend_bos)
        self.reader = Reader(job.reading, cut.last_cut if cut else None)
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None

    def run(self, first: int, ready: Callable[[], None] = lambda: None) -> None:
        """Work until every part of the plan is done, beginning with unit `first`.

        Raises UserError; PartMismatchError when the engine proves wrong.
        """
        ready()
        count = len(self.job.units)
        walkers = [_Row(self, self.job.units[(first + i) % count]) for i in range(count)]
        pause = 0.0
        try:
            while walkers:
                worked = False
                for join in (False, True):
                    for row in walkers:
                        worked |= row.go(join)
                walkers = [row for row in walkers if not row.finished]
                self._settle()
                pause = 0.0 if worked else min(2 * pause + 0.02, POLL_SECONDS)
                if walkers and not worked:
                    time.sleep(pause)
        finally:
            self.reader.close()
            self._flusher.shutdown()

    def make(self, part: Part) -> dict[str, Any]:
        """Make a claimed part; its sidecar, written by another thread while the next part begins."""
        writer = PartWriter(self.job.folder, part.name, self.encoder.dtype)
        try:
            sidecar = self._fill(writer, part)
        except BaseException:
            writer.discard()
            self.claims.release(part.name)
            raise
        self.counters.part()
        self._settle()
        self._flushing = self._flusher.submit(self._publish, writer, sidecar, part.name)
        return sidecar

    def _publish(self, writer: PartWriter, sidecar: dict[str, Any], name: str) -> None:
        try:
            writer.publish(sidecar)
        except BaseException:
            writer.discard()
            raise
        finally:
            self.claims.release(name)

    def _settle(self) -> None:
        """Wait for the part that is being flushed."""
        if self._flushing is not None:
            waited, self._flushing = self._flushing, None
            waited.result()

    def _fill(self, writer: PartWriter, part: Part) -> dict[str, Any]:
        encoder, reader, total, text_bytes, disk = self.encoder, self.reader, Tally(), 0, 0
        encoder.mark(part.name)
        start = time.monotonic()
        spans: list[dict[str, Any]] = []
        for span in part.spans:
            lines = total.lines
            for batch in reader.read(span.file, span.start, span.stop):
                try:
                    ids, lengths = encoder(batch)
                except EngineMismatchError as error:
                    where = f"{span.file.path}, near line {total.lines - lines + 1:,} of its bytes from {span.start:,}"
                    raise PartMismatchError(f"{where}: {error}") from None
                if batch.dropped:
                    writer.drop_last()
                writer.add(ids, lengths, batch.goes_on)
                total.add(batch.tally)
                text_bytes += batch.text_bytes
                for fault in batch.faults:
                    writer.log({"file": str(span.file.path), "span": len(spans), **vars(fault)})
                self.counters.add(batch.text_bytes, batch.tally.documents, len(ids))
                self.counters.disk(disk + reader.disk)
            disk += reader.disk
            place = {"file": str(span.file.path), "start": span.start, "stop": span.stop}
            spans.append({**place, "lines": total.lines - lines, "damage": reader.damage})
        return {
            "part": part.name,
            "spans": spans,
            "last": reader.ended,
            "disk_bytes": disk,
            "text_bytes": text_bytes,
            "tally": total.as_json(),
            "engine": encoder.engine.name,
            "checked_documents": encoder.checked,
            "seconds": round(time.monotonic() - start, 3),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }


class _Row:
    """A unit as one worker sees it: the next part that may be free."""

    def __init__(self, worker: Worker, unit: Unit) -> None:
        self.worker, self.unit = worker, unit
        self.low, self.finished = 0, False  # all parts below `low` are done
        self.end: int | None = None if unit.open_ended else 1

    def go(self, join: bool) -> bool:
        """Do what can be done here; with `join` also where another worker is at work. True when a part was made."""
        worked = False
        number = self.low
        while not self.finished and number < min(self.low + AHEAD, self.end or self.low + AHEAD):
            part = self.unit.part(number)
            sidecar = read_sidecar(self.worker.job.folder, part.name)
            if sidecar is None:
                if not self.worker.claims.take(part.name):
                    if not join:
                        return worked
                    number += 1
                    continue
                sidecar = read_sidecar(self.worker.job.folder, part.name)  # done between the look and the claim?
                if sidecar is not None:
                    self.worker.claims.release(part.name)
                else:
                    sidecar = self.worker.make(part)
                    worked = True
            if sidecar["last"] or not self.unit.open_ended:
                self.end = number + 1 if self.end is None else min(self.end, number + 1)
            if number == self.low:
                self.low += 1
            number += 1
            self.finished = self.end is not None and self.low >= self.end
        return worked


def done_parts(folder: Path, unit: Unit) -> Iterator[tuple[Part, dict[str, Any] | None]]:
    """The parts of a unit in order with their sidecars, up to the first that is missing (None)."""
    number = 0
    while True:
        part = unit.part(number)
        sidecar = read_sidecar(folder, part.name)
        yield part, sidecar
        if sidecar is None or sidecar["last"] or not unit.open_ended:
            return
        number += 1
