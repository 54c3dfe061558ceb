"""Files: what is uploaded comes back to the byte, whatever its pieces; what is refused says why."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest

from api.multipart import read_form
from backchannel import files, idempotency
from backchannel.db import Database
from backchannel.errors import InvalidRequest
from tests import makers

FORM = "multipart/form-data; boundary=b0"


async def upload(
    client: httpx2.AsyncClient, content: bytes, purpose: str = "batch", **fields: str
) -> httpx2.Response:
    return await client.post(
        "/v1/files", data={"purpose": purpose, **fields}, files={"file": ("in.jsonl", content)}
    )


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it; the test's own time is the limit."""
    for _ in range(1_000):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it never came")


async def form_of(body: bytes, piece: int) -> tuple[bytes, dict[str, str], str | None]:
    """A form read in pieces of one size: the file, the fields, the file's name."""
    taken = bytearray()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), piece):
            yield body[start : start + piece]

    async def take(data: bytes) -> None:
        taken.extend(data)

    form = await read_form(FORM, pieces(), take)
    return bytes(taken), form.fields, form.filename


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
async def test_a_form_is_read_whatever_its_pieces(piece: int) -> None:
    content = b"\r\n--b\r\n--b1\r\n\0\xff\n--b0\n"
    body = (
        b'preamble\r\n--b0\r\nContent-Disposition: form-data; name="file"; filename="a \\"b\\".x"'
        b"\r\nContent-Type: text/plain\r\n\r\n" + content + b"\r\n--b0\r\n"
        b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b0--\r\nepilogue'
    )
    assert await form_of(body, piece) == (content, {"purpose": "batch"}, 'a "b".x')


@pytest.mark.parametrize("body", [b"", b"--b0", b"--b0\r\nContent-Disposition: x\r\n\r\nhalf"])
async def test_half_a_form_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        await form_of(body, 4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"one line",
        b"a\n\nb\r\n",
        b"x" * (files.MAX_LINE_BYTES + 10),
        b"".join(b"%d %s\n" % (n, b"y" * (n % 5000)) for n in range(1500)),
        os.urandom(2 * files.CHUNK_BYTES + 7),
    ],
    ids=["empty", "no end", "short", "one long line", "many lines", "random"],
)
async def test_a_file_comes_back_to_the_byte(client: httpx2.AsyncClient, content: bytes) -> None:
    answer = await upload(client, content, "user_data")
    assert answer.status_code == 200, answer.text
    file = answer.json()
    assert (file["bytes"], file["filename"], file["status"]) == (
        len(content), "in.jsonl", "processed",
    )  # fmt: skip
    again = await client.get(f"/v1/files/{file['id']}/content")
    assert again.content == content
    assert (await client.get(f"/v1/files/{file['id']}")).json() == file


