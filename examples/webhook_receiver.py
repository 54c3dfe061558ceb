"""Listens for webhooks, lets nothing unsigned in, and acts on each event once.

    BACKCHANNEL_EGRESS_ALLOW=127.0.0.1:9000 backchannel up
    backchannel webhooks add http://127.0.0.1:9000/hooks
    WEBHOOK_SECRET=whsec_… python examples/webhook_receiver.py

Needs nothing but Python. PORT is where it listens, by default 9000; 0 takes a free one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = os.environ.get("WEBHOOK_SECRET", "")
PORT = int(os.environ.get("PORT", "9000"))
TOLERANCE_S = 300  # an old message is somebody's recording
LARGEST = 64 << 10

seen: set[str] = set()  # a service keeps these ids in its database


def is_signed(headers: Any, body: bytes) -> bool:
    """Whether one of the signatures is of our secret, over id, time and body."""
    name, sent, signatures = (
        headers.get(f"webhook-{each}", "") for each in ("id", "timestamp", "signature")
    )
    if not sent.isdigit() or abs(time.time() - int(sent)) > TOLERANCE_S:
        return False
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = hmac.digest(key, f"{name}.{sent}.".encode() + body, hashlib.sha256)
    ours = "v1," + base64.b64encode(signed).decode()
    # there are two while a secret is being rotated
    return any(hmac.compare_digest(ours, each) for each in signatures.split())


def handle(event: dict[str, Any]) -> None:
    """What your service does about it. Quickly: after 15 s the event is sent again."""
    print(event["type"], event["data"]["id"], flush=True)


class Hooks(BaseHTTPRequestHandler):
    """One POST is one event."""

    def do_POST(self) -> None:
        """Answer 204 for what was taken; anything but 2xx has it sent again later."""
        size = int(self.headers.get("content-length", 0))
        body = self.rfile.read(min(size, LARGEST))
        if not is_signed(self.headers, body):
            self.send_error(401, "This was not signed with WEBHOOK_SECRET.")
            return
        event = json.loads(body)
        if event["id"] not in seen:  # it may come twice, always with the same id
            handle(event)
            seen.add(event["id"])
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing: the events are what is printed."""


def main() -> int:
    """Listen until Ctrl-C."""
    if not SECRET:
        print("Set WEBHOOK_SECRET to what `backchannel webhooks add` showed.", file=sys.stderr)
        return 2
    with ThreadingHTTPServer(("127.0.0.1", PORT), Hooks) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}/hooks", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    raise SystemExit(main())
