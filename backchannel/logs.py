"""A log line is a sentence for the operator and fields for the machine, from every library too."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from backchannel.settings import Settings

# What these say at info belongs to a debugger: a line per request, per task or per connection.
TALKATIVE = (
    "aiohttp.access",
    "alembic",
    "celery.app.trace",
    "celery.redirected",
    "celery.worker.strategy",
    "httpcore2",
    "httpx2",
    "kombu",
    "tornado.access",
    "uvicorn.access",
)


def configure(settings: Settings, process: str, stream: TextIO | None = None) -> None:
    """Send structlog and the standard library's logging to one stream, in one form.

    Args:
        process: Who speaks (``api``, ``worker``, …); a field of every line on a terminal. Under
            `backchannel up` the one log puts the child's name before the line instead.
        stream: Default: stderr.
    """
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _without_colours,
                *_renderers(process, coloured=stream.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if level > 10 else level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "celery", "tornado"):
        # they bring handlers of their own; one line is enough
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.captureWarnings(True)


def _without_colours(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event.pop("color_message", None)  # uvicorn says everything twice
    return event


def _renderers(process: str, *, coloured: bool) -> list[Any]:
    if coloured:
        return [
            lambda _logger, _method, event: {**event, "process": process},
            structlog.dev.ConsoleRenderer(pad_event_to=0),
        ]
    return [structlog.processors.format_exc_info, sentence_and_fields]


def sentence_and_fields(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    """``2026-11-22T02:45:00.120000Z info Sentence. key='a value'``, then a traceback if any."""
    when = event.pop("timestamp", "")
    level = event.pop("level", "")
    sentence = event.pop("event", "")
    after = [event.pop(name, None) for name in ("exception", "stack")]
    fields = "".join(f" {name}={_value(value)}" for name, value in event.items())
    return "\n".join([f"{when} {level} {sentence}{fields}", *(text for text in after if text)])


def _value(value: Any) -> str:
    text = str(value)
    plain = bool(text) and not any(mark in text for mark in " =\"'\n\r\t")
    return text if plain else repr(text)
