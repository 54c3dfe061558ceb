"""A multipart form with one file in it, read as it comes: the file is never held as a whole.

The form is that of RFC 7578. Fields are short texts; the part called ``file`` is handed on piece
by piece.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from email.message import Message

from backchannel.errors import InvalidRequest, TooLarge

MAX_HEAD_BYTES = 16 << 10  # of a part's headers
MAX_FIELD_BYTES = 64 << 10
MAX_FIELDS = 50
FILE = "file"

_NAME = re.compile(rb'\bname="((?:[^"\\]|\\.)*)"')
_FILENAME = re.compile(rb'\bfilename="((?:[^"\\]|\\.)*)"')


class Form:
    """What a form holds beside the file's bytes."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None  # None: there was no file


async def read_form(
    content_type: str, body: AsyncIterator[bytes], take: Callable[[bytes], Awaitable[None]]
) -> Form:
    """Read a form to its end; `take` gets the file's bytes.

    Raises:
        InvalidRequest: It is no such form, has two files, or ends too early.
        TooLarge: A field is, or there are too many.
    """
    reader = _Reader(_boundary(content_type), body)
    form = Form()
    await reader.until(reader.first, _ignore)
    while (head := await reader.head()) is not None:
        name = _quoted(_NAME, head)
        if name == FILE:
            if form.filename is not None:
                raise InvalidRequest("file: give one, and send others by themselves.", param=FILE)
            form.filename = _quoted(_FILENAME, head) or "upload"
            await reader.until(reader.delimiter, take)
        else:
            field = bytearray()
            await reader.until(reader.delimiter, _collector(field))
            form.fields[name or ""] = field.decode(errors="replace")
            if len(form.fields) > MAX_FIELDS:
                raise TooLarge(f"The form has over {MAX_FIELDS} fields.")
    return form


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise InvalidRequest(
            "Send the file as a form: Content-Type multipart/form-data, with the fields purpose "
            "and file."
        )
    return boundary.encode()


def _quoted(pattern: re.Pattern[bytes], head: bytes) -> str | None:
    found = pattern.search(head)
    if found is None:
        return None
    text = found[1].replace(b'\\"', b'"').replace(b"%22", b'"')
    return text.decode(errors="replace").replace("\0", "")


async def _ignore(_piece: bytes) -> None:
    pass


def _collector(field: bytearray) -> Callable[[bytes], Awaitable[None]]:
    async def collect(piece: bytes) -> None:
        field.extend(piece)
        if len(field) > MAX_FIELD_BYTES:
            raise TooLarge(f"A field of the form is over {MAX_FIELD_BYTES:,} bytes.")

    return collect


class _Reader:
    """The body, up to the next delimiter at a time."""

    def __init__(self, boundary: bytes, body: AsyncIterator[bytes]) -> None:
        self.first = b"--" + boundary
        self.delimiter = b"\r\n--" + boundary
        self._body = body
        self._held = b""

    async def until(self, delimiter: bytes, take: Callable[[bytes], Awaitable[None]]) -> None:
        """Hand on all before the delimiter, and step over it."""
        while (end := self._held.find(delimiter)) < 0:
            # the delimiter may be cut by the end of the piece
            sure = max(len(self._held) - len(delimiter) + 1, 0)
            if sure:
                await take(self._held[:sure])
            self._held = self._held[sure:] + await self._more()
        if end:
            await take(self._held[:end])
        self._held = self._held[end + len(delimiter) :]

    async def head(self) -> bytes | None:
        """The headers of the next part; None behind the last one."""
        while len(self._held) < 2:
            self._held += await self._more()
        if self._held.startswith(b"--"):
            return None
        while (end := self._held.find(b"\r\n\r\n")) < 0:
            if len(self._held) > MAX_HEAD_BYTES:
                raise InvalidRequest("The form's parts have no headers, or too long ones.")
            self._held += await self._more()
        head = self._held[:end]
        self._held = self._held[end + 4 :]
        return head

    async def _more(self) -> bytes:
        async for piece in self._body:
            if piece:
                return piece
        raise InvalidRequest("The form ends in the middle: its last boundary is missing.")
