"""Callers' keys: made once, kept as a hash, good until they are revoked or expire."""

from __future__ import annotations

import re

import pytest

from backchannel import keys
from backchannel.db import Database
from backchannel.errors import ModelNotAllowed
from backchannel.keys import Caller, NewKey
from backchannel.tables import caller_keys
from tests import makers


def made(database: Database, name: str = "alice", **wishes: object) -> tuple[str, str]:
    return database.write_now(lambda c: keys.add(c, NewKey(name, **wishes)))  # type: ignore[arg-type]


def found(database: Database, key: str) -> keys.Known | None:
    return database.read_now(lambda c: keys.find(c, keys.hash_of(key.encode())))


def test_a_key_is_256_random_bits_and_is_not_kept(database: Database) -> None:
    key_id, key = made(database)
    assert re.fullmatch(r"bk_[A-Za-z0-9_-]{43}", key)
    assert key_id.startswith("caller_")
    assert made(database)[1] != key
    assert key not in repr(makers.everything(database))
    assert key[9:] not in repr(makers.everything(database))


def test_it_is_found_with_all_that_it_is_good_for(database: Database) -> None:
    key_id, key = made(database, models=["groq:*"], scopes=["batches"], expires_in_s=60)
    known = found(database, key)
    assert known is not None
    assert (known.id, known.caller, known.scopes) == (key_id, "alice", {"batches"})
    assert known.caller.models == ("groq:*",)
    assert known.left_ms is not None
    assert 0 < known.left_ms <= 60_000
    assert found(database, key[:-1]) is None
    assert found(database, "") is None


def test_an_admin_may_do_everything(database: Database) -> None:
    known = found(database, made(database, scopes=["admin"])[1])
    assert known is not None
    assert known.scopes == set(keys.SCOPES)


def test_a_revoked_or_expired_key_is_not_found_and_closes_nothing_again(database: Database) -> None:
    assert not database.read_now(keys.any_made)
    (first, key), (second, other) = made(database), made(database)
    third, expired = made(database, "bob", expires_in_s=60)
    assert database.write_now(lambda c: keys.revoke(c, first)) == [first]
    assert found(database, key) is None
    assert found(database, other) is not None
    assert database.write_now(lambda c: keys.revoke(c, "alice")) == [second]
    assert database.write_now(lambda c: keys.revoke(c, "alice")) == []
    ago = makers.ago(database, 1)
    database.write_now(lambda c: c.execute(caller_keys.update().values(expires_ms=ago)))
    assert found(database, expired) is None
    assert not database.read_now(keys.any_active)
    assert database.read_now(keys.any_made)
    assert database.write_now(lambda c: keys.revoke(c, third)) == []
    listed = database.read_now(keys.listed)
    assert {row.id for row in listed} == {first, second, third}
    assert not any(row.active for row in listed)


def test_a_use_is_put_on_record(database: Database) -> None:
    key_id, key = made(database)
    known = found(database, key)
    assert known is not None
    assert known.unused_ms is None
    database.write_now(lambda c: keys.touch(c, key_id))
    known = found(database, key)
    assert known is not None
    assert known.unused_ms is not None
    assert 0 <= known.unused_ms < 10_000


@pytest.mark.parametrize(
    ("models", "name", "may"),
    [
        (None, "groq:x", True),
        ((), "groq:x", False),
        (("groq:*",), "groq:llama", True),
        (("groq:*",), "openai:groq:llama", False),
        (("openai:gpt-5-*", "echo:?"), "echo:1", True),
        (("openai:gpt-5-*",), "OpenAI:gpt-5-mini", False),
    ],
)
def test_a_caller_may_name_the_models_of_their_patterns(
    models: tuple[str, ...] | None, name: str, may: bool
) -> None:
    caller = Caller("alice", models)
    assert caller == "alice"
    assert caller.may_name(name) is may
    if not may:
        with pytest.raises(ModelNotAllowed) as refused:
            caller.check_model(name)
        assert (refused.value.status, refused.value.param) == (403, "model")
