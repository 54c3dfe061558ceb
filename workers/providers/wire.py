"""What every provider's wire has in common: bytes become payloads under caps, or a named failure.

The SDKs call a stream complete when its connection ends cleanly, whatever arrived (half an answer,
an HTML page, nothing); so adapters read the bytes themselves and look for the provider's own end.
Source of the framing: WHATWG HTML, "Server-sent events", with lines ended by LF or CRLF.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import msgspec

from backchannel.errors import ProviderError
from workers.endpoint import Endpoint, Read, reader
from workers.providers import ChatRequest, Delta, ProviderEvent, Reasoning, Signature, ToolCall
from workers.providers.failures import classify, failure, refusal, refused

T = TypeVar("T")
_ANY = msgspec.json.Decoder()

BOM = b"\xef\xbb\xbf"
FIELDS = frozenset({b"data", b"event", b"id", b"retry"})
TAIL_S = 5.0  # seconds a whole answer waits for its usage; some servers never close
DRAIN_S = 0.1  # seconds to see the end of the body, so that the connection can serve again


class Answer:
    """One response body, read as server-sent events or as one JSON document, whichever it is.

    What was asked for does not decide: servers answer plainly to ``stream: true``, stream when
    asked not to, and mislabel both. The first byte decides.

    Attributes:
        payloads: The data of each event, or the one document.
        plain: Whether the payload is one whole JSON document.
    """

    def __init__(self, read: Read, request: ChatRequest) -> None:
        self.payloads = self._payloads()
        self.plain = False
        self._read = read
        self._provider = request.provider
        self._line_cap = request.line_cap
        self._answer_cap = request.answer_cap
        self._size = 0
        self._until: float | None = None
        self._partial = False
        self._rest = bytearray()  # bytes after the last line end
        self._data: list[bytes] = []  # the current event's data lines
        self._data_size = 0

    @property
    def whole(self) -> bool:
        """Whether the provider's own end was seen: nothing after it can fail the answer."""
        return self._until is not None

    def ended(self) -> None:
        """The provider's own end was seen: read on for `TAIL_S` at most, for the usage."""
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + TAIL_S

    def count(self, event: ProviderEvent) -> None:
        """Hold the answer to its cap.

        Raises:
            ProviderError: ``answer_too_large``.
        """
        kind = type(event)
        if kind is Delta or kind is Reasoning or kind is Signature:
            text = event.text  # type: ignore[union-attr]
        elif kind is ToolCall:
            text = event.arguments  # type: ignore[union-attr]
        else:
            return
        self._size += len(text) if text.isascii() else len(text.encode())
        if self._size > self._answer_cap:
            raise self.error("answer_too_large", f"answered more than {self._answer_cap} bytes")

    def decode(self, decoder: msgspec.json.Decoder[T], payload: bytes) -> T:
        """A payload as a struct.

        Raises:
            ProviderError: ``malformed``, or ``truncated`` when the body ended inside the payload.
        """
        try:
            return decoder.decode(payload)
        except (ValueError, RecursionError) as error:  # ValueError: msgspec's own, and bad UTF-8
            if self._partial or (self.plain and "truncated" in str(error)):
                raise self.error("truncated", "ended in the middle of a message") from error
            raise self.error("malformed", "sent a message that is not its protocol") from error

    def document(self, kind: type[T], payload: bytes) -> T:
        """A plain answer as a struct.

        Raises:
            ProviderError: As `decode`, and whatever an error object on HTTP 200 says.
        """
        value = self.decode(_ANY, payload)
        if not isinstance(value, dict) or value.get("error") or value.get("object") == "error":
            raise refusal(self._provider, value)
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise self.error("malformed", "answered with JSON that is no chat") from error

    def refusal(self, said: Any) -> ProviderError:
        """The error that a message of the stream reports."""
        return refusal(self._provider, said)

    def error(self, code: str, what: str) -> ProviderError:
        """An error about this answer: ``what`` continues the sentence "Provider 'x' …"."""
        return failure(self._provider.id, code, what)

    async def _payloads(self) -> AsyncGenerator[bytes]:
        # One generator, not one for each layer: every hop costs every token of every stream.
        start = await self._start()
        if self.plain:
            yield await self._document(start)
            return
        for payload in self._feed(start):
            yield payload
        while chunk := await self._chunk():
            for payload in self._feed(chunk):
                yield payload
        # What is left was cut off, or is a last event without the blank line after it.
        self._partial = bool(self._rest)
        for payload in self._feed(b"\n\n"):
            yield payload

    async def _start(self) -> bytes:
        """The first bytes that are more than white space; they tell what the body is."""
        head = b""
        while chunk := await self._chunk():
            head += chunk
            if BOM.startswith(head) or not (start := head.removeprefix(BOM).lstrip()):
                self._check_line(len(head))
                continue
            if start[:1] == b"<":
                raise self.error("malformed", "answered with a page, not with a chat")
            self.plain = start[:1] in (b"{", b"[")
            return start
        raise self.error("truncated", "answered with an empty body")

    async def drain(self) -> None:
        """Read to the end of the body, so that the connection can be used again."""
        self._until = asyncio.get_running_loop().time() + DRAIN_S
        while await self._chunk():
            pass

    async def _document(self, start: bytes) -> bytes:
        document = bytearray(start)
        while chunk := await self._chunk():
            document += chunk
            if len(document) > self._answer_cap:
                raise self.error("answer_too_large", f"answered more than {self._answer_cap} bytes")
        return bytes(document)

    def _chunk(self) -> Awaitable[bytes]:
        """The body's next bytes, none at its end; after the answer's own end not for long."""
        return self._read() if self._until is None else self._hurried()

    async def _hurried(self) -> bytes:
        async with asyncio.timeout_at(self._until):
            return await self._read()

    def _feed(self, chunk: bytes) -> Iterator[bytes]:
        """The events this chunk completes; at most a line and an event's data are kept."""
        if self._rest or b"\n" not in chunk:
            self._rest += chunk
            if b"\n" not in chunk:
                self._check_line(len(self._rest))
                return
            chunk = bytes(self._rest)
            self._rest.clear()
        # bytes.split, not a text splitlines: that one also cuts at U+2028 inside JSON strings
        lines = chunk.split(b"\n")
        if rest := lines.pop():
            self._rest += rest
            self._check_line(len(rest))
        for line in lines:
            if line[-1:] == b"\r":
                line = line[:-1]
            if line[:5] == b"data:":
                data = line[6:] if line[5:6] == b" " else line[5:]
                self._data.append(data)
                self._data_size += len(data) + 1
                self._check_line(self._data_size)
            elif not line:
                if self._data:
                    payload = b"\n".join(self._data)
                    self._data.clear()
                    self._data_size = 0
                    yield payload
            elif not self._known(line.partition(b":")[0]):
                raise self.error("malformed", "sent a line that is no server-sent event")

    def _known(self, name: bytes) -> bool:
        """Whether a field's name is one of SSE's; a comment's is empty, a cut line's cut."""
        if self._partial:
            return any(field.startswith(name) for field in FIELDS)
        return not name or name in FIELDS

    def _check_line(self, size: int) -> None:
        if size > self._line_cap:
            raise self.error("malformed", f"sent a line of more than {self._line_cap} bytes")


@asynccontextmanager
async def opened(
    client: Endpoint, body: dict[str, Any], request: ChatRequest
) -> AsyncGenerator[Answer]:
    """Make the call and name every failure; leaving closes the response.

    Args:
        body: What is sent, as JSON.
        request: For the caps and the provider's name.

    Raises:
        ProviderError: Everything that goes wrong, unless the answer was whole by then.
    """
    answer: Answer | None = None
    try:
        async with aclosing(await client.post(body)) as response:
            if not response.is_success:
                await response.aread()
                raise refused(response, request.provider)
            answer = Answer(reader(response), request)
            async with aclosing(answer.payloads):
                yield answer
            if answer.whole:
                await answer.drain()
    except Exception as error:
        classified = classify(error, request.provider)
        if classified is None:  # a bug of ours: let it be seen as one
            raise
        if answer is None or not answer.whole:
            # not "from error": a client's exception carries the request, with prompt and key
            raise classified from None
