"""One event as a signed POST: Standard Webhooks outside, OpenAI's event inside.

Source: https://github.com/standard-webhooks/standard-webhooks (signature, headers, two signatures
while a secret is rotated) and the events of OpenAI's SDK 3.54, whose ``webhooks.unwrap`` reads it.
"""

from __future__ import annotations

import asyncio
import base64
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from backchannel import __version__
from backchannel.egress import AllowedHosts, guarded_connector
from backchannel.errors import BackchannelError
from backchannel.retry_after import retry_after_s
from backchannel.sealed import unseal
from backchannel.settings import Settings
from backchannel.webhooks import Answer, Delivery

if TYPE_CHECKING:
    from aiohttp import ClientSession

SECRET_PREFIX = "whsec_"
TIMEOUT_S = 15.0  # of one try, from the look-up of the name to the status
CONNECT_S = 5.0


def new_secret() -> str:
    """256 random bits, as Standard Webhooks writes them."""
    return SECRET_PREFIX + base64.b64encode(os.urandom(32)).decode()


def body_of(delivery: Delivery) -> bytes:
    """The same bytes at every try."""
    return msgspec.json.encode(
        {
            "id": delivery.event_id,
            "object": "event",
            "created_at": delivery.created_ms // 1000,
            "type": delivery.type,
            "data": {"id": delivery.subject},
        }
    )


def headers_of(delivery: Delivery, body: bytes, settings: Settings) -> dict[str, str]:
    """The id and a signature of this moment with each secret.

    Raises:
        SetupError: The secrets were sealed with another master key.
    """
    from standardwebhooks import Webhook

    now = datetime.now(UTC)
    signatures = [
        Webhook(unseal(settings, secret)).sign(delivery.event_id, now, body.decode())
        for secret in delivery.secrets
    ]
    return {
        "content-type": "application/json",
        "user-agent": f"Backchannel/{__version__}",
        "webhook-id": delivery.event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


async def open_session(settings: Settings) -> ClientSession:
    """The client that webhooks are sent with; whoever opens it closes it."""
    await asyncio.to_thread(_import)
    import aiohttp

    connector = guarded_connector(AllowedHosts.parse(settings.egress_allow))
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S, connect=CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    )


def _import() -> None:
    import standardwebhooks  # noqa: F401

    import backchannel.connector  # noqa: F401


async def post(session: ClientSession, delivery: Delivery, settings: Settings) -> Answer:
    """Send an event once; what its receiver says beyond a status is not read.

    Anything but a 2xx is an error in words; a redirect is not followed.
    """
    from aiohttp import ClientError

    try:
        body = body_of(delivery)
        headers = headers_of(delivery, body, settings)
        async with session.post(
            delivery.url, data=body, headers=headers, allow_redirects=False
        ) as answer:
            return _judged(answer.status, answer.headers.get("Retry-After"))
    except BackchannelError as error:
        return Answer(None, error.message)
    except TimeoutError:
        return Answer(None, f"No answer within {TIMEOUT_S:.0f} s.")
    except (ClientError, OSError, ValueError) as error:
        return Answer(None, (str(error) or type(error).__name__)[:500])


def _judged(status: int, retry_after: str | None) -> Answer:
    if 200 <= status < 300:
        return Answer(status, None)
    if 300 <= status < 400:
        return Answer(status, f"It answered {status}: redirects are not followed.")
    return Answer(status, f"It answered {status}.", retry_after_s(retry_after) or 0.0)