async def test_files_are_listed_and_deleted(client: httpx2.AsyncClient) -> None:
    ids = [(await upload(client, b"a", purpose)).json()["id"] for purpose in
           ("batch", "user_data", "batch")]  # fmt: skip

    async def listed(**query: Any) -> tuple[list[str], bool]:
        page = (await client.get("/v1/files", params=query)).json()
        return [each["id"] for each in page["data"]], page["has_more"]

    assert await listed() == (ids[::-1], False)
    assert await listed(order="asc", limit=2) == (ids[:2], True)
    assert await listed(order="asc", after=ids[1]) == (ids[2:], False)
    assert await listed(purpose="batch") == ([ids[2], ids[0]], False)
    gone = await client.delete(f"/v1/files/{ids[0]}")
    assert gone.json() == {"id": ids[0], "object": "file", "deleted": True}
    for answer in (
        await client.get(f"/v1/files/{ids[0]}"),
        await client.delete(f"/v1/files/{ids[0]}"),
        await client.get(f"/v1/files/{ids[0]}/content"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_what_is_not_a_file_is_refused_and_leaves_nothing(
    client: httpx2.AsyncClient, database: Database
) -> None:
    refused = {
        "purpose": await upload(client, b"a", "evil"),
        "file": await client.post("/v1/files", files={"other": ("x", b"a")}),
        "expires_after.seconds": await upload(
            client, b"a", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "1"}
        ),
    }
    for param, answer in refused.items():
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert (await client.post("/v1/files", json={})).status_code == 400
    assert makers.rows(database, "files") == []


async def test_a_file_over_the_cap_is_refused_while_it_comes(
    client: httpx2.AsyncClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: Any = client._transport.app  # type: ignore[attr-defined]
    settings = app.state.resources.settings.model_copy(update={"max_file_bytes": 1 << 20})
    object.__setattr__(app.state.resources, "settings", settings)
    answer = await upload(client, b"a\n" * (1 << 20))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert makers.rows(database, "file_chunks") == []


async def test_an_upload_that_breaks_off_leaves_nothing(
    served: httpx2.AsyncClient, database: Database
) -> None:
    url = served.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = 'Content-Disposition: form-data; name="file"; filename="x"'
    writer.write(
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
        f"Content-Length: 100000000\r\n\r\n--b0\r\n{head}\r\n\r\n".encode()
        + b"a\n" * 600_000
    )
    await writer.drain()
    await until(lambda: bool(makers.rows(database, "file_chunks")))
    writer.close()
    await writer.wait_closed()
    await until(lambda: not makers.rows(database, "files"))
    assert makers.rows(database, "file_chunks") == []


async def keyed(client: httpx2.AsyncClient, content: bytes, **fields: Any) -> httpx2.Response:
    """An upload with the one key of this test."""
    return await client.post(
        "/v1/files",
        data={"purpose": "batch"} | fields,
        files={"file": ("in.jsonl", content)},
        headers={"Idempotency-Key": "k"},
    )


async def test_the_same_key_is_the_same_file(
    client: httpx2.AsyncClient, database: Database
) -> None:
    first, again = await keyed(client, b"a\n"), await keyed(client, b"a\n")
    assert again.json() == first.json()
    assert (first.headers.get("Idempotent-Replay"), again.headers["Idempotent-Replay"]) == (
        None, "true",
    )  # fmt: skip
    for other in (await keyed(client, b"b\n"), await keyed(client, b"a\n", purpose="vision")):
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_mismatch")
    listed = (await client.get("/v1/files")).json()["data"]
    assert [each["id"] for each in listed] == [first.json()["id"]]
    assert len(makers.rows(database, "file_chunks")) == 1


async def test_of_many_at_once_with_one_key_one_file_is_left(
    client: httpx2.AsyncClient, database: Database
) -> None:
    answers = await asyncio.gather(*(keyed(client, b"a\n" * 100_000) for _ in range(5)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len({row["file_id"] for row in makers.rows(database, "file_chunks")}) == 1


async def test_a_key_is_free_again_when_its_file_is_gone(
    client: httpx2.AsyncClient, database: Database
) -> None:
    first = (await keyed(client, b"a\n")).json()["id"]
    await client.delete(f"/v1/files/{first}")
    second = (await keyed(client, b"b\n")).json()["id"]
    assert second != first
    assert (await keyed(client, b"b\n")).json()["id"] == second
    await client.delete(f"/v1/files/{second}")
    database.write_now(idempotency.forget_free)
    assert makers.rows(database, "files") == makers.rows(database, "used_keys") == []


@pytest.mark.parametrize("seconds", ["²", "9" * 5_000, "3600.5", "-3600"])
async def test_a_life_that_is_no_number_of_seconds_is_refused(
    client: httpx2.AsyncClient, seconds: str
) -> None:
    answer = await upload(client, b"a", **{"expires_after[seconds]": seconds})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after.seconds")


async def test_a_form_with_two_files_or_too_many_fields_is_refused(
    client: httpx2.AsyncClient, database: Database
) -> None:
    two = [("file", ("a", b"one")), ("file", ("b", b"two"))]
    refused = await client.post("/v1/files", data={"purpose": "batch"}, files=two)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file")
    many = {f"f{number}": "x" for number in range(60)}
    assert (await upload(client, b"a", **many)).status_code == 413
    assert makers.rows(database, "files") == []
