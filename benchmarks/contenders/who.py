"""The contenders by name: started once, and asked for one round after the other."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import redis
from celery import Celery

from benchmarks.client import driver
from benchmarks.contenders.script import encode
from benchmarks.figures import Round
from benchmarks.installation import SLOTS, Installation, serving
from benchmarks.listening import first_tokens
from benchmarks.processes import Child, cores, cpu_by_role, pin
from benchmarks.work import Work
from tests.servers import Valkey, valkey

FLOOR = "floor: bare asyncio"
SDK_LOOP = "SDK loop"
PREFORK = "usual Celery, prefork"
GEVENT = "usual Celery, gevent"
ON_SQLITE = "Backchannel, SQLite"
ON_POSTGRES = "Backchannel, PostgreSQL"
ALL = (FLOOR, SDK_LOOP, PREFORK, GEVENT, ON_SQLITE, ON_POSTGRES)

POLL_S = 0.02
# Of the usual workers. A process takes 80 MB and a third of a second to start; more greenlets than
# fill a core make each stream slower and no token cheaper: one cost 400 µs of CPU with 50 of them,
# 370 with 200, 388 with 1,000.
PROCESSES = 16
GREENLETS = 50


class Contender(Protocol):
    """Does work.

    Attributes:
        roles: The processes whose CPU time counts.
        slots: How many jobs it runs at a time; of a larger crowd the others wait for their turn.
    """

    roles: dict[str, list[int]]
    slots: int

    async def go(self, work: Work) -> list[float]:
        """Do the work to its end; returns the added first-token delays in ms."""
        ...


def one_turn(contender: Contender, work: Work) -> Work:
    """What a contender does at a time of a crowd that is larger than its slots."""
    if work.concurrency <= contender.slots:
        return work
    each = work.jobs // work.concurrency
    return replace(work, jobs=each * contender.slots, concurrency=contender.slots)


async def measure(contender: Contender, work: Work) -> Round:
    """One round."""
    before = cpu_by_role(contender.roles)
    started = time.monotonic()
    delays_ms = await contender.go(work)
    seconds = time.monotonic() - started
    after = cpu_by_role(contender.roles)
    used = {role: after[role] - before[role] for role in after}
    return Round(work.jobs, work.tokens, seconds, used, delays_ms)


class Script:
    """One of the two asyncio scripts, a process that reads work from its standard input."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.roles = {"worker": [child.pid]}
        self.slots = SLOTS

    async def go(self, work: Work) -> list[float]:
        """Hand over the work and wait for the answer."""
        self._child.tell(encode(work))
        done: dict[str, Any] = json.loads(await asyncio.to_thread(self._child.readline))
        assert done["tokens"] == work.tokens, (done["tokens"], work.tokens)
        return list(done["delays_ms"])


class UsualCelery:
    """A stock Celery worker; the driver sends the tasks and reads nothing but first tokens."""

    def __init__(self, child: Child, server: Valkey, app: Celery, slots: int) -> None:
        self.slots = slots
        self._server = server
        self._app = app
        self._answers = redis.Redis(unix_socket_path=str(server.socket), db=1)
        self.roles = {"worker": [child.pid], "valkey": [server.pid]}

    async def go(self, work: Work) -> list[float]:
        """Send, and wait until there are as many results."""
        self._answers.flushdb()
        started = time.monotonic()
        async with first_tokens(self._server.socket) as listening:
            for number in range(work.jobs):
                due = started + work.start_s(number)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                model = work.pace_of(number).model
                name = f"{model}-{started}-{number}"
                listening.subscribe(f"job:{name}")
                self._app.send_task("usual.chat", (model,), task_id=name)
            while self._answers.dbsize() < work.jobs:  # noqa: ASYNC110  there is no event
                await asyncio.sleep(POLL_S)
        return listening.delays_ms


class Backchannel:
    """The whole way: POST, doorbell, worker, stream, pub/sub, finish and usage in the database."""

    def __init__(self, home: Installation) -> None:
        self.home = home
        self.roles = home.roles
        self.slots = SLOTS

    async def go(self, work: Work) -> list[float]:
        """POST, and wait until the database has every job finished."""
        before = self.home.states().get("succeeded", 0)
        prefix = "backchannel:job:"
        async with (
            driver(self.home.url) as api,
            first_tokens(self.home.valkey.socket) as listening,
        ):

            @cache
            def request(model: str) -> bytes:
                return api.post(
                    "/v1/jobs", {"model": f"{work.dialect}:{model}", "prompt": "Hello?"}
                )

            async def post(number: int) -> None:
                await asyncio.sleep(work.start_s(number))
                answer = await api.send(request(work.pace_of(number).model))
                assert answer.status == 202, answer
                listening.subscribe(prefix + json.loads(answer.body)["id"])

            await asyncio.gather(*[post(number) for number in range(work.jobs)])
            await self.home.settled()
        after = self.home.states().get("succeeded", 0)
        assert after - before == work.jobs, self.home.states()
        return listening.delays_ms


@contextmanager
def contender(name: str, provider: str) -> Iterator[Contender]:
    """Start a contender; it is stopped at the end of the block."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        match name:
            case "floor: bare asyncio" | "SDK loop":
                module = "floor" if name == FLOOR else "sdk_loop"
                child = Child(
                    f"benchmarks.contenders.{module}",
                    provider,
                    core=cores()[1],
                    log=folder / "log",
                    talks=True,
                )
                stack.callback(child.stop)
                yield Script(child)
            case "usual Celery, prefork" | "usual Celery, gevent":
                yield _usual(name, provider, folder, stack)
            case _:
                kind = "sqlite" if name == ON_SQLITE else "postgresql"
                yield Backchannel(stack.enter_context(serving(kind, provider)))


def _usual(name: str, provider: str, folder: Path, stack: ExitStack) -> UsualCelery:
    server = stack.enter_context(valkey(appendonly=True))
    broker = f"redis+socket://{server.socket}"
    answers = f"{broker}?virtual_host=1"
    pool = ("prefork", PROCESSES) if name == PREFORK else ("gevent", GREENLETS)
    child = Child(
        *("celery", "-A", "benchmarks.contenders.usual_tasks", "worker"),
        *("-P", pool[0], "-c", str(pool[1]), "-l", "info", "--without-gossip", "--without-mingle"),
        core=cores()[0],  # until it is ready: the others start on the other one
        log=folder / "log",
        env={
            "BENCHMARK_BROKER": broker,
            "BENCHMARK_ANSWERS": answers,
            "BENCHMARK_LIVE": f"unix://{server.socket}",
            "BENCHMARK_PROVIDER": provider,
        },
    )
    stack.callback(child.stop)
    child.until(lambda: " ready." in child.log.read_text())
    pin([child.pid], cores()[1])
    app = Celery("driver", broker=broker, backend=answers)
    return UsualCelery(child, server, app, pool[1])
