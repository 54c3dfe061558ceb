"""What the API asks of a worker beside jobs: which models a provider says it has."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from backchannel import errands
from backchannel.errors import BackchannelError, ProviderError
from backchannel.registry import Provider
from workers.endpoint import Endpoint
from workers.providers.failures import classify, failure, refused

if TYPE_CHECKING:
    from workers.process import Process

log = structlog.get_logger()

DISCOVER_S = 10.0
MAX_LIST_BYTES = 4 << 20  # OpenRouter's list of 400 models, with prose, is 0.5 MB
MAX_MODELS = 1_000
MAX_NAME_CHARS = 256


def habits(process: Process) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """The errand boy, with his name."""

    async def do(errand: errands.Errand) -> dict[str, Any]:
        return await _answer(process, errand)

    prefix = process.settings.redis_prefix
    yield "errands", errands.serve(process.redis, process.listener, prefix, do)


async def _answer(process: Process, errand: errands.Errand) -> dict[str, Any]:
    try:
        await process.roster.refresh()
        return {"models": await discover(process, process.registry.get(errand["provider"]))}
    except BackchannelError as error:
        return {"error": {"code": error.code, "message": error.message}}
    except Exception:
        log.exception("An errand failed by a defect of this software.", errand=errand)
        return {"error": {"code": "internal_error", "message": "The worker's log says why."}}


async def discover(process: Process, provider: Provider) -> list[str]:
    """The models a provider lists, in its own order; bounded in time, bytes and number.

    Raises:
        ProviderError: It cannot be asked, or what it says is no list of models.
        ProviderKeyMissing: It needs a key and has none.
    """
    async with process.clients.use(provider) as client:
        if client is None:
            return list(provider.models)
        try:
            async with asyncio.timeout(DISCOVER_S):
                return _names(provider, await _read(provider, client))
        except TimeoutError:
            raise failure(
                provider.id, "stalled", f"did not list its models within {DISCOVER_S:g} s"
            ) from None
        except Exception as error:
            known = classify(error, provider)
            if known is None:
                raise
            raise known from None


async def _read(provider: Provider, client: Endpoint) -> bytes:
    body = bytearray()
    async with aclosing(await client.list_models()) as response:
        if not response.is_success:
            await response.aread()
            raise refused(response, provider)
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_LIST_BYTES:
                raise failure(
                    provider.id,
                    "malformed",
                    f"sent more than {MAX_LIST_BYTES >> 20} MiB as its list of models",
                )
    return bytes(body)


def _names(provider: Provider, body: bytes) -> list[str]:
    try:
        listed = msgspec.json.decode(body)
    except msgspec.DecodeError:
        raise _no_list(provider, "is not JSON") from None
    data = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(data, list):
        raise _no_list(provider, "has no data")
    names = [each.get("id") for each in data if isinstance(each, dict)]
    good = [name for name in names if isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS]
    return list(dict.fromkeys(good))[:MAX_MODELS]


def _no_list(provider: Provider, why: str) -> ProviderError:
    return failure(
        provider.id,
        "malformed",
        f"sent no list of models: what is at {provider.base_url} {why}. Name the models yourself",
    )
