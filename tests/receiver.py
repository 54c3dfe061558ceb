"""A receiver of webhooks on loopback: keeps what arrives, answers what it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from standardwebhooks import Webhook


class Message(NamedTuple):
    """One POST as it came."""

    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        whole: dict[str, Any] = json.loads(self.body)
        return whole

    def verified(self, secret: str) -> dict[str, Any]:
        """The event, if it was signed with this secret."""
        whole: dict[str, Any] = Webhook(secret).verify(self.body, self.headers)
        return whole


class Receiver:
    """``status`` is what it answers, ``headers`` go with it."""

    def __init__(self, port: int = 0) -> None:
        self.messages: list[Message] = []
        self.status = 204
        self.headers: dict[str, str] = {}
        self.pause_s = 0.0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                # as it is told now: whoever has seen the message may tell it something else
                status, own = receiver.status, receiver.headers
                receiver.messages.append(Message(headers, body))
                time.sleep(receiver.pause_s)
                self.send_response(status)
                for name, value in own.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hooks"
        self._thread = threading.Thread(target=self._server.serve_forever, name="receiver")
        self._thread.start()

    def until(self, count: int, within_s: float = 30) -> list[Message]:
        """What has arrived, once there is so much of it."""
        give_up = time.monotonic() + within_s
        while len(self.messages) < count:
            assert time.monotonic() < give_up, self.messages
            time.sleep(0.02)
        return list(self.messages)

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def receiver(port: int = 0) -> Iterator[Receiver]:
    """One that listens until the block ends."""
    listening = Receiver(port)
    try:
        yield listening
    finally:
        listening.close()
