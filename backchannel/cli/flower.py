"""``backchannel flower``: Celery's workers in the browser, for looking at."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOGUE = """\
\b
Examples:
  backchannel flower
  FLOWER_PASSWORD=… backchannel flower --host 0.0.0.0 --port 5555
"""


def flower(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 5555,
) -> None:
    """Show workers and jobs in Flower. Beyond loopback it wants a password in FLOWER_PASSWORD."""
    import os

    from backchannel.cli.running import choose_port, is_loopback
    from backchannel.cli.screen import misuse
    from backchannel.logs import configure
    from backchannel.settings import get_settings

    password = os.environ.get("FLOWER_PASSWORD", "")
    if not is_loopback(host) and not password:
        misuse(
            f"Flower on {host} would be open to everybody there. "
            f"Type: FLOWER_PASSWORD=… backchannel flower --host {host}"
        )
    settings = get_settings()
    configure(settings, "flower")
    choose_port(host, port, "--port")
    _serve(host, port, password)


def _serve(host: str, port: int, password: str) -> None:
    import asyncio
    import logging
    import os
    import signal

    from flower.app import Flower  # type: ignore[import-untyped]
    from flower.command import (  # type: ignore[import-untyped]
        apply_env_options,
        extract_settings,
    )
    from flower.options import options  # type: ignore[import-untyped]
    from flower.urls import settings as web  # type: ignore[import-untyped]

    from backchannel.queue import celery_app

    # its API without a password shows what its pages show; read-only refuses everything else
    os.environ.setdefault("FLOWER_UNAUTHENTICATED_API", "true")
    apply_env_options()  # FLOWER_URL_PREFIX and the like
    extract_settings()
    options.address, options.port = host, port
    # workers take no orders over Redis: nothing to inspect or to enable, nothing to press
    options.read_only = True
    options.enable_events = False
    options.inspect_timeout = 10.0
    if password:
        options.basic_auth = [f"admin:{password}"]
    logging.getLogger("flower.inspector").setLevel(logging.ERROR)

    async def serve() -> None:
        # not Flower.start: it would run the loop itself, and end only by SystemExit
        app = Flower(options=options, capp=celery_app(), **web)
        app.start_http_server()
        app.events.start()
        app.started = True
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        logging.getLogger("flower").info("Flower shows the workers at http://%s:%s", host, port)
        await stopped.wait()

    asyncio.run(serve())
