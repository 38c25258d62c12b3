"""A small hub on this machine: what huggingface_hub asks for when it uploads a model, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """What the server knows and was sent.

    Attributes:
        url: its address.
        who: what it says of whom the token is.
        refuses: paths that it answers with 403, as a regular expression.
        repositories: files by repository, branch and name.
        private: which repositories are private.
        commits: messages of the commits.
    """

    url: str = ""
    who: dict[str, Any] = field(
        default_factory=lambda: {
            "name": "ann",
            "orgs": [{"name": "apples"}],
            "auth": {"accessToken": {"displayName": "laptop", "role": "write"}},
        }
    )
    refuses: str = "$nothing"
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.hub, self.path.partition("?")[0]
        known = {"/api/whoami-v2": hub.who, "/api/validate-yaml": {"warnings": [], "errors": []}}
        if path.startswith("/objects/"):
            hub.objects[path.rpartition("/")[2]] = body
            self._answer({})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif re.search(hub.refuses, path):
            self._answer({"error": "Forbidden"}, 403)
        elif path in known:
            self._answer(known[path])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(branch|preupload|commit|revision)/(.+))?", path):
            self._of_model(*found.groups(), body)
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            actions = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/objects/{each['oid']}"}}} for each in objects
            ]
            self._answer({"transfer": "basic", "objects": actions})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = hub.repositories.get(found[1], {}).get(found[2], {}).get(found[3])
            if content is None:
                self._answer({"error": "no"}, 404, X_Error_Code="EntryNotFound")
            else:
                self._answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="0" * 40)
        else:
            self._answer({"error": f"{self.command} {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        is_new = name not in self.hub.repositories
        if is_new:
            self.hub.repositories[name] = {"main": {}}
            self.hub.private[name] = asked.get("private", False) or asked.get("visibility") == "private"
        self._answer({"url": f"{self.hub.url}/{name}"}, 200 if is_new else 409)

    def _of_model(self, name: str, what: str | None, branch: str | None, body: bytes) -> None:
        hub = self.hub
        if name not in hub.repositories:
            self._answer({"error": "no"}, 404, X_Error_Code="RepoNotFound")
        elif what in (None, "revision"):
            self._answer({"id": name, "private": hub.private[name], "sha": "0" * 40})
        elif what == "branch":
            hub.repositories[name].setdefault(str(branch), dict(hub.repositories[name]["main"]))
            self._answer({})
        elif what == "preupload":
            files = [
                {"path": file["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        else:
            files = hub.repositories[name][str(branch)]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            self._answer({"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - the names that http.server calls


@contextmanager
def running_hub() -> Generator[Hub]:
    """A hub that runs on a free port until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
