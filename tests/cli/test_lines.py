"""Input lines: what becomes a job, and how what does not is named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from backchannel.cli.lines import (
    MAX_LINE_BYTES,
    BadLine,
    Line,
    count_lines,
    read_lines,
    same_content,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def read(*lines: Any) -> list[Line | BadLine]:
    """The lines of a file of these values."""
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(read_lines(io.BytesIO(b"\n".join(texts))))


def good(*lines: Any) -> list[Line]:
    """The same, where all are good."""
    found = read(*lines)
    assert [line for line in found if isinstance(line, BadLine)] == []
    return [line for line in found if isinstance(line, Line)]


@pytest.mark.parametrize("name", ["plain.jsonl", "prompts.jsonl"])
def test_every_example_can_be_sent(name: str) -> None:
    with (EXAMPLES / name).open("rb") as file:
        count = count_lines(file)
        lines = list(read_lines(file))
    assert [line for line in lines if isinstance(line, BadLine)] == []
    assert len(lines) == count


def test_a_batch_line_becomes_a_job() -> None:
    [line] = good(
        {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "openai:gpt-5-mini",
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 5,
                "stream": False,
                "temperature": None,
            },
        }
    )
    assert line.batch_line("echo:echo-1") == {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "openai:gpt-5-mini",  # its own wins
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 5,
            "metadata": {"custom_id": "a"},
        },
    }


def test_a_prompt_line_becomes_a_job() -> None:
    [line] = good({"prompt": "Hi", "system": "Be brief.", "custom_id": "a", "seed": 7})
    assert line.batch_line("echo:echo-1")["body"] == {
        "model": "echo:echo-1",
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        ],
        "seed": 7,
        "metadata": {"custom_id": "a"},
    }  # fmt: skip


def test_bom_crlf_and_blank_lines_are_no_obstacle() -> None:
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}\r\n{"prompt": "c"}'
    lines = list(read_lines(io.BytesIO(data)))
    assert [line.number for line in lines] == [1, 4, 5]
    assert all(isinstance(line, Line) for line in lines)
    assert count_lines(io.BytesIO(data)) == 3


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not valid JSON"),
        (b'{"prompt": "a", "seed": NaN}', "seed is not a finite number"),
        (b'{"prompt": "a", "prompt": "b"}', "given twice"),
        (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[1]", "A line is a JSON object."),
        ({"prompt": 7}, "prompt: input should be a valid string."),
        ({"prompt": ""}, "prompt: "),
        ({}, "Give either prompt or messages."),
        ({"prompt": "a", **CHAT}, "Give either prompt or messages."),
        ({"prompt": "a", "temprature": 1}, "There is no field 'temprature' here"),
        ({"prompt": "a", "stream": True}, "'stream' is refused"),
        ({"prompt": "a", "functions": []}, "'functions' is refused"),
        ({"prompt": "a", "custom_id": 7}, "custom_id must be a string"),
        ({"prompt": "a", "custom_id": "x" * 513}, "custom_id must be a string"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role: "),
        ({"messages": [{"role": "user"}]}, "messages[0].content: it is missing."),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": CHAT}, "url must be"),
        ({"custom_id": "a", "method": "GET", "body": CHAT}, "method must be POST."),
        ({"custom_id": "a", "body": "Hi"}, "body must be an object."),
        ({"custom_id": "a", "body": {"prompt": "Hi"}}, "body.messages: it is missing."),
        ({"custom_id": "a", "body": CHAT, "extra": 1}, "There is no field 'extra' here"),
    ],
)
def test_a_line_that_cannot_be_sent_is_named_and_the_next_one_is_read(line: Any, why: str) -> None:
    bad, after = read(line, {"prompt": "the next one"})
    assert isinstance(bad, BadLine)
    assert why in bad.message
    assert bad.number == 1
    assert isinstance(after, Line)


def test_a_line_over_the_cap_is_left_out_whole() -> None:
    big = b'{"prompt": "' + b"x" * (3 * MAX_LINE_BYTES) + b'"}'
    fits = b'{"prompt": "' + b"x" * (MAX_LINE_BYTES - 14) + b'"}'
    assert len(fits) == MAX_LINE_BYTES
    first, second, third, fourth = read(big, fits, b" " + fits, {"prompt": "a"})
    assert isinstance(first, BadLine)
    assert isinstance(second, Line)
    assert isinstance(third, BadLine)
    assert isinstance(fourth, Line)
    assert [line.number for line in (first, second, third, fourth)] == [1, 2, 3, 4]


def test_an_id_that_comes_twice_is_refused_the_second_time() -> None:
    first, second = read({"prompt": "a", "custom_id": "x"}, {"prompt": "b", "custom_id": "x"})
    assert isinstance(first, Line)
    assert isinstance(second, BadLine)
    assert second.message == "custom_id 'x' stands on line 1 too."


def test_a_line_without_an_id_keeps_its_made_one_when_others_come_before_it() -> None:
    [alone] = good({"prompt": "b"})
    *_, later, again = good({"prompt": "a"}, {"prompt": "b"}, {"prompt": "b"})
    assert later.custom_id == alone.custom_id
    assert again.custom_id == f"{alone.custom_id}-2"
    assert later.digest == alone.digest
    assert same_content(alone.id, later)


def test_the_digest_changes_with_what_would_be_paid_for() -> None:
    [line] = good({"prompt": "a", "custom_id": "x"})
    [own] = good({"prompt": "a", "custom_id": "x", "model": "m"})
    [other] = good({"prompt": "b", "custom_id": "x"})
    [same] = good({"custom_id": "x", "prompt": "a"})
    assert len({line.digest, own.digest, other.digest}) == 3
    assert same.digest == line.digest
    assert not same_content(line.id, other)
    assert same_content("batch_req_123", line)  # not ours to judge
