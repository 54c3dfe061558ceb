"""A message while a turn is unfinished: it waits, is refused, or interrupts; on both databases."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx2
import pytest

from backchannel import lifecycle, reaping
from backchannel.db import Database
from backchannel.events import unpack_log
from backchannel.tables import CANCELLED, TERMINAL
from tests import makers
from tests.api.play import Play
from tests.api.test_sessions import begin, turn

SENDS = 100
MODELS = ("echo:one", "echo:two", "echo:three", None)


async def messages(client: httpx2.AsyncClient, session: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.get(f"/v1/sessions/{session}")).json()["messages"]
    return found


async def get(client: httpx2.AsyncClient, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = (await client.get(f"/v1/jobs/{job_id}")).json()
    return job


async def test_a_session_that_rejects_names_the_job_it_is_at(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    session = (await begin(client, double_texting="reject"))["id"]
    job = await turn(client, session)
    before = makers.everything(database)
    for state in ("queued", "running"):
        answer = await client.post("/v1/jobs", json={"prompt": "And?", "session": session})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (
            409,
            "session_busy",
            "session",
        )
        assert job["id"] in error["message"]
        assert answer.headers["x-should-retry"] == "false"
        if state == "queued":
            assert makers.everything(database) == before
            attempt = await play.start(job["id"])
    await attempt.finish()
    assert (await turn(client, session))["state"] == "queued"


async def test_the_same_key_again_is_no_second_turn(client: httpx2.AsyncClient) -> None:
    session = (await begin(client, double_texting="reject"))["id"]
    body, headers = {"prompt": "Hello?", "session": session}, {"Idempotency-Key": "k"}
    first = await client.post("/v1/jobs", json=body, headers=headers)
    again = await client.post("/v1/jobs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == first.json()["id"]


async def test_an_interrupted_turn_keeps_what_it_said_and_the_next_one_sees_it(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    session = (await begin(client, double_texting="interrupt", system="Be brief."))["id"]
    first = await turn(client, session, prompt="Tell me of cats.")
    attempt = await play.start(first["id"])
    await attempt.say("Cats ", "are ")
    second = await turn(client, session, prompt="No, dogs.")
    running = await get(client, first["id"])
    assert (running["state"], running["interrupted_by"]) == ("running", second["id"])
    assert running["cancel_requested_at"] is not None
    # it runs after the interrupted one has ended
    assert database.write_now(lambda c: lifecycle.claim(c, second["id"], "w", 20)) is None
    beats = database.write_now(lambda c: lifecycle.heartbeat(c, "worker-1", [first["id"]], 20))
    assert beats[first["id"]].cancelled
    partial = {"role": "assistant", "content": "Cats are ", "tool_calls": [{"id": "half"}]}
    outcome = makers.outcome(CANCELLED, message=partial, error_code=None, error_message=None)
    finished = database.write_now(lambda c: lifecycle.finish(c, attempt.claim, outcome))
    assert finished is not None
    assert finished.next is not None
    assert finished.next.job_id == second["id"]
    last = await play.start(second["id"])
    assert [(m["role"], m["content"]) for m in last.claim.messages] == [
        ("system", "Be brief."),
        ("user", "Tell me of cats."),
        ("assistant", "Cats are "),
        ("user", "No, dogs."),
    ]
    assert all("tool_calls" not in message for message in last.claim.messages)
    await last.finish()
    named = ("seq", "role", "content", "state", "interrupted", "model")
    assert [tuple(m[name] for name in named) for m in await messages(client, session)] == [
        (1, "user", "Tell me of cats.", "cancelled", True, None),
        (2, "assistant", "Cats are ", "cancelled", True, "echo:echo-1"),
        (3, "user", "No, dogs.", "succeeded", False, None),
        (4, "assistant", "Hello.", "succeeded", False, "echo:echo-1"),
    ]


async def test_turns_that_wait_are_interrupted_at_once_and_stay_in_the_conversation(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    session = (await begin(client))["id"]
    waiting = [(await turn(client, session, prompt=f"number {n}"))["id"] for n in range(3)]
    patched = await client.patch(f"/v1/sessions/{session}", json={"double_texting": "interrupt"})
    assert patched.json()["double_texting"] == "interrupt"
    last = await turn(client, session, prompt="Never mind.")
    for job_id in waiting:
        job = await get(client, job_id)
        assert (job["state"], job["interrupted_by"], job["attempt"]) == ("cancelled", last["id"], 0)
    logs = makers.rows(database, "job_results")
    assert [[e.type for e in unpack_log(bytes(row["log"]))] for row in logs] == [["end"]] * 3
    attempt = await play.start(last["id"])
    said = [message["content"] for message in attempt.claim.messages]
    assert said == ["number 0", "number 1", "number 2", "Never mind."]


async def test_a_turn_that_had_just_finished_stays_whole(
    client: httpx2.AsyncClient, play: Play
) -> None:
    session = (await begin(client, double_texting="interrupt"))["id"]
    first = await turn(client, session)
    attempt = await play.start(first["id"])
    second = await turn(client, session, prompt="And?")
    await attempt.finish()  # before the worker has heard of it
    assert (await get(client, first["id"]))["state"] == "succeeded"
    said = await messages(client, session)
    assert [(m["content"], m["interrupted"]) for m in said][:2] == [
        ("Hello?", False),
        ("Hello.", False),
    ]
    third = await play.start(second["id"])
    assert [m["content"] for m in third.claim.messages] == ["Hello?", "Hello.", "And?"]


async def test_a_turn_whose_worker_died_keeps_what_its_readers_saw(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    session = (await begin(client, double_texting="interrupt"))["id"]
    first = await turn(client, session, prompt="Tell me of cats.")
    attempt = await play.start(first["id"])
    await attempt.say("Cats ", "are ")
    database.write_now(
        lambda c: c.exec_driver_sql("UPDATE jobs SET lease_ms = 1 WHERE state = 'running'")
    )
    assert database.write_now(lambda c: reaping.reap(c, first["id"], 1))
    second = await turn(client, session, prompt="No, dogs.")
    async with asyncio.timeout(10):  # nobody but the API is there to end it
        while (await get(client, first["id"]))["state"] != "cancelled":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    following = await play.start(second["id"])
    assert [m["content"] for m in following.claim.messages] == [
        "Tell me of cats.",
        "Cats are ",
        "No, dogs.",
    ]
    assert (await messages(client, session))[1]["interrupted"] is True


async def test_a_turn_its_user_cancelled_is_not_told(
    client: httpx2.AsyncClient, play: Play
) -> None:
    session = (await begin(client, double_texting="interrupt"))["id"]
    first = await turn(client, session)
    await client.post(f"/v1/jobs/{first['id']}/cancel")
    second = await turn(client, session, prompt="And?")
    assert (await get(client, first["id"]))["interrupted_by"] is None
    attempt = await play.start(second["id"])
    assert [m["content"] for m in attempt.claim.messages] == ["And?"]


@pytest.mark.parametrize("value", ["queue", None, 1])
async def test_there_is_no_fourth_way(client: httpx2.AsyncClient, value: Any) -> None:
    answer = await client.post("/v1/sessions", json={"double_texting": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "double_texting")


# ---------------------------------------------------------------- many at once


class Worker:
    """Claims and finishes whatever turn has come, as several worker processes would."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.told: dict[str, list[str]] = {}  # the texts that each claim was told
        self.models: dict[str, str] = {}
        self.done = asyncio.Event()

    async def work(self, name: str) -> None:
        queued = "SELECT id FROM jobs WHERE state = 'queued' AND cancel_ms IS NULL ORDER BY id"
        while True:
            ids = await self.database.read(lambda c: list(c.exec_driver_sql(queued).scalars()))
            if not ids and self.done.is_set():
                return
            for job_id in ids:
                claim = await self.database.write(
                    lambda c, job_id=job_id: lifecycle.claim(c, job_id, name, 20)
                )
                if claim is not None:
                    await self._answer(claim)
            await asyncio.sleep(0.005)

    async def _answer(self, claim: lifecycle.Claim) -> None:
        self.told[claim.job_id] = [message["content"] for message in claim.messages]
        self.models[claim.job_id] = f"{claim.provider}:{claim.model}"
        await asyncio.sleep(random.random() * 0.02)
        beats = await self.database.write(
            lambda c: lifecycle.heartbeat(c, claim.owner, [claim.job_id], 20)
        )
        text = f"answer to {claim.messages[-1]['content']}"
        state = "succeeded"
        if beats[claim.job_id].cancelled and random.random() < 0.8:
            state, text = CANCELLED, text[:6]
        message = {"role": "assistant", "content": text}
        outcome = makers.outcome(state, message=message)
        assert await self.database.write(lambda c: lifecycle.finish(c, claim, outcome))


