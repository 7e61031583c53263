"""A model hub on loopback: the part of Hugging Face's HTTP interface that an upload uses. It keeps the files.

Large files go by LFS's batch interface, as there; what is committed is what the client sent, checked by its sha256.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class FakeHub:
    """Keeps repositories (name -> private) and their files, for callers with the one right token."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = urlsplit(self.path).path
        if not path.endswith("validate-yaml") and self.headers.get("authorization") != f"Bearer {self.owner.token}":
            self._answer(401, {"error": "Invalid credentials"})
        elif path.endswith("validate-yaml"):
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] > 4096 else "regular"} for f in files]
            self._answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._upload(one) for one in json.loads(body)["objects"]]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.split("/api/models/")[1].split("/commit/")[0], body)
        else:
            self._answer(404, {"error": path})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        self.owner.blobs[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        name = urlsplit(self.path).path.removeprefix("/api/models/")
        if self.headers.get("authorization") != f"Bearer {self.owner.token}":
            self._answer(401, {"error": "Invalid credentials"})
        elif name in self.owner.repositories:
            self._answer(200, {"id": name, "sha": "0" * 40, "siblings": []})
        else:
            self._answer(404, {"error": "Repository not found"})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's.
        """Says nothing."""

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        self.owner.repositories[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._answer(200, {"url": f"{self.owner.address}/{name}"})

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.owner.address}/blobs/{one['oid']}"
        return {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.owner.files.setdefault(repository, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.owner.blobs[value["oid"]]
        url = f"{self.owner.address}/{repository}/commit/{'0' * 40}"
        self._answer(200, {"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None})

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
