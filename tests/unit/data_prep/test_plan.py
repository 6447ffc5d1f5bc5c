"""The plan: every byte and row group of every file once, in an order that nobody's number changes."""

from __future__ import annotations

import gzip
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.inputs import JSONL, PARQUET, TEXT, File, describe, expand_inputs
from data_prep.plan import LARGEST, PART_NAME, SMALLEST, USUAL, Span, Unit, make_plan, part_size, settings_digest
from data_prep.tokenize import Options, _settings
from data_prep.tokenizers import Tokenizer

ROW_GROUPS = (1, 3, 0, 12, 40)  # rows of each group of the one real Parquet file


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain, a packed and a Parquet file; their sizes are claimed, not real."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "plain").write_bytes(b"{}\n")
    (folder / "packed").write_bytes(gzip.compress(b"{}\n"))
    with parquet.ParquetWriter(folder / "table", arrow.schema([("text", arrow.string())])) as writer:
        for rows in ROW_GROUPS:
            texts = arrow.array([f"{i}" * 100 for i in range(rows)], arrow.string())
            writer.write_table(arrow.table({"text": texts}))
    return folder


def a_file(shelf: Path, number: int, kind: str, size: int) -> File:
    """A file of some kind; its path, for sorting and naming, is a name of its own for the same bytes."""
    folder = shelf / f"{number:04}"
    folder.mkdir(exist_ok=True)
    path = folder / ".." / {"text": "plain"}.get(kind, kind)
    return File(path, {"table": PARQUET, "text": TEXT}.get(kind, JSONL), size, number)


def spans_of(units: Sequence[Unit]) -> list[Span]:
    return [span for unit in units for span in unit.part(0).spans]


KINDS = st.sampled_from(["plain", "packed", "table", "text"])
SIZES = st.one_of(st.integers(0, 100), st.integers(0, 5000))


@settings(deadline=None, max_examples=120)
@given(st.lists(st.tuples(KINDS, SIZES), max_size=12), st.integers(1, 3000), st.booleans())
def test_parts_cover_every_byte_and_row_group_once_in_order(
    shelf: Path, kinds: list[tuple[str, int]], part_bytes: int, whole_text: bool
) -> None:
    files = [a_file(shelf, number, kind, size) for number, (kind, size) in enumerate(kinds)]
    units = make_plan(files, "0" * 20, part_bytes, whole_text)
    spans = spans_of(units)
    order = [files.index(span.file) for span in spans]
    assert order == sorted(order) and set(order) == set(range(len(files)))
    for number, file in enumerate(files):
        mine = [span for span in spans if span.file is file]
        assert mine[0].start == 0
        assert all(a.stop == b.start and b.start > a.start for a, b in pairwise(mine))
        open_ended = [unit for unit in units if unit.open_ended and unit.part(0).spans[0].file is file]
        small = file.size <= part_bytes // 4
        if kinds[number][0] == "packed" and not small:
            assert len(mine) == len(open_ended) == 1
            row = [open_ended[0].part(i).spans[0] for i in range(4)]
            assert [(span.start, span.stop) for span in row] == [
                (i * part_bytes, (i + 1) * part_bytes) for i in range(4)
            ]
        else:
            assert not open_ended and mine[-1].stop in (None, len(ROW_GROUPS))
        if kinds[number][0] == "plain" and not small:
            assert all(span.stop is not None and span.stop - span.start == part_bytes for span in mine[:-1])
            assert 0 < file.size - mine[-1].start <= part_bytes
        if (kinds[number][0] == "text" and whole_text) or small:
            assert len(mine) == 1 and mine[0].stop is None
    assert sum(unit.size for unit in units) <= sum(file.size for file in files)
    for unit in units:
        if len(unit.part(0).spans) > 1:  # small files are put together, and never above a part's size
            assert sum(span.file.size for span in unit.part(0).spans) <= part_bytes
    names = [unit.part(number).name for unit in units for number in (range(3) if unit.open_ended else (0,))]
    assert len(set(names)) == len(names) and all(PART_NAME.search(name) for name in names)


def test_small_files_share_a_part_and_nothing_else_does(shelf: Path) -> None:
    files = [a_file(shelf, i, "plain", size) for i, size in enumerate([10, 10, 500, 10, 24, 24, 24, 24, 24])]
    parts = [[span.file.size for span in unit.part(0).spans] for unit in make_plan(files, "", 100, True)]
    assert parts == [[10, 10], [500]] + [[500]] * 4 + [[10, 24, 24, 24], [24, 24]]


def names_of(files: Sequence[File], digest: str, part_bytes: int = 1000) -> list[str]:
    return [unit.part(0).name for unit in make_plan(files, digest, part_bytes, False)]


