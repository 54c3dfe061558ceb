"""The checks of ``backchannel doctor``, one function each."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2

from backchannel.cli import valkey
from backchannel.cli.client import api_url, goes_direct, key_of
from backchannel.cli.running import is_free
from backchannel.errors import BackchannelError
from backchannel.settings import Settings

OLDEST_PYTHON = (3, 11)
START = "Start everything with: backchannel up"


class Finding(NamedTuple):
    """One check: what was found, and what to type if it is not right."""

    what: str
    ok: bool
    needed: bool
    found: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """All checks, from the ground up."""
    yield _python()
    yield _home(settings)
    yield _redis(settings)
    yield from _database(settings)
    url = api_url(settings)
    state = _ask(settings, url, "/readyz")
    yield _api(url, state)
    yield _workers(state)
    yield from _providers(settings, _ask(settings, url, "/v1/providers"))
    if state is None:
        yield from _ports()


def _python() -> Finding:
    ok = sys.version_info >= OLDEST_PYTHON
    advice = "" if ok else "Install Python 3.11 or newer."
    return Finding("python", ok, True, platform.python_version(), advice)


def _home(settings: Settings) -> Finding:
    home = settings.home_path
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    ok = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    advice = "" if ok else "Set BACKCHANNEL_HOME to a folder you may write to."
    made = "" if there == home else " (made at the first start)"
    return Finding("home", ok, True, f"{home}{made if ok else ' cannot be written'}", advice)


def _redis(settings: Settings) -> Finding:
    path = valkey.socket_of(settings)
    try:
        if path is not None and not valkey.is_served(path):
            found = f"embedded Valkey, not running ({valkey.binary()})"
            return Finding("redis", True, True, found, START)
        return Finding("redis", True, True, valkey.check_redis(settings))
    except BackchannelError as error:
        advice = "" if path is None else START
        return Finding("redis", False, True, error.message, advice)


def _database(settings: Settings) -> Iterator[Finding]:
    from sqlalchemy import make_url

    from backchannel.db import HEAD, create

    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite" and not os.path.exists(url.database or ""):
        yield Finding("database", True, True, "SQLite, made at the first start")
        return
    name = "SQLite" if url.get_backend_name() == "sqlite" else "PostgreSQL"
    try:
        engine = create(settings.database)
        with engine.connect().execution_options(reading=True) as connection:
            found = None
            if engine.dialect.has_table(connection, "alembic_version"):
                found = connection.exec_driver_sql(
                    "SELECT version_num FROM alembic_version"
                ).scalar()
        engine.dispose()
    except BackchannelError as error:
        yield Finding("database", False, True, error.message)
    except Exception as error:
        cause = str(getattr(error, "orig", error)).strip().splitlines()[0]
        advice = "Start it, or correct BACKCHANNEL_DATABASE_URL."
        yield Finding("database", False, True, f"{name} does not answer: {cause}", advice)
    else:
        current = found == HEAD
        words = f"{name}, revision {found or 'none'}"
        yield Finding(
            "database", True, True, words, "" if current else "Migrated at the next start."
        )


def _ask(settings: Settings, url: str, path: str) -> dict[str, Any] | None:
    try:
        with httpx2.Client(timeout=3.0, trust_env=not goes_direct(url)) as client:
            answer = client.get(f"{url}{path}", headers=key_of(settings)).json()
    except (httpx2.HTTPError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _api(url: str, state: dict[str, Any] | None) -> Finding:
    if state is None or "database" not in state:
        return Finding("api", False, False, f"nothing answers at {url}", START)
    waiting = ", ".join(f"{count} {lane}" for lane, count in state.get("queued", {}).items())
    told = f"{url}, waiting: {waiting}" if waiting else url  # without an admin's key it is not said
    ok = state["database"] == "ok"
    return Finding("api", ok, True, told if ok else state["database"])


def _workers(state: dict[str, Any] | None) -> Finding:
    if state is None:
        return Finding("workers", False, False, "the API would know")
    count = state.get("workers", 0)
    advice = "" if count else "Jobs wait for one. Type: backchannel worker"
    return Finding("workers", count > 0, True, f"{count} alive", advice)


def _providers(settings: Settings, listed: dict[str, Any] | None) -> Iterator[Finding]:
    """By the API's environment if it runs: its keys count. Otherwise by this shell's."""
    if listed is not None and "data" in listed:
        known = [(each["id"], each["available"], each["reason"]) for each in listed["data"]]
    else:
        from backchannel.registry import build_registry

        registry = build_registry(settings)
        known = [
            (each.id, registry.key_present(each),
             "needs no key" if not each.needs_key else f"key in {each.key_env}")
            for each in registry.providers.values()
        ]  # fmt: skip
    for name, available, reason in known:
        advice = "" if available else _advice(name)
        yield Finding(name, available, False, reason, advice)


def _advice(provider_id: str) -> str:
    from backchannel.registry import BUILT_IN

    if provider_id in {each.id for each in BUILT_IN}:
        return f"Type: {provider_id.upper()}_API_KEY=… backchannel up"
    return f"Type: backchannel providers show {provider_id}"


def _ports() -> Iterator[Finding]:
    for what, port, option in (("port", 8000, "--port"), ("port", 5555, "--flower-port")):
        free = is_free("127.0.0.1", port)
        advice = "" if free else f"Choose another: backchannel up {option} 0"
        yield Finding(what, free, False, f"{port} is {'free' if free else 'in use'}", advice)
