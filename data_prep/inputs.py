"""Which files are read: named by files, folders and globs, sorted; what kind each is; under which key its text lies."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from data_prep.errors import UserError
from data_prep.streams import DamageError, Stream

KEYS = ("text", "content")  # looked for, in this order, when no key is given
JSON_NAMES, TEXT_NAMES, PARQUET_NAMES = (".jsonl", ".json", ".ndjson"), (".txt",), (".parquet",)
SUFFIXES = tuple(kind + packed for kind in JSON_NAMES + TEXT_NAMES for packed in ("", ".gz", ".zst")) + PARQUET_NAMES
JSONL, TEXT, PARQUET = "jsonl", "text", "parquet"
OURS = (".meta.json", ".rejected.jsonl")  # written by herd prep, perhaps beside the texts: no input unless named
PEEKED_LINES, PEEKED_FILES, PEEKED_BYTES = 100, 8, 1 << 18  # how far the search for the key goes


@dataclass(frozen=True)
class File:
    """One input. size in bytes on disk and mtime_ns say whether it is still the file it was."""

    path: Path
    form: str  # JSONL | TEXT | PARQUET
    size: int
    mtime_ns: int


def expand_inputs(inputs: Iterable[str | Path], suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Files named by files, folders (searched below for `suffixes`) and globs; sorted by path, each once.

    Sorted as text, so that neither the order of arguments nor the shell's locale changes the output.
    Raises UserError for an input that names nothing.
    """
    found: dict[Path, Path] = {}
    for item in map(str, inputs):
        path = Path(item)
        if path.is_dir():
            files = [
                p
                for p in path.rglob("*")
                if p.name.endswith(suffixes)
                and p.is_file()
                and not _is_ours(p.relative_to(path))
                and not _is_account(p)
            ]
            if not files:
                raise UserError(
                    f"{item}: no {', '.join(suffixes)} file in this folder; name the files, or another folder", 2
                )
        elif path.exists():
            files = [path]
        else:
            names = glob.glob(item, recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
            found_here = [Path(name) for name in names if Path(name).is_file()]
            files = [path for path in found_here if not _is_ours(path) and not _is_account(path)]
            if not files:
                raise UserError(f"{item}: no such file, folder or glob match; check the path", 2)
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise UserError("no input; name JSONL, Parquet or text files, folders or globs", 2)
    return sorted(found.values(), key=lambda p: p.as_posix())


def _is_ours(path: Path) -> bool:
    """Hidden files and folders, what herd writes beside its output, and folders of parts."""
    return path.name.endswith(OURS) or any(
        (part.startswith(".") and part not in (".", "..")) or part.endswith(".parts") for part in path.parts
    )


def _is_account(path: Path) -> bool:
    """What herd prep dedup wrote beside the texts, as its marker lists it."""
    marker = path.parent / ".herd-accounts"
    return marker.exists() and path.name in marker.read_text(encoding="utf-8").split()


def describe(path: Path) -> File:
    """Form by name (what is neither text nor Parquet is JSON Lines), size and time. Raises UserError."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    form = PARQUET if name.endswith(PARQUET_NAMES) else TEXT if name.endswith(TEXT_NAMES) else JSONL
    try:
        facts = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error
    return File(path, form, facts.st_size, facts.st_mtime_ns)


def head_lines(path: Path) -> list[bytes]:
    """The first lines of a file, whole, within PEEKED_BYTES (one line more if that one is longer)."""
    data = b""
    try:
        with Stream(path) as stream:
            while len(data) < PEEKED_BYTES or (b"\n" not in data and len(data) < 1 << 28):
                block = stream.read()
                if not block:
                    break
                data += block
            else:
                data = data[: data.rfind(b"\n") + 1] or data
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error
    except DamageError:
        pass  # whoever reads all of it says so
    return data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[:PEEKED_LINES]


def _records(path: Path) -> Iterator[dict[str, object]]:
    """The records among a file's first lines that parse."""
    for line in head_lines(path):
        try:
            record = msgspec.json.decode(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def _columns(path: Path) -> dict[str, bool]:
    """Column -> does it hold text, of a Parquet file."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        schema = parquet.read_schema(path)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}; fetch it again") from error
    text = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view, arrow.types.is_dictionary)
    return {field.name: any(is_kind(field.type) for is_kind in text) for field in schema}


def key_of(file: File, key: str | None) -> str:
    """The key that a file's text is under: `key` if given, else the one of KEYS that its first records hold."""
    if key or file.form == TEXT:
        return key or ""
    if file.form == PARQUET:
        columns = _columns(file.path)
        return next((name for name in KEYS if columns.get(name)), KEYS[0])
    strings = Counter(name for record in _records(file.path) for name in KEYS if isinstance(record.get(name), str))
    return max(KEYS, key=lambda name: strings[name])  # the earlier of KEYS on a tie


def check_keys(files: Sequence[File], key: str | None) -> None:
    """Raise UserError, naming the keys that are there, when no record of the first files has the text's key.

    Better now than after hours of counting bad lines.
    """
    wanted = (key,) if key else KEYS
    names = " or ".join(map(repr, wanted))
    for file in files:
        if file.form == PARQUET:
            columns = _columns(file.path)
            if not any(columns.get(name) for name in wanted):
                there = ", ".join(f"{name!r}" for name, is_text in columns.items() if is_text) or "none of text"
                raise UserError(f"{file.path}: no text column {names}; columns there: {there}; name one with --key", 2)
            break
    seen: Counter[str] = Counter()
    arrays: list[Path] = []
    lines = [file for file in files if file.form == JSONL][:PEEKED_FILES]
    for file in lines:
        records = list(_records(file.path))
        if any(name in record for record in records for name in wanted):
            return
        for record in records:
            seen.update(record.keys())
        if not records and (head_lines(file.path) or [b""])[0].lstrip()[:1] == b"[":
            arrays.append(file.path)
    if seen:
        there = ", ".join(repr(name) for name, _ in seen.most_common(8))
        raise UserError(
            f"{lines[0].path}: no key {names} in the first records; keys there: {there}; name one with --key", 2
        )
    if arrays:
        raise UserError(
            f"{arrays[0]}: looks like one JSON array, not one record a line; rewrite it: jq -c '.[]' FILE > FILE.jsonl",
            2,
        )
