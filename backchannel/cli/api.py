"""``backchannel api``: the HTTP side alone."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOGUE = """\
\b
Examples:
  backchannel api
  backchannel api --host 0.0.0.0 --port 8080
"""


def api(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve the API. Brings the database's tables up to date first."""
    import structlog

    from api.main import serve
    from backchannel.cli.running import choose_port
    from backchannel.cli.valkey import warn_unless_redis
    from backchannel.logs import configure
    from backchannel.settings import get_settings

    settings = get_settings()
    configure(settings, "api")
    choose_port(host, port, "--port")
    warn_unless_redis(settings, structlog.get_logger().warning)
    serve(host, port)
