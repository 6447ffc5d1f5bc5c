"""The log of refused records: one line of JSON each, with place, reason and the record's first characters."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TextIO

from data_prep.conversations.files import Fault
from data_prep.conversations.record import Location
from data_prep.errors import UserError

LOGGED = 2000  # characters of a record that are kept


class RefusedLog:
    """Writes records to a file aside, which `close` puts in its place; none is there when nothing was refused."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._aside = path.with_name(path.name + ".tmp")
        self._file: TextIO | None = None

    def add(self, place: Location, fault: Fault, data: bytes) -> None:
        """Log one record; made for Tally.log. Raises UserError when the disk refuses."""
        text = data[: 4 * LOGGED].decode("utf-8", "backslashreplace")[:LOGGED]
        entry = {"file": place.file, "line": place.line, "record": place.record}
        entry |= {"cause": fault.cause, "detail": fault.detail, "data": text}
        line = json.dumps({key: value for key, value in entry.items() if value not in (None, "")}, ensure_ascii=False)
        try:
            if self._file is None:
                self._aside.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._aside.open("w", encoding="utf-8", errors="backslashreplace")
            self._file.write(line + "\n")
        except OSError as error:
            raise self._refused(error) from error
        self.count += 1

    def close(self) -> None:
        """Put the log in its place, and an older one away. Raises UserError when the disk refuses."""
        try:
            if self._file is None:
                self.path.unlink(missing_ok=True)
                return
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            self._aside.replace(self.path)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            with contextlib.suppress(OSError):
                self._aside.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror}; free space there, or write elsewhere")
