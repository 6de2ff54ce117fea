"""Local servers for tests of fetching: HTTP, TLS, DNS and a proxy."""

from __future__ import annotations

import base64
import http.client
import shutil
import socket
import socketserver
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Looks up the answer by path; a path without an answer is 404."""

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
            # The client closed the connection.
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
    """Counts requests by path; `stopped` ends answers that would go on forever."""

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
    """Answers of a DNS server: for each name the IP of each answer, the last one repeated."""

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


def self_made_certificate(directory: Path, name: str) -> Path:
    """Write a self-signed certificate of a host, and its key, into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = directory / f"{name}.pem"
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path


def secured(server: WebServer, certificate: Path) -> WebServer:
    """Wrap the socket of a server in TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    # The handshake runs in the thread of the request: here it would block all others.
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    return server


class ProxyHandler(BaseHTTPRequestHandler):
    """A proxy like Smokescreen: it resolves the names and decides which are forbidden."""

    server: ProxyServer

    def do_CONNECT(self) -> None:
        place = self._place(self.path)
        if place is None:
            return
        with socket.create_connection(place) as target:
            self.send_response(200, "Connection established")
            self.end_headers()
            back = threading.Thread(target=_pump, args=(target, self.connection), daemon=True)
            back.start()
            _pump(self.connection, target)
            back.join()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        place = self._place(f"{parts.hostname}:{parts.port or 80}")
        if place is None:
            return
        target = http.client.HTTPConnection(*place)
        kept = {k: v for k, v in self.headers.items() if not k.lower().startswith("proxy-")}
        target.request("GET", f"{parts.path}?{parts.query}", headers=kept)
        answer = target.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        shutil.copyfileobj(answer, self.wfile)
        target.close()

    def _place(self, netloc: str) -> tuple[str, int] | None:
        """Return the target of a name, or answer that it is unknown or forbidden."""
        self.server.asked[netloc] += 1
        if self.headers.get("Proxy-Authorization") != self.server.login:
            self._refuse(407, "no or wrong login")
        elif netloc in self.server.forbidden:
            self._refuse(407, "forbidden by the rules")
        elif netloc not in self.server.places:
            self._refuse(502, "no such host")
        else:
            return self.server.places[netloc]
        return None

    def _refuse(self, status: int, why: str) -> None:
        self.send_response(status)
        self.send_header("X-Smokescreen-Error", why)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


class ProxyServer(ThreadingHTTPServer):
    """Forwards `HOST:PORT` to local servers, for clients that send the login."""

    daemon_threads = True

    def __init__(self, login: str, places: Mapping[str, tuple[str, int]], *forbidden: str) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.login = f"Basic {base64.b64encode(login.encode()).decode()}"
        self.places = places
        self.forbidden = forbidden
        self.asked: Counter[str] = Counter()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
