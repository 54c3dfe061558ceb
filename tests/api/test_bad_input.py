"""What is wrong is refused by name, in one form, and leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backchannel.db import Database
from backchannel.settings import Settings
from tests import makers
from tests.api.play import serving

JSON = {"Content-Type": "application/json"}


def body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "Hello?", "model": "echo"} | fields).encode()


def chat(*messages: Any) -> bytes:
    return json.dumps({"model": "echo", "messages": messages}).encode()


def parameters(text: str) -> bytes:
    return b'{"prompt": "x", "model": "echo", "parameters": %s}' % text.encode()


USER = {"role": "user", "content": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

REFUSED: dict[str, tuple[bytes, str, str | None]] = {
    # not JSON
    "nothing": (b"", "invalid_request", None),
    "half": (b'{"prompt": "x', "invalid_json", None),
    "more than one": (body() + b"{}", "invalid_json", None),
    "comma": (b'{"prompt": "x",}', "invalid_json", None),
    "a list": (b"[]", "invalid_request", None),
    "a word": (b'"x"', "invalid_request", None),
    "null": (b"null", "invalid_request", None),
    "latin-1": (b'{"prompt": "\xe4"}', "invalid_json", None),
    "encoded surrogate": (b'{"prompt": "\xed\xa0\x80"}', "invalid_json", None),
    "byte order mark": (b"\xef\xbb\xbf" + body(), "invalid_json", None),
    "utf-16": (body().decode().encode("utf-16"), "invalid_json", None),
    "a key twice": (b'{"prompt": "x", "prompt": "y"}', "invalid_json", "prompt"),
    "a raw newline": (b'{"prompt": "\n"}', "invalid_json", None),
    "deep": (parameters('{"extra_body": ' + '{"a":' * 200 + "1" + "}" * 201), "invalid_json", ...),
    "deeper": (b"[" * 100_000, "invalid_json", None),
    # numbers that are none
    "nan": (parameters('{"temperature": NaN}'), "invalid_json", "parameters.temperature"),
    "infinity": (parameters('{"extra_body": {"a": [1, -Infinity]}}'), "invalid_json",
                 "parameters.extra_body.a[1]"),
    "1e999": (parameters('{"temperature": 1e999}'), "invalid_json", "parameters.temperature"),
    "beyond 64 bits too": (parameters('{"temperature": 1e30}'), "invalid_request",
                           "parameters.temperature"),
    "beyond 64 bits": (parameters('{"seed": 18446744073709551616}'), "invalid_request",
                       "parameters.seed"),
    "5000 digits": (parameters('{"seed": %s}' % ("1" * 5000)), "invalid_json", None),
    # text that is none
    "nul": (body(prompt="a\0b"), "invalid_request", "prompt"),
    "nul in a key": (body(metadata={"a\0": "b"}), "invalid_request", "metadata"),
    "nul deep": (chat(USER, USER | {"content": [{"type": "text", "text": "\0"}]}),
                 "invalid_request", "messages[1].content[0].text"),
    "nul in parameters": (parameters('{"stop": ["a", "\\u0000"]}'), "invalid_request",
                          "parameters.stop[1]"),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "invalid_request", "prompt"),
    "pair the wrong way": (body(metadata={"a": "\udc00\ud800"}), "invalid_request", "metadata.a"),
    # fields
    "unknown field": (body(promt="x"), "invalid_request", "promt"),
    "unknown field of a message": (chat(USER | {"foo": 1}), "invalid_request", "messages[0].foo"),
    "neither prompt nor messages": (b'{"model": "echo"}', "invalid_request", "prompt"),
    "both": (body(messages=[USER]), "invalid_request", "prompt"),
    "empty prompt": (body(prompt=""), "invalid_request", "prompt"),
    "prompt a number": (body(prompt=5), "invalid_request", "prompt"),
    "no messages": (chat(), "invalid_request", "messages"),
    "messages an object": (body(prompt=None, messages={}), "invalid_request", "messages"),
    "role": (chat({"role": "robot", "content": "x"}), "invalid_request", "messages[0].role"),
    "no role": (chat({"content": "x"}), "invalid_request", "messages[0].role"),
    "no content": (chat(USER, {"role": "user"}), "invalid_request", "messages[1].content"),
    "content a number": (chat({"role": "user", "content": 5}), "invalid_request",
                         "messages[0].content"),
    "a part without type": (chat({"role": "user", "content": [{"text": "x"}]}), "invalid_request",
                            "messages[0].content[0].type"),
    "tool without id": (chat({"role": "tool", "content": "x"}), "invalid_request",
                        "messages[0].tool_call_id"),
    "calls by the user": (chat(USER | {"tool_calls": [CALL]}), "invalid_request",
                          "messages[0].tool_calls"),
    "call without function": (chat({"role": "assistant", "tool_calls": [{"id": "c"}]}),
                              "invalid_request", "messages[0].tool_calls[0].function"),
    "stream a word": (body(stream="yes"), "invalid_request", "stream"),
    "lane": (body(lane="fast"), "invalid_request", "lane"),
    "deadline 0": (body(deadline_s=0), "invalid_request", "deadline_s"),
    "deadline true": (body(deadline_s=True), "invalid_request", "deadline_s"),
    "deadline too far": (body(deadline_s=86_401), "invalid_request", "deadline_s"),
    # caps
    "17 pairs": (body(metadata={str(n): "" for n in range(17)}), "invalid_request", "metadata"),
    "long key": (body(metadata={"k" * 65: ""}), "invalid_request", ...),
    "long value": (body(metadata={"k": "v" * 513}), "invalid_request", "metadata.k"),
    "value a number": (body(metadata={"k": 1}), "invalid_request", "metadata.k"),
    "long model": (body(model="m" * 257), "invalid_request", "model"),
    # models and parameters
    "unknown provider": (body(model="nobody:x"), "provider_not_found", "model"),
    "no key": (body(model="openai:gpt-5"), "provider_key_missing", "model"),
    "no key at all": (body(model="fast"), "provider_key_missing", "model"),
    "empty model": (body(model=""), "invalid_request", "model"),
    "unknown parameter": (body(parameters={"max_token": 1}), "unsupported_parameter",
                          "parameters.max_token"),
    "parameter of another type": (body(parameters={"max_tokens": "5"}), "invalid_request",
                                  "parameters.max_tokens"),
    "ours": (body(parameters={"stream": True}), "invalid_request", "parameters.stream"),
    "parameters a list": (body(parameters=[]), "invalid_request", "parameters"),
    "not for this provider": (body(model="ollama:x", parameters={"thinking": {}}),
                              "unsupported_parameter", "parameters.thinking"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
async def test_a_bad_body_is_refused_by_name_and_leaves_no_trace(
    client: httpx2.AsyncClient, database: Database, fault: str
) -> None:
    content, code, param = REFUSED[fault]
    answer = await client.post("/v1/jobs", content=content, headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    if param is not ...:
        assert error["param"] == param
    assert error["message"].endswith(".")
    if error["param"] and not code.startswith("provider_"):
        assert error["param"].rpartition(".")[2].split("[")[0] in error["message"]
    assert makers.rows(database, "jobs") == []


async def test_what_is_only_unusual_is_taken(client: httpx2.AsyncClient) -> None:
    for content in (
        body(prompt="\U0001f600\u2028 \x7f", system="s", metadata={"ключ": "värde"}),
        body(parameters=None, metadata=None, deadline_s=None, session=None),
        body(deadline_s=5),
        b" \n" + body() + b"\n",
        b'{"prompt": "\\ud83d\\ude00", "model": "echo"}',
        chat({"role": "assistant", "content": None, "tool_calls": [CALL]}, USER),
        parameters('{"seed": 18446744073709551615, "temperature": 1e-400}'),
    ):
        answer = await client.post("/v1/jobs", content=content, headers=JSON)
        assert answer.status_code == 202, answer.text


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=101", "limit"),
        ("?limit=x", "limit"),
        ("?state=done", "state"),
        ("?stat=queued", "stat"),
        ("?order=up", "order"),
        ("?created_after=2026-01-01T00:00:00", "created_after"),
        ("/x?wait=61", "wait"),
        ("/x?wait=nan", "wait"),
        ("/x/events?after=x", "after"),
        ("?after=%00", None),
        ("/%00", None),
    ],
)
async def test_a_bad_address_is_refused_by_name(
    client: httpx2.AsyncClient, path: str, param: str | None
) -> None:
    answer = await client.get(f"/v1/jobs{path}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("key", ["", "k" * 256, "tab\there", "schlüssel".encode()])
async def test_a_bad_idempotency_key_is_refused(
    client: httpx2.AsyncClient, key: str | bytes
) -> None:
    headers = {"Idempotency-Key": key, **JSON}
    answer = await client.post("/v1/jobs", content=body(), headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"


async def test_a_bad_last_event_id_is_refused(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/jobs/x/events", headers={"Last-Event-ID": "x"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "headers",
    [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}],
)
async def test_a_body_that_a_foreign_web_page_could_send_is_refused(
    client: httpx2.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await client.post("/v1/jobs", content=body(), headers=headers)
    assert answer.status_code == 400
    assert "Content-Type" in answer.json()["error"]["message"]


async def test_unknown_paths_and_methods_have_the_one_form_too(
    client: httpx2.AsyncClient,
) -> None:
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("DELETE", "/v1/jobs", 405, "method_not_allowed"),
        ("GET", "/v1/jobs/x/cancel", 405, "method_not_allowed"),
    ):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    for path, takes in (("/v1/jobs", "GET, POST"), ("/v1/files/x", "DELETE, GET")):
        assert (await client.put(path)).headers["allow"] == takes


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("messages", {"system": [{}]}, "system"),
        ("messages", {"system": [{"type": "text", "text": {}}]}, "system"),
        ("messages", {"tool_choice": {"type": []}}, "tool_choice"),
        ("messages", {"tool_choice": {"type": "tool"}}, "tool_choice"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
         "input[0]"),
        ("responses", {"input": [{"type": "function_call", "call_id": "c", "name": "f",
                                  "arguments": {}}]}, "input[0]"),
    ],
)  # fmt: skip
async def test_a_block_of_the_wrong_kind_is_named_and_never_a_500(
    client: httpx2.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    usual: dict[str, Any] = {"model": "echo"}
    if path == "messages":
        usual |= {"max_tokens": 5, "messages": [{"role": "user", "content": "Hello?"}]}
    answer = await client.post(f"/v1/{path}", json=usual | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_body_over_the_cap_is_refused_before_it_is_read(
    sqlite_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = Settings(
        home=tmp_path, database_url=sqlite_url, redis_url=redis_url, max_body_bytes=1000
    )

    async def pieces() -> Any:
        for _ in range(50):
            yield b" " * 100

    async with serving(settings) as url, httpx2.AsyncClient(base_url=url) as client:
        for content in (body(prompt="x" * 1000), pieces()):
            answer = await client.post("/v1/jobs", content=content, headers=JSON)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "too_large"
        exactly = body(prompt="x" * (1000 - len(body()) + len("Hello?")))
        assert len(exactly) == 1000
        answer = await client.post("/v1/jobs", content=exactly, headers=JSON)
        assert answer.status_code == 202


async def test_what_nobody_foresaw_is_a_500_without_internals(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret of the house")

    monkeypatch.setattr("api.jobs.job_of", fail)
    answer = await client.post("/v1/jobs", content=body(), headers=JSON)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
