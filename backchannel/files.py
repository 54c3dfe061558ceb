"""Files as chunks in the database: cut into whole lines on the way in, read back one at a time."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, delete, exists, func, insert, select, update

from backchannel.db import NOW
from backchannel.errors import Conflict
from backchannel.tables import batches, chunks, files

CHUNK_BYTES = 512 << 10  # raw; small enough to be unpacked once per window of a batch
MAX_LINE_BYTES = 4 << 20  # room for a few images in base64

INPUT = "input"
OUTPUT = "output"
ERROR = "error"
UPLOADING = "uploading"
PROCESSED = "processed"
ABANDONED_MS = 86_400_000  # an upload that has not ended by then has no client any more


class Chunk(NamedTuple):
    """A piece of a file: whole lines, unless one of them is over `MAX_LINE_BYTES`."""

    n: int
    first_line: int
    lines: int
    data: bytes  # compressed

    def unpack(self) -> list[bytes]:
        """Its lines, without their ends."""
        return self.raw().removesuffix(b"\n").split(b"\n")

    def is_torn(self) -> bool:
        """Whether it ends in the middle of a line."""
        return len(self.unpack()) > self.lines

    def raw(self) -> bytes:
        """Its bytes."""
        return zlib.decompress(self.data)


class Cutter:
    """Cuts a file that comes in pieces of any size into chunks; holds one of them at most."""

    def __init__(self) -> None:
        self.bytes = 0
        self._held = bytearray()
        self._n = 0
        self._line = 1

    def add(self, piece: bytes) -> bool:
        """Take a piece; whether there is enough now to look for a chunk."""
        self.bytes += len(piece)
        self._held += piece
        return len(self._held) >= CHUNK_BYTES

    def cut(self) -> Chunk | None:
        """The next chunk; None in the middle of a long line."""
        end = self._held.rfind(b"\n") + 1
        if not end and len(self._held) <= MAX_LINE_BYTES:
            return None
        return self._cut(end or len(self._held))

    def rest(self) -> Chunk | None:
        """The last chunk, if anything is left."""
        return self._cut(len(self._held)) if self._held else None

    def _cut(self, end: int) -> Chunk:
        data = bytes(self._held[:end])
        del self._held[:end]
        lines = data.count(b"\n")
        chunk = Chunk(self._n, self._line, lines, zlib.compress(data, level=1))
        self._n += 1
        self._line += lines
        return chunk


# ---------------------------------------------------------------- writing


def begin(connection: Connection, file_id: str, caller: str) -> None:
    """Open an upload: nobody sees the file before it is whole."""
    connection.execute(
        insert(files).values(created_ms=NOW),
        {
            "id": file_id, "caller": caller, "kind": INPUT, "purpose": "",
            "filename": "", "status": UPLOADING, "bytes": 0,
        },
    )  # fmt: skip


def put(connection: Connection, file_id: str, chunk: Chunk) -> None:
    """Add a chunk; again does nothing."""
    connection.execute(delete(chunks).where(chunks.c.file_id == file_id, chunks.c.n == chunk.n))
    connection.execute(insert(chunks), {"file_id": file_id, **chunk._asdict()})


def complete(
    connection: Connection,
    file_id: str,
    *,
    filename: str,
    size: int,
    purpose: str,
    expires_in_s: int | None,
) -> None:
    """The upload is whole: from here on the file is there."""
    expires = None if expires_in_s is None else NOW + expires_in_s * 1000
    connection.execute(
        update(files)
        .where(files.c.id == file_id)
        .values(
            status=PROCESSED, filename=filename, bytes=size, purpose=purpose, expires_ms=expires
        )
    )


def drop(connection: Connection, file_id: str) -> None:
    """Remove a file and its chunks.

    Raises:
        Conflict: A batch that has not ended needs it.
    """
    needing = connection.execute(
        select(batches.c.id).where(
            batches.c.ended_ms.is_(None),
            (batches.c.input_file_id == file_id)
            | (batches.c.output_file_id == file_id)
            | (batches.c.error_file_id == file_id),
        )
    ).scalar()
    if needing is not None:
        raise Conflict(
            f"{needing} is not over yet and needs this file. Cancel it, or wait for its end.",
            code="file_in_use",
        )
    connection.execute(delete(files).where(files.c.id == file_id))


def forget_expired(connection: Connection) -> int:
    """Remove what has expired, and uploads whose client went away; returns how many."""
    needed = exists().where(batches.c.ended_ms.is_(None), batches.c.input_file_id == files.c.id)
    gone = (files.c.expires_ms <= NOW) | (
        (files.c.status == UPLOADING) & (files.c.created_ms < NOW - ABANDONED_MS)
    )
    return connection.execute(delete(files).where(gone, ~needed)).rowcount


# ---------------------------------------------------------------- reading

_chunk = (chunks.c.n, chunks.c.first_line, chunks.c.lines, chunks.c.data)
_NTH = select(*_chunk).where(chunks.c.file_id == bindparam("file"), chunks.c.n == bindparam("nth"))
_WITH_LINE = (
    select(*_chunk)
    .where(chunks.c.file_id == bindparam("file"), chunks.c.first_line <= bindparam("line"))
    .order_by(chunks.c.first_line.desc())
    .limit(1)
)


def chunk(connection: Connection, file_id: str, n: int) -> Chunk | None:
    """A file's chunk, counted from 0; None: there are no more."""
    return _found(connection.execute(_NTH, {"file": file_id, "nth": n}).first())


def chunk_with(connection: Connection, file_id: str, line: int) -> Chunk | None:
    """The chunk that holds a line."""
    return _found(connection.execute(_WITH_LINE, {"file": file_id, "line": line}).first())


_LAST = select(func.max(chunks.c.n)).where(chunks.c.file_id == bindparam("file"))


def is_last(connection: Connection, file_id: str, n: int) -> bool:
    """Whether there is nothing behind the chunk with this number."""
    last = connection.execute(_LAST, {"file": file_id}).scalar()
    return last is None or n >= last


def _found(row: Any) -> Chunk | None:
    return None if row is None else Chunk(row.n, row.first_line, row.lines, bytes(row.data))


_VISIBLE = files.select().where(
    files.c.id == bindparam("file"),
    files.c.caller == bindparam("who"),
    files.c.status == PROCESSED,
    files.c.expires_ms.is_(None) | (files.c.expires_ms > NOW),
)


def find(connection: Connection, file_id: str, caller: str) -> Any:
    """A caller's whole file, or None."""
    return connection.execute(_VISIBLE, {"file": file_id, "who": caller}).first()
