"""Parquet: rows of one text column, a range of row groups at a time.

Memory is bounded by pages, which the format unpacks whole. Writers look at a page's size once in 1,024 rows: where rows
are books, a row group is one page, or one dictionary held twice. Write such files with row groups of 100 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.errors import UserError
from data_prep.filters import Filters
from data_prep.inputs import File
from data_prep.readers import Batch, Fault, Tally, finish, reject

ROWS, FEWEST_ROWS = 256, 8  # decoded at a time: web pages of some kilobytes make about a megabyte; fewer are of books
BATCH_BYTES = 1 << 24


def group_sizes(file: File) -> list[int]:
    """Bytes of each row group, unpacked. Raises UserError for a damaged file."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        facts = parquet.read_metadata(file.path)
        return [facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)]
    except (OSError, arrow.ArrowException) as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"{file.path}: not a readable Parquet file: {cause}; fetch it again") from error


class RowGroups:
    """Iterates over the batches of row groups [start, stop). `damage`, afterwards: why it broke off, if it did."""

    def __init__(self, file: File, key: str, start: int, stop: int | None, filters: Filters | None) -> None:
        self.file, self.key, self.start, self.stop, self.filters = file, key, start, stop, filters
        self.ended, self.damage, self.disk = False, "", 0

    def __iter__(self) -> Iterator[Batch]:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(
                self.file.path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
            ) as table:
                facts = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
                groups = range(self.start, len(facts) if self.stop is None else self.stop)
                self.ended = groups.stop >= len(facts)
                columns = None if self.filters and self.filters.needs_record else [self.key]
                row, total = sum(facts[i].num_rows for i in range(self.start)), table.metadata.num_rows
                if sum(group.num_rows for group in facts) != total or groups.stop > len(facts):
                    raise arrow.ArrowInvalid(f"row groups that do not make {total:,} rows")
                number = 1
                for group in groups:
                    count = facts[group].num_rows
                    size, left = facts[group].total_byte_size, count
                    rows = min(ROWS, max(FEWEST_ROWS, BATCH_BYTES * count // max(1, size)))
                    for records in table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                        self.disk += records.num_rows * self.file.size // max(1, total)
                        left -= records.num_rows
                        yield self._batch(records, number, row, records.num_rows * size // max(1, count))
                        number, row = number + records.num_rows, row + records.num_rows
                    if left:
                        raise arrow.ArrowInvalid(f"row group {group} lacks {left:,} of {count:,} rows")
        except (OSError, arrow.ArrowException) as error:
            self.ended, self.damage = True, f"the Parquet data is damaged ({str(error).splitlines()[0]})"

    def _batch(self, records: Any, number: int, row: int, size: int) -> Batch:
        tally = Tally(lines=records.num_rows)
        texts: list[str] = []
        numbers: list[int] = []
        faults: list[Fault] = []
        place = records.schema.get_field_index(self.key)
        if place < 0:
            for i in range(records.num_rows):
                reject(tally, faults, Fault(number + i, row + i, f"no key {self.key!r}"))
            return finish(texts, tally, size, faults, numbers)
        column = records.column(place)
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:
            values = [_value(cell) for cell in column]
        others = _records(records) if self.filters and self.filters.needs_record else None
        for i, value in enumerate(values):
            if not isinstance(value, str):
                kind = "broken UTF-8" if isinstance(value, bytes) else "text is not a string"
                reject(tally, faults, Fault(number + i, row + i, kind, type(value).__name__))
            elif not value:
                reject(tally, faults, Fault(number + i, row + i, "empty text"))
            else:
                reason = self.filters.reject(value, others[i] if others else None) if self.filters else None
                if reason:
                    tally.filtered[reason] += 1
                else:
                    texts.append(value)
                    numbers.append(number + i)
        return finish(texts, tally, size, faults, numbers)


def _records(records: Any) -> list[object]:
    """Rows as dictionaries; those that hold what Python cannot (broken UTF-8, far times) are none."""
    try:
        return list(records.to_pylist())
    except (ValueError, OverflowError):
        return [_value(row) for row in records.to_struct_array()]


def _value(cell: Any) -> object:
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return b""
