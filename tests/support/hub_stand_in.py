"""A stand-in of the hub's HTTP interface on this machine: repositories, commits and reading, for `huggingface_hub`."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


@dataclass
class Hub:
    """Repositories by name, each path -> content, and the commits that were made."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """Of a repository other than ``main``, by its name and the branch."""
    commits: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)

    def files(self, repo_id: str, revision: str) -> dict[str, bytes] | None:
        """What a branch or the commit of a branch holds; None where there is no such revision."""
        branches = {branch: files for (name, branch), files in self.branches.items() if name == repo_id}
        branches["main"] = self.repositories[repo_id]
        commits = {self.commit(files): files for files in branches.values()}
        return {**commits, **branches}.get(revision)

    def revision(self, repo_id: str) -> str:
        return self.commit(self.repositories[repo_id])

    def commit(self, files: dict[str, bytes]) -> str:
        content = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()})
        return hashlib.sha1(f"{content}{len(self.commits)}".encode()).hexdigest()


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Run the server until the ``with`` ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: Any) -> None:
            pass

        def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, document: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(document).encode(), Content_Type="application/json")

        def missing(self, code: str) -> None:
            self.answer(404, b"{}", X_Error_Code=code, X_Error_Message=f"{code} here")

        def do_POST(self) -> None:
            hub.tokens.append(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = urlparse(self.path).path.strip("/").split("/")
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                repo_id = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                existed = repo_id in hub.repositories
                hub.repositories.setdefault(repo_id, {})
                self.answer_json({"url": f"{hub.url}/{repo_id}"}, 409 if existed else 200)
                return
            if len(parts) < 5:  # such as the check of a card's metadata
                self.answer_json({"errors": [], "warnings": []})
                return
            repo_id, action = f"{parts[2]}/{parts[3]}", parts[4]
            if action == "preupload":
                files = json.loads(body)["files"]
                self.answer_json(
                    {
                        "files": [
                            {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for one in files
                        ]
                    }
                )
            elif action == "commit":
                lines = [json.loads(line) for line in body.splitlines()]
                for line in lines:
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repositories[repo_id][line["value"]["path"]] = content
                    elif line["key"] == "deletedFile":
                        del hub.repositories[repo_id][line["value"]["path"]]
                summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
                hub.commits.append({"repo": repo_id, "summary": summary})
                oid = hub.revision(repo_id)
                self.answer_json(
                    {"commitUrl": f"{hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True}
                )
            else:
                self.missing("Unknown")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                self.info(f"{parts[2]}/{parts[3]}", "/".join(parts[4:]))
            elif len(parts) > 4 and parts[2] == "resolve":
                self.file(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
            else:
                self.missing("Unknown")

        def info(self, repo_id: str, rest: str) -> None:
            if repo_id not in hub.repositories:
                self.missing("RepoNotFound")
                return
            asked = rest.split("/")[1] if rest.startswith(("tree/", "revision/")) else "main"
            files = hub.files(repo_id, asked)
            if files is None:
                self.missing("RevisionNotFound")
                return
            if rest.startswith("tree"):
                folder = "/".join(rest.split("/")[2:])
                files = {name: data for name, data in files.items() if name.startswith(folder)}
                if folder and not files:
                    self.missing("EntryNotFound")
                    return
                self.answer_json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": "0"}
                        for name, data in files.items()
                    ]
                )
                return
            siblings = [{"rfilename": name} for name in files]
            self.answer_json({"id": repo_id, "sha": hub.commit(files), "siblings": siblings})

        def file(self, repo_id: str, revision: str, name: str) -> None:
            if repo_id not in hub.repositories:
                self.missing("RepoNotFound")
                return
            files = hub.files(repo_id, revision)
            if files is None:
                self.missing("RevisionNotFound")
                return
            if name not in files:
                self.missing("EntryNotFound")
                return
            tag = hashlib.sha1(files[name]).hexdigest()
            self.answer(200, files[name], ETag=f'"{tag}"', X_Repo_Commit=hub.commit(files))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
