"""The API process: opens what it owns, serves the routes, and turns every failure into one form."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from api import (
    batches,
    chat,
    deliveries,
    files,
    health,
    jobs,
    messages,
    models,
    provider_tries,
    providers,
    responses,
    sessions,
    usage,
    webhooks,
)
from api.auth import is_loopback
from api.deps import open_resources
from api.direct import Direct
from api.message_events import error_body
from api.openapi import document
from backchannel import __version__, keys
from backchannel.db import create, migrate
from backchannel.errors import BackchannelError, InvalidRequest, NotFound, SetupError
from backchannel.garbage import settle
from backchannel.schemas import CreateJob
from backchannel.settings import Settings, get_settings
from backchannel.strict_json import not_valid, place_of

log = structlog.get_logger()

LOOPBACK = "127.0.0.1"
# Streams are told to stop at once; what is still being answered gets this long.
GRACE_S = 5


# In the order in which they are looked through: what is asked for most often first.
ROUTERS = [
    module.router
    for module in (
        jobs, files, batches, sessions, chat, responses, messages, models, usage, providers,
        provider_tries, webhooks, deliveries, health,
    )
] + [webhooks.theirs]  # fmt: skip

_TELEMETRY = re.compile("OTEL_")
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}


def create_app(settings: Settings, host: str = LOOPBACK) -> FastAPI:
    """The application; its lifespan opens and closes what the process owns.

    Args:
        host: What it will listen on: without callers' keys only loopback lets anybody in.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.resources = await open_resources(settings, stack, host)
            yield

    app = FastAPI(
        title="Backchannel",
        version=__version__,
        lifespan=lifespan,
        # FastAPI would ask the environment at every request whether somebody wants its spans
        telemetry=None if any(map(_TELEMETRY.match, os.environ)) else _NO_TELEMETRY,
    )
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = partial(document, app, settings)  # type: ignore[method-assign]  # as FastAPI has it done
    app.add_middleware(Direct, path=jobs.router.prefix, form=CreateJob, endpoint=jobs.create_job)
    app.add_exception_handler(BackchannelError, _refused)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unhandled)
    return app


# ---------------------------------------------------------------- errors


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BackchannelError)
    return JSONResponse(_form(request, error), error.status, headers=error.headers)


def _form(request: Request, error: BackchannelError) -> dict[str, Any]:
    """OpenAI's form, or where its clients ask, Anthropic's."""
    theirs = request.url.path.startswith(messages.router.prefix)
    return error_body(error) if theirs else error.body()


async def _not_valid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _refused(request, _invalid(error))


def _invalid(error: RequestValidationError) -> InvalidRequest:
    if isinstance(error.body, bytes):
        return InvalidRequest(
            "Send JSON, with the header Content-Type: application/json.", param=None
        )
    return not_valid([(_place(each, error.body), each) for each in error.errors()])


def _place(each: dict[str, Any], body: Any) -> str:
    where, *loc = each["loc"]
    if where != "body":
        return str(loc[0])
    return place_of(loc, body, missing=each["type"] == "missing")


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    # FastAPI wraps what is raised while a body is read
    if isinstance(error.__cause__, BackchannelError):
        return await _refused(request, error.__cause__)
    named: BackchannelError = InvalidRequest(str(error.detail))
    if error.status_code == 404:
        named = NotFound(f"There is no {request.url.path}.")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        named = InvalidRequest(
            f"{request.url.path} does not take {request.method}.", code="method_not_allowed"
        )
        headers["Allow"] = ", ".join(_methods(request.url.path))
    return JSONResponse(_form(request, named), error.status_code, headers=headers)


def _methods(path: str) -> list[str]:
    """All that an address takes: the routes of one path know of themselves only."""
    routes = (route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute))
    return sorted(
        method for route in routes if route.path_regex.match(path) for method in route.methods or ()
    )


async def _unhandled(request: Request, _error: Exception) -> JSONResponse:
    # the traceback goes to the log, from the server
    error = BackchannelError("Something went wrong inside Backchannel; its log says what.")
    return JSONResponse(_form(request, error), error.status)


# ---------------------------------------------------------------- serving


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # whoever waits for a job is answered with what there is
        self.config.app.state.resources.stopping.set()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def make_server(settings: Settings, host: str = LOOPBACK) -> uvicorn.Server:
    """The server of this process; `run` it with a socket that listens on `host`."""
    return _Server(
        uvicorn.Config(
            create_app(settings, host),
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
        )
    )


def serve(host: str = LOOPBACK, port: int = 8000) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        SetupError: The address is not ours to listen on, or the database cannot be opened.
    """
    settings = get_settings()
    migrate(settings.database)  # here, so that what goes wrong is a sentence
    with_keys, open_ = who_may(settings, host)
    with listen(host, port, open_bind=with_keys or settings.allow_open_bind) as listening:
        if open_:
            tell = log.info if is_loopback(host) else log.warning
            tell(
                "There are no callers' keys: whoever reaches this port is let in, as the caller "
                "'local'. To change that, type: backchannel callers add NAME",
                host=host,
            )
        server = make_server(settings, host)
        settle()
        server.run(sockets=[listening])


def who_may(settings: Settings, host: str) -> tuple[bool, bool]:
    """Whether a key is good now; and whether nobody needs one."""
    engine = create(settings.database)
    with engine.connect().execution_options(reading=True) as connection:
        found = keys.any_active(connection), keys.any_made(connection)
    engine.dispose()
    return found[0], not found[1] and (is_loopback(host) or settings.allow_open_bind)


def listen(host: str, port: int, *, open_bind: bool) -> socket.socket:
    """A listening socket.

    Raises:
        SetupError: Not loopback and not allowed, in use, or not an address of this machine.
    """
    if not (open_bind or is_loopback(host)):
        raise SetupError(
            f"{host} can be reached from other machines, and there are no callers' keys: anybody "
            "could spend your money. Type: backchannel callers add NAME. Or listen on 127.0.0.1, "
            "or set BACKCHANNEL_ALLOW_OPEN_BIND=true where only what you trust reaches the port."
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SetupError(
                f"Port {port} is in use. Stop what listens there, or choose another with "
                f"--port {port + 1}."
            ) from error
        raise SetupError(f"Cannot listen on {host}, port {port}: {error}.") from error
