"""Accept: a job and all that belongs to it, once per idempotency key, or nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backchannel.accept import accept
from backchannel.books import Doorbell
from backchannel.choice import choose
from backchannel.db import Database
from backchannel.errors import CapabilityMissing, Conflict, NotFound
from backchannel.provider_input import MODEST
from backchannel.registry import Registry, built_in
from backchannel.settings import Settings
from backchannel.tables import BATCH, QUEUED
from tests.makers import (
    accepted,
    claimed,
    everything,
    finished,
    new_job,
    queued,
    row,
    rows,
    session,
)


def test_an_accepted_job_is_queued_due_and_rung(database: Database) -> None:
    new = accepted(database, meta={"order": "7"}, parent_id="job_before", stream=False)
    assert new.created
    assert new.doorbell == Doorbell(new.job_id, "interactive", "echo:echo-1", 1)
    job = row(database, new.job_id)
    assert (job.state, job.attempt, job.crashes, job.retries, job.rank) == (QUEUED, 0, 0, 0, 1)
    assert (job.caller, job.provider, job.model, job.model_reason) == (
        "alice", "echo", "echo-1", "test",
    )  # fmt: skip
    assert (job.meta, job.parent_id, job.stream) == ({"order": "7"}, "job_before", False)
    assert job.run_ms == pytest.approx(job.created_ms, abs=1000)
    assert job.rung_ms == pytest.approx(job.created_ms, abs=1000)
    assert job.deadline_ms - job.created_ms == pytest.approx(3_600_000, abs=1000)
    claim = claimed(database, new.job_id)
    assert claim.messages == [{"role": "user", "content": "Hello?"}]
    assert claim.parameters == {"max_tokens": 5}


def test_a_batch_line_waits_for_the_dispatcher(database: Database) -> None:
    new = accepted(database, lane=BATCH)
    assert new.doorbell is None
    assert row(database, new.job_id).rung_ms is None


def test_text_comes_back_as_it_was_written(database: Database) -> None:
    said = "naïve 漢字 🎉 \u2028 \\ \" ' ; DROP TABLE jobs; --"
    job_id = queued(database, messages=[{"role": "user", "content": said}])
    assert claimed(database, job_id).messages == [{"role": "user", "content": said}]


# ---------------------------------------------------------------- idempotency


def test_the_same_key_and_body_is_the_same_job(database: Database) -> None:
    first = accepted(database, idempotency_key="k")
    before = everything(database)
    again = accepted(database, idempotency_key="k")
    assert (again.job_id, again.created, again.doorbell) == (first.job_id, False, None)
    assert everything(database) == before


def test_the_same_key_with_another_body_is_a_conflict(database: Database) -> None:
    accepted(database, idempotency_key="k")
    before = everything(database)
    with pytest.raises(Conflict, match="Use a new key") as error:
        accepted(database, idempotency_key="k", request_hash="another")
    assert (error.value.status, error.value.code) == (409, "idempotency_mismatch")
    assert everything(database) == before


def test_a_key_belongs_to_its_caller(database: Database) -> None:
    assert accepted(database, idempotency_key="k").created
    assert accepted(database, idempotency_key="k", caller="bob", request_hash="another").created


def test_jobs_without_a_key_are_all_different(database: Database) -> None:
    assert len({queued(database) for _ in range(5)}) == 5


def test_a_finished_job_still_answers_for_its_key(database: Database) -> None:
    job_id = finished(database, idempotency_key="k")
    assert accepted(database, idempotency_key="k").job_id == job_id


def test_fifty_at_once_with_one_key_are_one_job(database_url: str) -> None:
    processes = [Database(database_url, name=f"api-{number}") for number in range(5)]
    new = new_job(idempotency_key="k")
    answers = [each.submit(lambda c: accept(c, new)) for each in processes for _ in range(10)]
    results = [each.result(60) for each in answers]
    assert len({each.job_id for each in results}) == 1
    assert sum(each.created for each in results) == 1
    assert len(rows(processes[0], "jobs")) == len(rows(processes[0], "job_requests")) == 1
    for each in processes:
        each.close()


def test_a_conflict_does_not_fail_its_neighbours_in_the_group(database: Database) -> None:
    accepted(database, idempotency_key="k")
    bodies = ["another", "hash of Hello?"] * 10
    futures = [
        database.submit(
            lambda c, body=body: accept(c, new_job(idempotency_key="k", request_hash=body))
        )
        for body in bodies
    ]
    failed = [isinstance(each.exception(30), Conflict) for each in futures]
    assert failed == [body == "another" for body in bodies]


# ---------------------------------------------------------------- sessions


def test_a_sessions_job_takes_its_place_and_its_turns(database: Database) -> None:
    session(database)
    two = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    first = accepted(database, session_id="sess_1", messages=two)
    second = accepted(database, session_id="sess_1")
    assert first.doorbell == Doorbell(first.job_id, "interactive", "echo:echo-1", 1)
    assert second.doorbell is None  # it is rung when the first has finished
    assert row(database, first.job_id).session_seq == 1
    assert row(database, second.job_id).session_seq == 4  # 3 is the first answer's place
    turns = sorted(rows(database, "turns"), key=lambda turn: turn["seq"])
    assert [(turn["seq"], turn["job_id"]) for turn in turns] == [
        (1, first.job_id),
        (2, first.job_id),
        (4, second.job_id),
    ]
    assert rows(database, "sessions")[0]["last_seq"] == 5


def test_a_batch_turn_is_not_rung_at_accept(database: Database) -> None:
    session(database)
    assert accepted(database, session_id="sess_1", lane="batch").doorbell is None


def test_a_named_model_switches_its_session_and_counts_the_switch(database: Database) -> None:
    session(database)
    other = {"provider": "groq", "model": "llama", "requested_model": "groq:llama"}
    job_id = queued(database, session_id="sess_1", **other)
    assert (row(database, job_id).provider, row(database, job_id).model) == ("groq", "llama")
    (now,) = rows(database, "sessions")
    assert (now["provider"], now["model"], now["model_version"]) == ("groq", "llama", 2)
    queued(database, session_id="sess_1", **other)
    assert rows(database, "sessions")[0]["model_version"] == 2


def test_the_same_model_of_another_provider_is_a_switch(database: Database) -> None:
    session(database)
    queued(database, session_id="sess_1", provider="ollama", requested_model="ollama:echo-1")
    (now,) = rows(database, "sessions")
    assert (now["provider"], now["model"], now["model_version"]) == ("ollama", "echo-1", 2)


def test_a_job_that_names_no_model_takes_its_sessions(database: Database) -> None:
    session(database)
    job_id = queued(database, session_id="sess_1", provider="anthropic", model="the default")
    assert (row(database, job_id).provider, row(database, job_id).model) == ("echo", "echo-1")
    (now,) = rows(database, "sessions")
    assert (now["provider"], now["model"], now["model_version"]) == ("echo", "echo-1", 1)


def refit(registry: Registry, messages: list[dict[str, Any]]) -> Any:
    return lambda name: choose(registry, name, messages, {"max_tokens": 5})


def test_a_session_s_turn_is_checked_for_the_model_that_it_gets(database: Database) -> None:
    blind = replace(built_in(Settings())[-1], id="blind", capabilities=MODEST)
    registry = Registry([*built_in(Settings()), blind], Settings())
    session(database)
    database.write_now(
        lambda c: c.exec_driver_sql("UPDATE sessions SET provider = 'blind', model = 'm'")
    )
    picture = [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]
    messages = [{"role": "user", "content": picture}]
    before = everything(database)
    with pytest.raises(CapabilityMissing, match="blind:m is not known to take images"):
        accepted(database, session_id="sess_1", messages=messages, refit=refit(registry, messages))
    assert everything(database) == before
    plain = refit(registry, [{"role": "user", "content": "Hello?"}])
    job_id = queued(database, session_id="sess_1", refit=plain, fallbacks=["echo:other"])
    job = row(database, job_id)
    # nor does it fall back to what was chosen for the other model
    assert (job.provider, job.model, job.fallbacks) == ("blind", "m", None)
    assert claimed(database, job_id).parameters == {"max_tokens": 5}


@pytest.mark.parametrize("caller", ["alice", "mallory"])
def test_an_unknown_session_leaves_nothing_behind(caller: str, database: Database) -> None:
    session(database, "sess_1", caller="alice")
    before = everything(database)
    wanted = "sess_2" if caller == "alice" else "sess_1"
    with pytest.raises(NotFound, match=f"There is no session '{wanted}'"):
        accepted(database, caller=caller, session_id=wanted, idempotency_key="k")
    assert everything(database) == before


def test_turns_accepted_at_once_have_places_of_their_own(database_url: str) -> None:
    processes = [Database(database_url, name=f"api-{number}") for number in range(3)]
    session(processes[0])
    new = new_job(session_id="sess_1")
    for each in [p.submit(lambda c: accept(c, new)) for p in processes for _ in range(10)]:
        each.result(60)
    places = sorted(turn["seq"] for turn in rows(processes[0], "turns"))
    assert places == list(range(1, 60, 2))
    for each in processes:
        each.close()
