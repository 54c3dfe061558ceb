"""A TCP proxy on loopback that passes, goes silent, or cuts a connection at its COMMIT."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

# How both PostgreSQL protocols spell it: psycopg sends a COMMIT as one statement of its own.
COMMIT = b"COMMIT\0"


class _Link:
    """One client's connection and ours to the server."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.dead = False  # half open: neither side hears of the other again, nor of its end
        self.cutting = False  # the next words of the server are the reply nobody gets

    def close(self) -> None:
        for end in (self.client, self.server):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


class Proxy:
    """Stands between processes and one server; `close` it at the end.

    Attributes:
        cut_every: Drop the connection of every so-manieth COMMIT once the server has answered it
            and before its client knows; 0 for never.
        cuts: How often that was done.
    """

    def __init__(self, family: socket.AddressFamily, address: str | tuple[str, int]) -> None:
        self.cut_every = 0
        self.cuts = 0
        self._commits = 0
        self._family, self._address = family, address
        self._links: list[_Link] = []
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listening.getsockname()[1]
        self._start(self._accept_forever)

    def close(self) -> None:
        """Drop everything."""
        self._listening.close()
        for link in self._links:
            link.dead = True
            link.close()
        self._flowing.set()

    def swallow(self) -> None:
        """From now on nothing passes, either way; connections stay open and new ones are silent."""
        self._flowing.clear()

    def heal(self, *, old: bool) -> None:
        """Let packets pass again: with `old` what was held too, as TCP sends again what was lost.

        Without it the connections made until now stay half open for ever.
        """
        if not old:
            with self._lock:
                for link in self._links:
                    link.dead = True
        self._flowing.set()

    def _start(self, target: object, *args: object) -> None:
        assert callable(target)
        threading.Thread(target=target, args=args, name="proxy", daemon=True).start()

    def _accept_forever(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:  # closed
                return
            link = _Link(client)
            with self._lock:
                self._links.append(link)
            self._start(self._connect, link)

    def _connect(self, link: _Link) -> None:
        self._flowing.wait()
        if link.dead:
            return
        link.server = socket.socket(self._family)
        try:
            link.server.connect(self._address)
        except OSError:
            link.close()
            return
        self._start(self._pump, link, link.server, link.client)
        self._pump(link, link.client, link.server)

    def _pump(self, link: _Link, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if not self._passes(link):
                    continue  # swallowed
                if source is link.client and COMMIT in data:
                    link.cutting = self._is_cut()
                elif source is link.server and link.cutting:
                    break
                sink.sendall(data)
        if self._passes(link):
            link.close()

    def _passes(self, link: _Link) -> bool:
        self._flowing.wait()
        return not link.dead

    def _is_cut(self) -> bool:
        with self._lock:
            self._commits += 1
            cut = bool(self.cut_every) and self._commits % self.cut_every == 0
            self.cuts += cut
            return cut
