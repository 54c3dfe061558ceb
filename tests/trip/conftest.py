"""Installations for whole journeys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.servers import valkey
from tests.trip.stack import Stack


@pytest.fixture
def new_stack(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Stack]]:
    """Make an installation on its own Valkey; further settings by name."""
    with ExitStack() as cleanup:

        def make(database_url: str, **settings: str) -> Stack:
            stack = Stack(tmp_path, cleanup.enter_context(valkey()), database_url, **settings)
            cleanup.callback(stack.close)
            return stack

        yield make


@pytest.fixture
def stack(new_stack: Callable[..., Stack], sqlite_url: str) -> Stack:
    """An API process on SQLite; the test starts its workers."""
    made = new_stack(sqlite_url)
    made.api()
    return made
