"""One form for every log line, whoever wrote it."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog

from backchannel.logs import configure
from backchannel.settings import Settings


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the log goes during a test; afterwards all is as before."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    into = io.StringIO()
    configure(Settings(), "test", into)
    yield into
    root.handlers[:], level = before
    root.setLevel(level)
    structlog.reset_defaults()
    logging.captureWarnings(False)


def test_a_line_is_a_sentence_and_its_fields(stream: io.StringIO) -> None:
    structlog.get_logger().info("The job is done.", job="job_1", words="two words", empty="")
    when, level, rest = stream.getvalue().rstrip("\n").split(" ", 2)
    assert when.endswith("Z")
    assert level == "info"
    assert rest == "The job is done. job=job_1 words='two words' empty=''"


def test_the_standard_librarys_loggers_speak_the_same_way(stream: io.StringIO) -> None:
    logging.getLogger("celery").warning("Lost %s of %d", "one", 2, extra={"color_message": "x"})
    assert stream.getvalue().endswith(" warning Lost one of 2\n")


def test_an_exception_follows_its_sentence(stream: io.StringIO) -> None:
    try:
        raise ValueError("so it is")
    except ValueError:
        structlog.get_logger().exception("It went wrong.")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("error It went wrong.")
    assert rest[-1] == "ValueError: so it is"


def test_a_line_per_request_or_task_is_for_debugging(stream: io.StringIO) -> None:
    logging.getLogger("httpx2").info("HTTP Request: GET …")
    logging.getLogger("celery.worker.strategy").info("Task received")
    structlog.get_logger().debug("Details.")
    assert stream.getvalue() == ""
    configure(Settings(log_level="debug"), "test", stream)
    logging.getLogger("httpx2").debug("details")
    assert "debug details" in stream.getvalue()


def test_warnings_are_log_lines_too(stream: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("mind the gap", stacklevel=1)
    assert "mind the gap" in stream.getvalue()
