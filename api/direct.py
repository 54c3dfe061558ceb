"""POST /v1/jobs past FastAPI, whose layers cost more than all else that accepting a job does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.deps import StrictRequest
from backchannel.errors import BackchannelError
from backchannel.keys import JOBS_WRITE

# As a route of FastAPI: what is asked, what the process owns, who asks, the response to be.
Endpoint = Callable[[Any, Any, Any, Response], Awaitable[BaseModel]]


class Direct:
    """Middleware that answers what is plainly right, and what is refused in words of our own.

    A body that is not of the form, none at all, and an Idempotency-Key go on to FastAPI.
    """

    def __init__(self, app: ASGIApp, path: str, form: type[BaseModel], endpoint: Endpoint) -> None:
        self._app = app
        self._path = path
        self._form = form
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, if it is ours."""
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = StrictRequest(scope, receive)
        headers = request.headers
        if headers.get("content-type") != "application/json" or "idempotency-key" in headers:
            await self._app(scope, receive, send)
            return
        try:
            its = request.app.state.resources
            caller = await its.gate.admit(scope["headers"], JOBS_WRITE)
            if not await request.body():
                await self._app(scope, _again(b"", receive), send)
                return
            asked = self._form.model_validate(await request.json())
            response = Response(status_code=202, media_type="application/json")
            made = await self._endpoint(asked, its, caller, response)
            response.body = made.model_dump_json().encode()
            response.headers["content-length"] = str(len(response.body))
        except ValidationError:
            await self._app(scope, _again(await request.body(), receive), send)
            return
        except BackchannelError as error:
            response = JSONResponse(error.body(), error.status, headers=error.headers)
        await response(scope, receive, send)


def _again(body: bytes, receive: Receive) -> Receive:
    """A request whose body was read, to be read once more."""
    unread = True

    async def receive_again() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again
