"""A small hub on loopback: the part of the Hugging Face hub's HTTP interface that d2i uses.

It keeps every commit of a repository as its files, refuses what the real one refuses, and records
each request. Large files come by git-lfs, as without the library's faster storage (hf_xet).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
# Some of the identifiers that the hub lists, and its rule for base models.
LICENCES = {"apache-2.0", "mit", "creativeml-openrail-m", "openrail++", "other", "unknown"}
_MODEL = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repository:
    """A repository: its visibility, and the files of each commit."""

    is_private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"


class Handler(BaseHTTPRequestHandler):
    """Answers by method and path; what has no answer is 404."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        self.server.requests.append(f"{self.command} {path}")
        for place, status in self.server.refused.items():
            if path.startswith(place):
                self.send(status, {"error": f"refused by the test with {status}"})
                return
        is_upload = path.startswith("/lfs/")
        if not is_upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            reason = "Invalid credentials in Authorization header"
            self.send(401, {"error": reason}, X_Error_Message=reason)
            return
        for pattern, answer in _ANSWERS.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                answer(self, body, *found.groups())
                return
        self.send(404, {"error": "Not found"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def send(self, status: int, answer: Any = None, **headers: str) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None:
            self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


class Hub(ThreadingHTTPServer):
    """The hub.

    Attributes:
        repositories: By name.
        requests: Method and path of each request.
        refused: Status codes by the start of a path, for tests of refusals.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refused: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables with which the hub's library uses this hub, and its own cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }


def _create(handler: Handler, body: bytes) -> None:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if name in handler.server.repositories:
        handler.send(409, {"error": "You already created this model repo"})
        return
    handler.server.repositories[name] = Repository(asked["visibility"] == "private")
    handler.send(200, {"url": f"{handler.server.url}/{name}"})


def _show(handler: Handler, body: bytes, name: str) -> None:
    del body
    if found := handler.repository(name):
        siblings = [{"rfilename": path} for path in sorted(found.files)]
        described = {"id": name, "sha": found.head, "private": found.is_private}
        handler.send(200, described | {"siblings": siblings, "tags": []})


def _list_files(handler: Handler, body: bytes, name: str) -> None:
    del body
    if found := handler.repository(name):
        rows = [
            {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
            for path, data in sorted(found.files.items())
        ]
        handler.send(200, rows)


def _validate(handler: Handler, body: bytes) -> None:
    values = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
    errors = []
    if values.get("license") not in LICENCES:
        errors.append({"message": '"license" must be one of [apache-2.0, mit, …]'})
    if "base_model" in values and not _MODEL.fullmatch(values["base_model"]):
        errors.append({"message": '"base_model" is not valid. Use a model id'})
    handler.send(400 if errors else 200, {"errors": errors, "warnings": []})


def _preupload(handler: Handler, body: bytes, name: str) -> None:
    found = handler.repository(name)
    if found is None:
        return
    files = []
    for asked in json.loads(body)["files"]:
        is_large = asked["path"].endswith(".safetensors")
        there = found.files.get(asked["path"])
        files.append(
            {
                "path": asked["path"],
                "uploadMode": "lfs" if is_large else "regular",
                "shouldIgnore": False,
                "oid": None if there is None else (_sha256 if is_large else _git_hash)(there),
            }
        )
    handler.send(200, {"files": files})


def _batch(handler: Handler, body: bytes, name: str) -> None:
    del name
    objects = []
    for asked in json.loads(body)["objects"]:
        action = {"upload": {"href": f"{handler.server.url}/lfs/{asked['oid']}"}}
        is_there = asked["oid"] in handler.server.objects
        objects.append(asked | ({} if is_there else {"actions": action}))
    handler.send(200, {"transfer": "basic", "objects": objects})


def _put(handler: Handler, body: bytes, oid: str) -> None:
    if _sha256(body) != oid:
        handler.send(400, {"error": "sha256 differs"})
        return
    handler.server.objects[oid] = body
    handler.send(200)


def _commit(handler: Handler, body: bytes, name: str) -> None:
    found = handler.repository(name)
    if found is None:
        return
    files = dict(found.files)
    for line in body.splitlines():
        part = json.loads(line)
        value = part["value"]
        if part["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif part["key"] == "lfsFile":
            files[value["path"]] = handler.server.objects[value["oid"]]
        elif part["key"] == "deletedFile":
            del files[value["path"]]
    found.commits.append(files)
    url = f"{handler.server.url}/{name}/commit/{found.head}"
    handler.send(200, {"success": True, "commitUrl": url, "commitOid": found.head})


def _resolve(handler: Handler, body: bytes, name: str, path: str) -> None:
    del body
    found = handler.repository(name)
    if found is None:
        return
    if path not in found.files:
        handler.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        return
    data = found.files[path]
    handler.send(200, data, ETag=f'"{_sha256(data)}"', X_Repo_Commit=found.head)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ANSWERS: dict[str, Callable[..., None]] = {
    "POST /api/repos/create": _create,
    rf"GET /api/models/{_NAME}/tree/\w+": _list_files,
    "POST /api/validate-yaml": _validate,
    rf"GET /api/models/{_NAME}(?:/revision/main)?": _show,
    rf"POST /api/models/{_NAME}/preupload/main": _preupload,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": _batch,
    r"PUT /lfs/([0-9a-f]{64})": _put,
    rf"POST /api/models/{_NAME}/commit/main": _commit,
    rf"(?:HEAD|GET) /{_NAME}/resolve/[\w]+/(.+)": _resolve,
}
