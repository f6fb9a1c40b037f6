"""A hub in this process: repositories with commits, as far as the hub's own client asks for it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stub"


class Hub(ThreadingHTTPServer):
    """`repos`: name -> list of commits, each (sha, {path: content})."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit by its sha, or the newest as main."""
        commits = self.repos.get(repo, [])
        return next((c for c in reversed(commits) if revision in ("main", c[0])), None)


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def say(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, what: str) -> None:
        self.say({"error": what}, status, X_Error_Code=what, X_Error_Message=what)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repos:
                return self.say({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
            self.server.repos[name] = [("0" * 40, {})]
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(name)
            return self.say({"url": f"{self.server.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+).*", self.path)
        if not found or found[1] not in self.server.repos:
            return self.refuse(404, "RepoNotFound")
        if found[2] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.say({"files": files})
        content = dict(self.server.repos[found[1]][-1][1])
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                content[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = hashlib.sha1(body).hexdigest()
        self.server.repos[found[1]].append((sha, content))
        return self.say({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{found[1]}/commit/{sha}"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            commit = self.server.at(found[1], found[2] or "main")
            if commit is None:
                return self.refuse(404, "RepoNotFound" if found[1] not in self.server.repos else "RevisionNotFound")
            siblings = [{"rfilename": name} for name in commit[1]]
            return self.say({"id": found[1], "sha": commit[0], "siblings": siblings, "private": False})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            commit = self.server.at(found[1], found[2])
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in (commit[1] if commit else {}).items()
            ]
            return self.say(files)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            commit = self.server.at(found[1], found[2])
            if commit is None or found[3] not in commit[1]:
                return self.refuse(404, "EntryNotFound")
            content = commit[1][found[3]]
            tag = hashlib.sha1(content).hexdigest()
            return self.say(content, ETag=f'"{tag}"', X_Repo_Commit=commit[0])
        return self.refuse(404, "RepoNotFound")