def test_a_parts_name_changes_with_all_that_goes_into_it_and_nothing_else(shelf: Path) -> None:
    files = [a_file(shelf, 1, "plain", 3000), a_file(shelf, 2, "packed", 900), a_file(shelf, 3, "plain", 9)]
    first = names_of(files, "a")
    assert names_of(list(files), "a") == first and len(set(first)) == 5
    assert not set(names_of(files, "b")) & set(first)
    (shelf / "elsewhere").write_bytes(b"{}\n")
    for changed in ({"size": 3001}, {"mtime_ns": 7}, {"path": shelf / "elsewhere"}, {"form": TEXT}):
        assert not set(names_of([replace(files[0], **changed), *files[1:]], "a")[:3]) & set(first)  # type: ignore[arg-type]
    assert names_of([replace(files[0], mtime_ns=7), *files[1:]], "a")[3:] == first[3:]
    assert names_of(files[1:], "a") == first[3:]  # where a file stands is not in its name


@pytest.mark.parametrize("changed", [
    {"append_eod": False}, {"prepend_bos": True}, {"parse_special": True},
    {"reading": {"key": "body"}}, {"reading": {"text_documents": "line"}}, {"reading": {"max_line_bytes": 5}},
])  # fmt: skip
def test_settings_that_change_the_output_change_the_digest(changed: dict[str, object], tmp_path: Path) -> None:
    tokenizer = a_tokenizer(tmp_path)
    options = Options()
    reading = changed.pop("reading", {})
    other = replace(options, reading=replace(options.reading, **reading), **changed)  # type: ignore[arg-type]
    assert settings_digest(_settings(tokenizer, other)) != settings_digest(_settings(tokenizer, options))


def test_settings_that_only_say_who_works_do_not(tmp_path: Path) -> None:
    tokenizer, options = a_tokenizer(tmp_path), Options()
    other = Options(
        engine="official", workers=7, max_bad=1, allow_damaged=True, task=(1, 3), merge=False, progress=True
    )
    assert settings_digest(_settings(tokenizer, other)) == settings_digest(_settings(tokenizer, options))
    (tmp_path / "tokenizer.json").write_text("another")
    assert settings_digest(_settings(a_tokenizer(tmp_path, "another"), options)) != settings_digest(
        _settings(tokenizer, options)
    )


def a_tokenizer(folder: Path, text: str = "one") -> Tokenizer:
    """As far as `_settings` looks."""

    class Told:
        path, vocab_size, bos, eod = folder / f"{text}.model", 100, 1, 2

    Told.path.write_text(text)
    return Told()  # type: ignore[return-value]


def test_the_plan_follows_the_sorted_paths_whatever_the_arguments_order(tmp_path: Path) -> None:
    draw, names = (
        random.Random(1),
        ["b.jsonl", "a.jsonl", "B.jsonl", "ä.jsonl", "a10.jsonl", "a9.jsonl", "deep/a.jsonl"],
    )
    (tmp_path / "deep").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 500)
        os.utime(tmp_path / name, (1, 1))
    plans = set()
    for _ in range(5):
        draw.shuffle(names)
        inputs: list[str | Path] = [tmp_path / name for name in names]
        files = [
            describe(path)
            for path in expand_inputs(draw.choice([inputs, [tmp_path], [f"{tmp_path}/**/*.jsonl", *inputs]]))
        ]
        plans.add(
            tuple((unit.part(0).name, str(unit.part(0).spans[0].file.path)) for unit in make_plan(files, "", 100, True))
        )
    (plan,) = plans
    paths = [path for _, path in plan]
    assert paths == sorted(paths) and len(set(paths)) == len(names)


@given(st.lists(st.integers(0, 1 << 44), max_size=5))
def test_the_size_of_parts_follows_from_the_inputs_alone(sizes: list[int]) -> None:
    files = [File(Path(f"{i}"), JSONL, size, 0) for i, size in enumerate(sizes)]
    size, total = part_size(files), sum(sizes)
    assert size in [SMALLEST << i for i in range(6)] and size == part_size(files[::-1])
    assert size == LARGEST or total <= (64 if size < USUAL else 4096) * size
    assert size == SMALLEST or total > (64 if size <= USUAL else 4096) * size // 2


def test_a_file_that_cannot_be_read_is_named_before_any_work() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        path.write_bytes(b"PAR1" * 100)
        with pytest.raises(UserError, match=rf"{path}: not a readable Parquet file"):
            make_plan([describe(path)], "", 100, True)
        gone = File(Path(folder) / "gone.jsonl", JSONL, 1000, 0)
        with pytest.raises(UserError, match=rf"{gone.path}: cannot be read: No such file"):
            make_plan([gone], "", 100, True)
