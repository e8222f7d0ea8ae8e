"""A small Hugging Face hub on this machine: the few endpoints that fetching and pushing use, over real HTTP.

Models are folders named `owner/name`, datasets `datasets/owner/name`. `gated/...` lists its files to everybody and
hands out none; `login/...` wants to know who asks before anything; `down/...` answers with an error of the server. What
is asked for, and what is pushed, is kept for the tests to look at. The client reads where the hub and its cache are
when it is imported, so that it runs in a process of its own.
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
from urllib.parse import parse_qs, unquote, urlsplit

from sdd.evaluation.suites import REVISIONS

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


def settings(url: str, cache: Path) -> dict[str, str]:
    """Environment variables of a process whose hub is at `url`."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def commit_of(repo: str) -> str:
    """The one commit of a repository: for a benchmark's data the one that its suite pins."""
    return REVISIONS.get(repo) or hashlib.sha1(repo.encode()).hexdigest()


def entry_of(path: Path, folder: Path) -> dict[str, Any]:
    """What the hub's listings say of a file or folder."""
    is_file = path.is_file()
    return {
        "type": "file" if is_file else "directory",
        "path": str(path.relative_to(folder)),
        "size": path.stat().st_size * is_file,
        "oid": hashlib.sha1(path.read_bytes() if is_file else b"").hexdigest(),
    }


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

    def found(self, kind: str, repo: str, revision: str) -> Path | None:
        """The repository's folder, or a refusal."""
        folder = self.server.root / repo if kind == "models" else self.server.root / kind / repo
        if repo.startswith("down/"):
            self.refuse(503)
        elif repo.startswith("login/"):
            self.refuse(401, "GatedRepo")
        elif not folder.is_dir():
            self.refuse(401, "RepoNotFound")
        elif revision not in ("main", commit_of(repo)):
            self.refuse(404, "RevisionNotFound")
        else:
            return folder
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
        elif parts[0] == "api" and len(parts) < 4:
            self.refuse(404)
        elif parts[0] == "api":
            self.describe(*parts[1:])
        elif parts[0] == "datasets":
            self.hand_out(*parts)
        else:
            self.hand_out("models", *parts)

    def describe(
        self, kind: str, owner: str, name: str, what: str = "revision", revision: str = "main", *below: str
    ) -> None:
        repo = f"{owner}/{name}"
        folder = self.found(kind, repo, revision)
        if folder is None:
            return
        if what == "revision":
            names = [
                {"rfilename": str(path.relative_to(folder))} for path in sorted(folder.rglob("*")) if path.is_file()
            ]
            self.answer_json({"id": repo, "modelId": repo, "sha": commit_of(repo), "siblings": names})
            return
        assert what == "tree", what
        start = folder.joinpath(*below)
        if start.is_dir():
            found = start.rglob("*") if "recursive=true" in self.path.lower() else start.glob("*")
            self.answer_json([entry_of(path, folder) for path in sorted(found)])
        else:
            self.refuse(404, "EntryNotFound")

    def hand_out(self, kind: str, owner: str, name: str, resolve: str, revision: str, *below: str) -> None:
        assert resolve == "resolve", self.path
        repo = f"{owner}/{name}"
        folder = self.found(kind, repo, revision)
        if folder is None:
            return
        path = folder.joinpath(*below)
        if repo.startswith("gated/"):
            self.refuse(403, "GatedRepo")
        elif not path.is_file():
            self.refuse(404, "EntryNotFound")
        else:
            body = path.read_bytes()
            tag = f'"{hashlib.sha1(body).hexdigest()}"'
            common = {"ETag": tag, "X_Repo_Commit": commit_of(repo), "Accept_Ranges": "bytes"}
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1 if last else len(body), len(body))
                common["Content_Range"] = f"bytes {first}-{end - 1}/{len(body)}"
                self.answer(206, body[int(first) : end], **common)
            else:
                self.answer(200, body, **common)

    def describe_some(self, sent: bytes, kind: str, owner: str, name: str, revision: str) -> None:
        """Entries of the paths that are asked for, as far as they are there."""
        folder = self.found(kind, f"{owner}/{name}", revision)
        if folder is not None:
            asked = json.loads(sent)["paths"] if sent[:1] == b"{" else parse_qs(sent.decode())["paths"]
            here = [folder / path for path in asked if path and (folder / path).exists()]
            self.answer_json([entry_of(path, folder) for path in here])

    def do_POST(self) -> None:
        parts = self.parts()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if len(parts) > 4 and parts[4] == "paths-info":
            self.describe_some(body, *parts[1:4], parts[5])
        elif not self.logged_in:
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