@pytest.mark.parametrize("policy", ["enqueue", "reject", "interrupt"])
async def test_a_hundred_sends_at_once_with_random_models_are_one_conversation(
    client: httpx2.AsyncClient, database: Database, policy: str
) -> None:
    session = (await begin(client, model="echo:one", double_texting=policy))["id"]
    worker = Worker(database)
    working = [asyncio.create_task(worker.work(f"w{n}")) for n in range(3)]

    async def send(number: int) -> tuple[int, dict[str, Any]]:
        await asyncio.sleep(random.random() * 0.5)
        model = random.choice(MODELS)
        body = {"prompt": f"question {number}", "session": session}
        answer = await client.post("/v1/jobs", json=body | ({"model": model} if model else {}))
        return answer.status_code, answer.json()

    answers = await asyncio.gather(*map(send, range(SENDS)))
    worker.done.set()
    await asyncio.wait_for(asyncio.gather(*working), 60)

    statuses = Counter(status for status, _ in answers)
    accepted = {job["id"]: job for status, job in answers if status == 202}
    if policy == "reject":
        assert statuses.keys() <= {202, 409}
        assert statuses[202] >= 1
    else:
        assert statuses == {202: SENDS}

    jobs = {row["id"]: row for row in makers.rows(database, "jobs")}
    assert jobs.keys() == accepted.keys(), "no turn lost, none doubled"
    assert {row["state"] for row in jobs.values()} <= TERMINAL
    said = await messages(client, session)
    assert len(said) == len({each["seq"] for each in said})
    by_job: dict[str, list[dict[str, Any]]] = {}
    for each in said:
        by_job.setdefault(each["job_id"], []).append(each)
    assert by_job.keys() == accepted.keys()
    # dense: every turn has its two places, taken or not, in the order of accepting
    in_order = sorted(jobs.values(), key=lambda row: row["session_seq"])
    assert [row["session_seq"] for row in in_order] == list(range(1, 2 * len(in_order), 2))
    history: list[str] = []
    model = "echo:one"
    for row in in_order:
        own = by_job[row["id"]]
        question = own[0]["content"]
        assert own[0]["seq"] == row["session_seq"]
        if row["id"] in worker.told:
            assert worker.told[row["id"]] == [*history, question]
        history.append(question)
        if row["state"] == "succeeded":
            assert [m["content"] for m in own] == [question, f"answer to {question}"]
        else:
            assert (row["state"], policy) == ("cancelled", "interrupt")
            assert all(m["interrupted"] for m in own)
            assert [m["content"] for m in own[1:]] in ([], ["answer"])
            assert row["interrupted_by"] in jobs
        history += [m["content"] for m in own[1:]]
        # the model that it was accepted with is the session's of that moment, and it ran on that
        model = row["requested_model"] or model
        assert f"{row['provider']}:{row['model']}" == accepted[row["id"]]["model"] == model
        assert worker.models.get(row["id"], model) == model
    assert (await client.get(f"/v1/sessions/{session}")).json()["model"] == model
