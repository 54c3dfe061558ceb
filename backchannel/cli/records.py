"""A JSON-lines file that is added to while it is read, and put in order at the end."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from backchannel.cli.screen import misuse

_encode = msgspec.json.Encoder().encode


class Records:
    """One record a line, found again by its key; the last one with a key counts.

    Made for a run that may be killed at any time: a torn last line is cut off at the next start,
    and rewriting replaces the whole file at once.

    Args:
        key_of: The key of a record that was read back.
        is_done: Whether a record needs no more work, for `done`.
    """

    def __init__(
        self,
        path: Path,
        key_of: Callable[[dict[str, Any]], str],
        is_done: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> None:
        self.path = path
        self.done: dict[str, str] = {}  # key to the record's id
        self._places: dict[str, int] = {}  # key to the offset of its line
        self._untidy = False
        self._file: BinaryIO | None = None
        self._end = 0
        # a device or a pipe is written to, and that is all
        self._regular = not path.exists() or stat.S_ISREG(path.stat().st_mode)
        if self._regular and path.exists():
            self._read(key_of, is_done)

    def __len__(self) -> int:
        return len(self._places)

    def keys(self) -> list[str]:
        """The keys of all records."""
        return list(self._places)

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Write a record so that another process sees it."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self._regular and self._end else "wb")
            if self._regular:
                self._file.truncate(self._end)
                self._file.seek(self._end)
        line = _encode(record) + b"\n"
        self._file.write(line)
        self._file.flush()
        self._untidy |= key in self._places
        self._places[key] = self._end
        self._end += len(line)

    def drop(self, key: str) -> None:
        """Leave a record out when the file is closed."""
        if self._places.pop(key, None) is not None:
            self._untidy = True

    def close(self, order: Iterable[str] | None = None) -> None:
        """Make it last; with an order, or when records were replaced, the file is written anew.

        An empty file is removed.
        """
        if self._file is not None:
            self._file.flush()
            if self._regular:
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        if not self._regular:
            return
        if not self._places:
            self.path.unlink(missing_ok=True)
        elif self._untidy or order is not None:
            self._rewrite(order)

    def _read(
        self, key_of: Callable[[dict[str, Any]], str], is_done: Callable[[dict[str, Any]], bool]
    ) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # torn by a kill: `_end` is before it
                try:
                    record = msgspec.json.decode(line)
                    key = key_of(record)
                except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
                    misuse(
                        f"{self.path} is not a file of results: line {number}. Nothing was "
                        "changed; choose another with -o or --errors."
                    )
                self._untidy |= key in self._places
                self._places[key] = self._end
                self.done.pop(key, None)
                if is_done(record):
                    self.done[key] = str(record.get("id"))
                self._end += len(line)

    def _rewrite(self, order: Iterable[str] | None) -> None:
        path = self.path.resolve()
        part = path.with_name(path.name + ".part")
        left = dict(self._places)
        first = [(key, left.pop(key)) for key in order or () if key in left]
        with path.open("rb") as old, part.open("wb") as new:
            for _, place in [*first, *sorted(left.items(), key=lambda item: item[1])]:
                old.seek(place)
                new.write(old.readline())
            new.flush()
            os.fsync(new.fileno())
        part.replace(path)
