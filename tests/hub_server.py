"""A small Hugging Face hub on this machine: the few endpoints that fetching and pushing a model use, over real HTTP.

Repositories are folders named `owner/name`. `gated/...` lists its files to everybody and hands out none; `down/...`
answers with an error of the server. What is asked for, and what is pushed, is kept for the tests to look at.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """`asked`: method and path of every request; `pushed`: repository -> path -> bytes; `made`: what was created."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.asked: list[str] = []
        self.made: list[dict[str, Any]] = []
        self.pushed: dict[str, dict[str, bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def commit_of(repo: str) -> str:
    return hashlib.sha1(repo.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Nothing on stderr."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str = "") -> None:
        self.answer(status, **({"X_Error_Code": code, "X_Error_Message": code} if code else {}))

    @property
    def logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def parts(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def found(self, repo: str, revision: str) -> Path | None:
        """The repository's folder, or a refusal."""
        if repo.startswith("down/"):
            self.refuse(503)
        elif not (self.server.root / repo).is_dir():
            self.refuse(401, "RepoNotFound")
        elif revision not in ("main", commit_of(repo)):
            self.refuse(404, "RevisionNotFound")
        else:
            return self.server.root / repo
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.parts()
        if parts == ["api", "whoami-v2"]:
            if self.logged_in:
                self.answer_json({"name": "somebody", "type": "user"})
            else:
                self.refuse(401)
            return
        if parts[:2] == ["api", "models"]:
            repo, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
            folder = self.found(repo, revision)
            if folder is None:
                return
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if what == "revision":
                names = [{"rfilename": str(path.relative_to(folder))} for path in files]
                self.answer_json({"id": repo, "modelId": repo, "sha": commit_of(repo), "siblings": names})
            else:
                self.answer_json(
                    [
                        {
                            "type": "file",
                            "path": str(path.relative_to(folder)),
                            "size": path.stat().st_size,
                            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                        }
                        for path in files
                    ]
                )
            return
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        folder = self.found(repo, revision)
        if folder is None:
            return
        if repo.startswith("gated/"):
            self.refuse(403, "GatedRepo")
        elif not (folder / name).is_file():
            self.refuse(404, "EntryNotFound")
        else:
            body = (folder / name).read_bytes()
            tag = hashlib.sha1(body).hexdigest()
            self.answer(200, body, ETag=f'"{tag}"', X_Repo_Commit=commit_of(repo), Accept_Ranges="bytes")

    def do_POST(self) -> None:
        parts = self.parts()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.logged_in:
            self.refuse(401)
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            self.server.made.append(asked)
            owner = asked.get("organization") or "somebody"
            self.answer_json({"url": f"{self.server.url}/{owner}/{asked['name']}"})
        elif parts == ["api", "validate-yaml"]:
            self.answer_json({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer_json({"files": modes})
        else:
            assert parts[4] == "commit", parts
            repo = "/".join(parts[2:4])
            files = self.server.pushed.setdefault(repo, {})
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = f"{self.server.url}/{repo}/commit/{commit_of(repo)}"
            self.answer_json({"commitUrl": commit, "commitOid": commit_of(repo), "success": True})
