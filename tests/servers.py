"""Servers on this machine, for what fetches over the network: pictures, canaries, names."""

from __future__ import annotations

import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers by the path; a path that nobody gave an answer is 404."""

    server: WebServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked[path] += 1
        self.server.was_asked.set()
        self.server.user_agents.add(self.headers.get("User-Agent", ""))
        answer = self.server.answers.get(path)
        try:
            if answer is None:
                self.send(404)
            else:
                answer(self)
        except OSError:
            # The client had enough.
            return

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


class WebServer(ThreadingHTTPServer):
    """Counts what it is asked; `stopped` ends answers that would go on for ever."""

    daemon_threads = True

    def __init__(self, host: str, answers: Mapping[str, Answer], port: int = 0) -> None:
        super().__init__((host, port), Handler)
        self.answers = dict(answers)
        self.asked: Counter[str] = Counter()
        self.user_agents: set[str] = set()
        self.was_asked = threading.Event()
        self.stopped = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """Serve in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        if isinstance(server, WebServer):
            server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Names:
    """What a name server says: for each name the address of each answer, the last one repeated."""

    addresses: Mapping[str, list[str]]
    asked: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._answers = {
            name: chain(given, repeat(given[-1])) for name, given in self.addresses.items()
        }

    def answer(self, data: bytes) -> bytes:
        query = dns.message.from_wire(data)
        reply = dns.message.make_response(query)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        if name not in self._answers:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        elif dns.rdatatype.to_text(question.rdtype) == "A":
            self.asked[name] += 1
            reply.answer.append(
                dns.rrset.from_text(question.name, 0, "IN", "A", next(self._answers[name]))
            )
        reply.flags |= dns.flags.RA
        return reply.to_wire()


def name_server(names: Names) -> socketserver.UDPServer:
    """Return a DNS server on a free port."""

    class Question(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, reply = self.request
            reply.sendto(names.answer(data), self.client_address)

    return socketserver.ThreadingUDPServer(("127.0.0.1", 0), Question)
