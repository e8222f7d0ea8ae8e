"""A server with OpenAI's interface for tests: real HTTP, and answers that a function makes of what is asked."""

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, content."""


class ModelServer(ThreadingHTTPServer):
    """`answer` is called with a request's authorization and body, one at a time; `asked` are these. It says which
    models it has where it `lists` them."""

    daemon_threads = True
    lists = False

    def __init__(self, answer: Callable[[str | None, dict[str, Any]], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.answer, self.asked, self.one = answer, list[tuple[str | None, dict[str, Any]]](), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Asked(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        asked = self.headers["Authorization"], json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        with server.one:
            server.asked.append(asked)
            answer = server.answer(*asked)
        self._send(*answer)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
            self.end_headers()
            self.wfile.write(content)

    def do_GET(self) -> None:
        if not getattr(self.server, "lists", False):
            self.send_error(404)
            return
        self._send(200, {}, b'{"object": "list", "data": []}')

    def log_message(self, *words: Any) -> None:
        pass


def said(text: Any, finish: str = "stop") -> bytes:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(answer).encode()


def refused(message: str, **more: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", **more}}).encode()
