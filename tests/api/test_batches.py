"""Batches over HTTP: what is refused, what is promised, what it would cost."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import httpx2
import pytest

from api.estimate import Seen
from backchannel import batches
from backchannel.batch_input import RESPONSES, Head, ask, refusal
from backchannel.db import Database
from backchannel.errors import InvalidRequest
from backchannel.registry import get_registry
from tests.api.test_files import upload
from tests.backchannel import batching
from tests.backchannel.batching import CHAT, line


async def create(client: httpx2.AsyncClient, file_id: str, **changes: Any) -> httpx2.Response:
    headers = {"Idempotency-Key": changes.pop("key")} if "key" in changes else {}
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **changes}
    return await client.post("/v1/batches", json=body, headers=headers)


async def uploaded(client: httpx2.AsyncClient, *lines: bytes) -> str:
    file_id: str = (await upload(client, b"\n".join(lines))).json()["id"]
    return file_id


def work(database: Database, batch_id: str, *states: str) -> None:
    """What the workers would do."""
    while (batch := batching.row(database, batch_id)).status == "validating":
        batching.validate_once(database, batch)
    while (batch := batching.row(database, batch_id)).planned < batch.total:
        if not batching.plan_once(database, batch):
            return  # it failed
    for job, state in zip(batching.jobs_of(database, batch_id), states, strict=False):
        batching.finish(database, job.id, state)


async def test_a_batch_is_created_read_and_listed(client: httpx2.AsyncClient) -> None:
    file_id = await uploaded(client, line("a"))
    made = await create(client, file_id, metadata={"k": "v"}, completion_window="90m")
    assert made.status_code == 200, made.text
    batch = made.json()
    assert batch["status"] == "validating"
    assert batch["expires_at"] - batch["created_at"] == 5_400
    assert batch["metadata"] == {"k": "v"}
    assert (await client.get(f"/v1/batches/{batch['id']}")).json() == batch
    others = [(await create(client, file_id)).json()["id"] for _ in range(2)]
    page = (await client.get("/v1/batches", params={"limit": 2})).json()
    assert [each["id"] for each in page["data"]] == others[::-1]
    assert page["has_more"]
    rest = (await client.get("/v1/batches", params={"after": page["last_id"]})).json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([batch["id"]], False)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"metadata": {"k": 7}}, "metadata.k"),
        ({"model": "echo"}, "model"),
    ],
)
async def test_what_cannot_be_a_batch_is_refused_by_name(
    client: httpx2.AsyncClient, changes: dict[str, Any], param: str
) -> None:
    answer = await create(client, await uploaded(client, line("a")), **changes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_file_for_something_else_or_none_is_no_input(client: httpx2.AsyncClient) -> None:
    file_id = (await upload(client, line("a"), "user_data")).json()["id"]
    for given, status in ((file_id, 409), ("file-none", 404)):
        answer = await create(client, given)
        assert answer.status_code == status
        assert answer.json()["error"]["param"] == "input_file_id"


async def test_the_same_key_is_the_same_batch(
    client: httpx2.AsyncClient, database: Database
) -> None:
    file_id = await uploaded(client, line("a"))
    first = await create(client, file_id, key="k")
    again = await create(client, file_id, key="k")
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replay"] == "true"
    assert (await create(client, file_id, key="k", metadata={})).status_code == 409
    work(database, first.json()["id"], "failed")
    database.write_now(lambda c: batches.cancel(c, first.json()["id"], "local"))
    batching.end(database, first.json()["id"], "cancelled")
    path, key = f"/v1/batches/{first.json()['id']}/retry", {"Idempotency-Key": "r"}
    child = (await client.post(path, headers=key)).json()["id"]
    database.write_now(lambda c: batches.cancel(c, child, "local"))
    batching.end(database, child, "cancelled")
    # the first answer is given again though nobody could make it any more
    assert (await client.delete(f"/v1/files/{file_id}")).status_code == 200
    assert (await create(client, file_id, key="k")).json()["id"] == first.json()["id"]
    assert (await client.post(path, headers=key)).json()["id"] == child
    assert (await create(client, file_id, key="other")).status_code == 404
    assert len((await client.get("/v1/batches")).json()["data"]) == 2
    never = await client.post(f"/v1/batches/{child}/retry")
    assert "begin again" in never.json()["error"]["message"]


async def test_faults_are_told_with_their_lines(
    client: httpx2.AsyncClient, database: Database
) -> None:
    batch_id = (await create(client, await uploaded(client, *[b"{"] * 120))).json()["id"]
    work(database, batch_id)
    batch = (await client.get(f"/v1/batches/{batch_id}")).json()
    assert batch["status"] == "failed"
    assert [each["line"] for each in batch["errors"]["data"]] == [*range(1, 101), None]
    assert batch["errors"]["data"][-1]["message"] == "20 more lines are not right."
    assert (batch["output_file_id"], batch["error_file_id"]) == (None, None)
    refused = await client.post(f"/v1/batches/{batch_id}/retry")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "nothing_to_retry")


async def test_results_are_read_while_it_runs_and_gone_on_from(
    client: httpx2.AsyncClient, database: Database
) -> None:
    batch_id = (await create(client, await uploaded(client, *map(line, "abc")))).json()["id"]
    work(database, batch_id, "succeeded", "failed")
    batch = (await client.get(f"/v1/batches/{batch_id}")).json()
    assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 1}
    assert batch["usage"]["total_tokens"] == 30
    content = f"/v1/files/{batch['output_file_id']}/content"
    (record,) = map(json.loads, (await client.get(content)).text.splitlines())
    assert (record["custom_id"], "seq" in record) == ("a", False)
    (record,) = map(json.loads, (await client.get(content, params={"after": 0})).text.splitlines())
    assert (await client.get(content, params={"after": record["seq"]})).text == ""
    for path in (batch["input_file_id"], batch["output_file_id"]):
        assert (await client.delete(f"/v1/files/{path}")).json()["error"]["code"] == "file_in_use"
    early = await client.post(f"/v1/batches/{batch_id}/retry")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_finished")

    cancelled = (await client.post(f"/v1/batches/{batch_id}/cancel")).json()
    assert (cancelled["status"], cancelled["cancelling_at"] is not None) == ("cancelling", True)
    assert (await client.post("/v1/batches/batch_none/cancel")).status_code == 404


async def test_an_end_without_errors_names_no_error_file(
    client: httpx2.AsyncClient, database: Database
) -> None:
    batch_id = (await create(client, await uploaded(client, line("a")))).json()["id"]
    work(database, batch_id, "succeeded")
    database.write_now(lambda c: batches.finalize(c, batch_id))
    batching.end(database, batch_id)
    batch = (await client.get(f"/v1/batches/{batch_id}")).json()
    assert batch["error_file_id"] is None
    size = (await client.get(f"/v1/files/{batch['output_file_id']}")).json()["bytes"]
    assert size == 1  # as the test said it is
    assert (await client.post(f"/v1/batches/{batch_id}/retry")).status_code == 409


async def test_a_dry_run_says_what_it_would_cost_and_runs_nothing(
    client: httpx2.AsyncClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 100}
    lines = [
        line("a", body=body | {"model": "echo"}),
        line("b", body=body | {"model": "ollama:llama3.2"}),
        line("c", body=body | {"model": "nobody:x"}),
    ]
    file_id = await uploaded(client, *lines)
    batch = (await create(client, file_id, x_backchannel={"dry_run": True})).json()
    found = batch["x_backchannel"]["estimate"]
    assert (found["lines"], found["lines_that_would_fail"]) == (3, 1)
    assert found["models"]["echo:echo-1"] == {
        "lines": 1,
        "input_tokens": 104,
        "output_tokens": {"low": 50, "high": 100},
        "cost_usd": {"low": 0, "high": 0},
    }
    assert found["cost_usd"] == {"low": 0, "high": 0}
    assert "characters" in found["method"]
    assert (await client.get("/v1/batches")).json()["data"] == []
    bad = await create(client, await uploaded(client, b"{"), x_backchannel={"dry_run": True})
    assert (bad.json()["status"], bad.json()["errors"]["data"][0]["line"]) == ("failed", 1)


async def test_a_dry_run_finds_what_a_batch_would_fail_for(
    client: httpx2.AsyncClient, database: Database
) -> None:
    long = {"model": "echo", "messages": [{"role": "user", "content": "x" * 400_000}]}
    lines = [line("a", body=long), line("b", body=long), line("a", body=long), b"{", line("b")]
    for content in (lines, [b""]):
        file_id = await uploaded(client, *content)
        dry = (await create(client, file_id, x_backchannel={"dry_run": True})).json()
        made = (await create(client, file_id)).json()["id"]
        work(database, made)
        batch = (await client.get(f"/v1/batches/{made}")).json()
        assert (dry["status"], dry["errors"]) == (batch["status"], batch["errors"])
        assert dry["request_counts"]["total"] == batch["request_counts"]["total"]


def test_a_million_ids_are_remembered_on_disk() -> None:
    with closing(Seen()) as seen:
        for start in range(0, 200_000, 1_000):
            heads = [Head(n, f"request-{n:030}") for n in range(start, start + 1_000)]
            assert seen.add(heads) == []
        assert [
            fault.line for fault in seen.add([Head(7, "new"), Head(8, f"request-{9:030}")])
        ] == [8]
        (memory,) = seen._ids.execute("PRAGMA cache_size").fetchone()
        assert memory == -2_000, "KiB; the rest of 10 MB is on disk"


async def test_a_line_is_fetched_by_the_id_in_the_output(
    client: httpx2.AsyncClient, database: Database
) -> None:
    chats = await uploaded(client, *map(line, "abc"))
    body = {"model": "echo", "input": "Hi"}
    responses = await uploaded(client, *(line(n, url=RESPONSES, body=body) for n in "abc"))
    for endpoint, file_id in ((CHAT, chats), (RESPONSES, responses)):
        batch_id = (await create(client, file_id, endpoint=endpoint)).json()["id"]
        work(database, batch_id, "succeeded", "failed", "cancelled")
        output_id = (await client.get(f"/v1/batches/{batch_id}")).json()["output_file_id"]
        shown = (await client.get(f"/v1/files/{output_id}/content")).json()["response"]["body"]
        path = f"{endpoint}/{shown['id']}"
        assert (await client.get(path)).json() == shown
        assert (await client.delete(path)).status_code == 404
        other = RESPONSES if endpoint == CHAT else CHAT
        prefix = {CHAT: "chatcmpl-", RESPONSES: "resp_"}
        digits = shown["id"].removeprefix(prefix[endpoint])
        assert (await client.get(f"{other}/{prefix[other]}{digits}")).status_code == 404
        listed = (await client.get(CHAT)).json()["data"]
        assert listed == [], "a batch's lines are not among what was stored"
        _, failed, cancelled = (
            prefix[endpoint] + job.id.removeprefix("job_")
            for job in batching.jobs_of(database, batch_id)
        )
        ends = [await client.get(f"{endpoint}/{each}") for each in (failed, cancelled)]
        if endpoint == CHAT:
            assert [end.status_code for end in ends] == [502, 409]
            said = (await client.get(f"{path}/messages")).json()["data"]
            assert [message["content"] for message in said] == ["Say a."]
        else:
            assert [end.json()["status"] for end in ends] == ["failed", "cancelled"]
            refused = await client.get(f"{path}?stream=true")
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_streamed")
            assert (await client.get(f"{path}/input_items")).status_code == 404


SAY = [{"role": "user", "content": "Hi"}]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "usr", "content": "a"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "a", "more": 1}]}),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}),
    (CHAT, {"messages": SAY, "metadata": {"k": 7}}),
    (CHAT, {"messages": SAY, "no_such": 1}),
    (CHAT, {"messages": SAY, "model": "nobody:x"}),
    (CHAT, {"messages": SAY, "temperature": "hot"}),
    (RESPONSES, {}),
    (RESPONSES, {"input": 7}),
    (RESPONSES, {"input": []}),
    (RESPONSES, {"input": "a", "no_such": 1}),
    (RESPONSES, {"input": "a", "model": "anthropic:ok", "top_logprobs": 3}),
    (RESPONSES, {"input": "a", "model": "anthropic:ok", "service_tier": "flex"}),
    (RESPONSES, {"input": "a", "text": {"format": {"type": "xml"}}}),
    (RESPONSES, {"input": "a", "tool_choice": {"type": "mcp"}}),
    (RESPONSES, {"input": [{"type": "message", "role": "user"}]}),
]


async def test_a_line_is_refused_as_its_body_would_be(client: httpx2.AsyncClient) -> None:
    for endpoint, asked in REFUSED:
        body = {"model": "echo"} | asked
        posted = await client.post(endpoint, json=body)
        assert posted.status_code == 400, posted.text
        with pytest.raises(InvalidRequest) as refused:
            ask(endpoint, line("a", body=body), get_registry())
        assert refusal(refused.value) == posted.json()
