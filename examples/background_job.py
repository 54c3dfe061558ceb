"""A service's side of a chat job: order it once, show it as it is written, then take the result.

    python examples/background_job.py "Why do cats knead blankets?"

Needs nothing but Python. BACKCHANNEL_API_URL says where the API is, BACKCHANNEL_API_KEY who asks;
MODEL says who answers, by default the offline model that repeats the prompt.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

API = os.environ.get("BACKCHANNEL_API_URL", "http://127.0.0.1:8000").rstrip("/")
KEY = {"x-api-key": os.environ.get("BACKCHANNEL_API_KEY", "unused")}  # until there are any
MODEL = os.environ.get("MODEL", "echo")
SILENCE_S = 30  # the stream says something at least every 10 s
FINISHED = {"succeeded", "failed", "cancelled", "expired"}
BROKEN = (OSError, HTTPException)  # connections: refused, cut or silent


def opened(request: Request, timeout_s: float) -> HTTPResponse:
    """The open answer; a refusal is ours to correct, so its message ends the program."""
    try:
        answer: HTTPResponse = urlopen(request, timeout=timeout_s)
    except HTTPError as error:
        if error.code < 500:
            raise SystemExit(json.load(error)["error"]["message"]) from None
        raise
    return answer


def call(method: str, path: str, body: Any = None, **headers: str) -> Any:
    """One request's JSON, asked for again while the API is away: a restart takes seconds."""
    data = None if body is None else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(f"{API}{path}", data, {"Content-Type": "application/json", **KEY, **headers})
    request.method = method
    pauses_s = iter((0.5, 1, 2, 4, 8))
    while True:
        try:
            with opened(request, timeout_s=90) as answer:
                return json.load(answer)
        except BROKEN as error:
            pause_s = next(pauses_s, None)
            if pause_s is None:
                raise SystemExit(f"No answer from {API}: {error}. Type: backchannel up") from None
            time.sleep(pause_s)


def enqueue(prompt: str, key: str) -> Any:
    """Order a chat. Whatever happens to the connection, one key is one job."""
    body = {"model": MODEL, "prompt": prompt, "metadata": {"asked_by": "background_job.py"}}
    return call("POST", "/v1/jobs", body, Idempotency_Key=key)


def follow(job_id: str) -> Iterator[dict[str, Any]]:
    """The job's events, each exactly once, up to `end`; a broken connection is resumed."""
    last = -1
    for _ in range(60):
        headers = {"Last-Event-ID": str(last), **KEY}
        try:
            url = f"{API}/v1/jobs/{job_id}/events"
            with opened(Request(url, headers=headers), SILENCE_S) as lines:
                for line in lines:
                    if not line.startswith(b"data: "):
                        continue
                    event = json.loads(line.removeprefix(b"data: "))
                    last = event["seq"]
                    yield event
                    if event["type"] == "end":
                        return
            why = "the connection was closed"
        except BROKEN as error:
            why = str(error)
        print(f"[{why}; going on after event {last}]", file=sys.stderr)
        time.sleep(1)
    raise SystemExit(f"The stream of {job_id} does not end.")


def result(job_id: str) -> Any:
    """The finished job. This alone is enough for a service that does not show the answer live."""
    while True:
        job = call("GET", f"/v1/jobs/{job_id}?wait=60")
        if job["state"] in FINISHED:
            return job


def main() -> int:
    """Ask one thing and print its answer as it arrives."""
    prompt = " ".join(sys.argv[1:]) or "Write a haiku about a queue that moves."
    # a service takes the id of its own record here, as in "ticket-4711"
    job = enqueue(prompt, key=f"example-{uuid.uuid4()}")
    print(f"{job['id']} is {job['state']}", file=sys.stderr)

    for event in follow(job["id"]):
        match event["type"]:
            case "delta":
                print(event["text"], end="", flush=True)
            case "reset":  # the worker or the provider failed: another attempt begins
                print("\n[from the beginning:]")
    print()

    job = result(job["id"])
    usage = job["usage"] or {}
    print(
        f"{job['id']} {job['state']}: {usage.get('input_tokens')} tokens in, "
        f"{usage.get('output_tokens')} out, ${usage.get('cost_usd')}",
        file=sys.stderr,
    )
    if job["error"]:
        print(f"{job['error']['code']}: {job['error']['message']}", file=sys.stderr)
    return 0 if job["state"] == "succeeded" else 1


if __name__ == "__main__":
    raise SystemExit(main())
