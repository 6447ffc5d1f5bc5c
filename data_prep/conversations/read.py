"""Conversations out of files, with an account of every record: taken, mended, odd, refused and why."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from data_prep.conversations.files import SUFFIXES, Fault, Raw, keys_of, read_raw
from data_prep.conversations.formats import FORMATS, KNOWN, convert, recognize
from data_prep.conversations.record import Conversation, Location, encode
from data_prep.errors import UserError
from data_prep.inputs import expand_inputs

AUTO = "auto"
PEEKED = 100  # records of a file that its format is told from
SHOWN = 5  # refused records kept word for word in a Tally
IDS = 1 << 20  # ids remembered to find double ones: about 100 MB


@dataclass
class Tally:
    """What became of all records: `records` = `conversations` + the sum of `bad`."""

    records: int = 0
    conversations: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # cause -> records refused
    examples: list[str] = field(default_factory=list)  # "file:line: cause", the first few
    repairs: Counter[str] = field(default_factory=Counter)  # what was mended -> records
    notes: Counter[str] = field(default_factory=Counter)  # what is odd, and was kept -> records
    formats: dict[str, str] = field(default_factory=dict)  # file -> format
    roles: Counter[str] = field(default_factory=Counter)  # role -> messages
    turns: Counter[int] = field(default_factory=Counter)  # messages in a conversation -> conversations
    position: int = 0  # bytes of the input on disk read so far
    log: Callable[[Location, Fault, bytes], None] | None = None
    """Told of each refused record: place, why, its bytes (none for Parquet)."""
    _ids: set[int] = field(default_factory=set, repr=False)

    @property
    def refused(self) -> int:
        """Records that gave no conversation."""
        return self.bad.total()

    def take(self, conversation: Conversation, notes: Counter[str]) -> None:
        """Count a conversation."""
        self.conversations += 1
        self.notes.update(list(notes))  # once a record, however often it happens in one
        self.turns[len(conversation.messages)] += 1
        self.roles.update(message.role for message in conversation.messages)
        if conversation.id is not None and len(self._ids) < IDS:
            number = hash(conversation.id)
            if number in self._ids:
                self.notes["id seen before"] += 1
            self._ids.add(number)

    def refuse(self, place: Location, fault: Fault, data: bytes) -> None:
        """Count a record that is not understood; keep its place if it is among the first."""
        self.bad[fault.cause] += 1
        if len(self.examples) < SHOWN:
            self.examples.append(f"{place}: {fault}")
        if self.log is not None:
            self.log(place, fault, data)

    def check(self, max_bad: float) -> None:
        """Raise UserError when more than the share `max_bad` of the records was refused, or nothing is left."""
        if self.refused > max_bad * self.records:
            causes = ", ".join(f"{count:,} × {cause}" for cause, count in self.bad.most_common(6))
            share = self.refused / self.records
            raise UserError(
                f"{self.refused:,} of {self.records:,} records are not understood ({share:.2%}; --max-bad allows "
                f"{max_bad:.2%}): {causes}. First: {'; '.join(self.examples)}. Repair the files, or leave such records "
                f"out with --max-bad {min(1.0, share + 5e-4):.3f}"
            )
        if not self.conversations:
            first = f"; the first: {self.examples[0]}" if self.examples else ""
            raise UserError(f"no conversation among {self.records:,} records{first}; check the input")


def read_conversations(
    inputs: Iterable[str | Path], format: str = AUTO, max_bad: float = 0.01, tally: Tally | None = None
) -> Iterator[Conversation]:
    """Conversations of files, folders and globs, in the order of the files' paths.

    format: one of FORMATS for all files; `auto` tells it file by file from its first records. A record that is not
    understood is counted in `tally`, and left out. Raises UserError for a file that is damaged or of no known format,
    and at the end when more than the share `max_bad` of all records was left out.
    """
    if format not in (AUTO, *FORMATS):
        raise UserError(f"no format {format!r}; {AUTO}, {', '.join(FORMATS)} are known", 2)
    tally = Tally() if tally is None else tally
    before = 0
    for path in expand_inputs(inputs, SUFFIXES):
        rows = read_raw(path, tally.repairs)
        with contextlib.closing(rows):
            first = list(islice(rows, PEEKED))
            kind = format if format != AUTO else _format_of(path, first)
            if kind is not None:
                tally.formats[str(path)] = kind
            for raw in chain(first, rows):
                tally.records += 1
                tally.position = before + raw.position
                conversation = _understood(raw, kind or "", path, format == AUTO, tally)
                if conversation is not None:
                    yield conversation
        before += path.stat().st_size
    tally.check(max_bad)


def _understood(raw: Raw, kind: str, path: Path, auto: bool, tally: Tally) -> Conversation | None:
    """The conversation of a record, or None with the reason counted."""
    notes: Counter[str] = Counter()
    try:
        if isinstance(raw.value, Fault):
            raise raw.value
        found = recognize(raw.value, path) if auto else [kind]
        if found and kind not in found:
            raise Fault("another format", f"{' or '.join(found)}, in a file of {kind}; give it a file of its own")
        if len(found) > 1:
            raise Fault("two formats in one", f"{' and '.join(found)}; name one with --format")
        conversation = convert(raw.value, kind, raw.place, notes)
        if not found:  # it could be read, but has keys beside those read that its meaning hangs on
            raise Fault("unknown format", f"keys {keys_of([raw.value])}; this file is {kind}")
    except Fault as fault:
        tally.refuse(raw.place, fault, raw.data)
        return None
    tally.take(conversation, notes)
    return conversation


def _format_of(path: Path, rows: list[Raw]) -> str | None:
    """The format that most of a file's first records have; None when none of them can be read.

    Raises UserError when those that can be read are of no known format, or could be of several.
    """
    records = [(raw.place, raw.value) for raw in rows if not isinstance(raw.value, Fault)]
    if not records:
        if rows and rows[0].data.strip() == b"{":
            raise UserError(
                f"{rows[0].place}: JSON over several lines; one record a line works, and so does one array: "
                f"jq -c . FILE > FILE.jsonl"
            )
        return None
    votes = Counter(tuple(recognize(record, path)) for _, record in records)
    found = votes.most_common(1)[0][0]
    if len(found) == 1:
        return found[0]
    if clear := [names[0] for names, _ in votes.most_common() if len(names) == 1]:
        return clear[0]
    if found:
        raise UserError(
            f"{records[0][0]}: keys {keys_of([records[0][1]])} may be {' or '.join(found)}; name one with --format", 2
        )
    raise UserError(
        f"{records[0][0]}: keys {keys_of([records[0][1]])} are of no known format; known are {KNOWN}; rename the keys",
        2,
    )


def write_conversations(conversations: Iterable[Conversation], path: str | Path) -> int:
    """Write JSON Lines that read_conversations gives back as equal records, whole or not at all; return how many.

    Raises UserError when the disk refuses.
    """
    target, count = Path(path), 0
    aside = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb", buffering=1 << 20) as file:
            for count, conversation in enumerate(conversations, 1):  # noqa: B007
                file.write(encode(conversation) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; free space there, or write elsewhere") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return count
