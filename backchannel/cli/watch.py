"""A job's stream on the terminal: the text as it comes, resumed where a connection broke."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2

from backchannel.cli.client import call, checked, connected
from backchannel.cli.screen import Failure, complain, say, show

PATIENCE = 20  # broken connections in a row, half a second apart
SILENCE_S = 30.0  # the API says something every 10 s


def follow(job_id: str, *, as_json: bool) -> int:
    """Print a job's events up to its end; 0 if it succeeded.

    Raises:
        Failure: There is no such job, or the API stays away.
    """
    said = False
    for event in events(job_id):
        if as_json:
            show(json.dumps(event, ensure_ascii=False))
        else:
            said = _tell(event, said)
        if event["type"] == "end":
            if not (said or as_json):  # a job nobody was expected to watch
                message = call("GET", f"/v1/jobs/{job_id}")["message"] or {}
                show(message.get("content") or "")
            return 0 if event["state"] == "succeeded" else 1
    return 1


def events(job_id: str) -> Iterator[dict[str, Any]]:
    """A job's events, each once, whatever happens to the connection."""
    last = -1
    broken = 0
    while True:
        try:
            with connected() as client:
                for event in _stream(client, job_id, last):
                    last, broken = event["seq"], 0
                    yield event
                    if event["type"] == "end":
                        return
        except Failure as failure:
            if not isinstance(failure.__cause__, httpx2.TransportError) or broken >= PATIENCE:
                raise
        broken += 1
        if broken > PATIENCE:
            raise Failure(f"The stream of {job_id} does not end; type: backchannel doctor")
        time.sleep(0.5)


def _stream(client: httpx2.Client, job_id: str, last: int) -> Iterator[dict[str, Any]]:
    headers = {"Accept": "text/event-stream"}
    if last >= 0:
        headers["Last-Event-ID"] = str(last)
    path = f"/v1/jobs/{job_id}/events"
    with client.stream("GET", path, headers=headers, timeout=SILENCE_S) as answer:
        if not answer.is_success:
            answer.read()
            checked(answer)
        for line in answer.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line[5:])


def _tell(event: dict[str, Any], said: bool) -> bool:
    """Print one event; whether any text was printed so far."""
    match event["type"]:
        case "delta":
            sys.stdout.write(event["text"])
            sys.stdout.flush()
            return True
        case "reasoning":
            sys.stderr.write(event["text"])
            sys.stderr.flush()
        case "retrying":
            say(f"\n[{event['message']} It is tried again.]")
        case "reset":
            say(f"\n[Attempt {event['attempt']} begins; forget the text so far.]")
        case "end":
            if said:
                show()
            if event["state"] != "succeeded":
                error = event.get("error") or {}
                complain(f"The job is {event['state']}. {error.get('message', '')}".strip())
    return said
