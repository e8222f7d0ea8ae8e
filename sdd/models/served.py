"""A model that a server with OpenAI's interface serves: where it is, its client, and in one line what goes wrong there.

The official client sends, waits and tries again: connections that fail or end, timeouts and the statuses 408, 409, 429
and 5xx, after waits that double up to 8 seconds and are varied at random, or as long as the server asks for. Where the
server is, the command line says; its key is in the environment. Knows nothing of what is asked.
"""

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sdd.errors import UserError
from sdd.untrusted import printable

KEY, JUDGES_KEY = "OPENAI_API_KEY", "JUDGE_API_KEY"
"""The environment variables with the server's key, if it wants one; a judge's server is not shown another's."""
LONGEST = 300
"""Characters of what a server says that are shown."""


@dataclass(frozen=True)
class Server:
    """How a server is asked: at most `concurrency` requests at once, each `retries` times more, `timeout` seconds.

    `group` is the config's group that says so.
    """

    url: str
    concurrency: int = 16
    retries: int = 12
    timeout: float = 300.0
    group: str = "engine"

    @property
    def key(self) -> str:
        """The environment variable with its key."""
        return JUDGES_KEY if self.group == "judge" else KEY

    @property
    def where(self) -> str:
        return f"{self.group}.base_url={self.url}"

    def named(self, model: str | None) -> str:
        """A model as the config names it; a student in training has a name of its own at each time."""
        return "the student" if self.group == "rollouts" else f"{self.group}.model={model}"


def client_of(server: Server, retries: int | None = None) -> Any:
    """The official client; `retries` where it is not to try as often as the server's settings say."""
    if find_spec("openai") is None:
        raise UserError(f"{server.where}: a server is asked by the package openai; run: pip install 'sdd[server]'")
    from openai import OpenAI

    for name in ("httpx", "httpx2"):  # else a line for every request, between the progress bars
        logging.getLogger(name).setLevel(logging.WARNING)
    return OpenAI(
        base_url=server.url,
        api_key=os.environ.get(server.key) or "none",
        max_retries=server.retries if retries is None else retries,
        timeout=server.timeout,
    )


def refusal(error: Exception, server: Server, model: str | None, client: Any, kind: str) -> Exception:
    """One line for whatever came back instead of a `kind` of answer; what is no server's doing, as it is."""
    import openai

    where, said = server.where, said_by(error)
    again = "what is finished is kept, run the same command again"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return UserError(f"{where}: the server refuses the key ({said}); set {server.key} in the environment")
    if isinstance(error, openai.APITimeoutError):
        return UserError(f"{where}: no answer within {server.group}.timeout={server.timeout:g} seconds; {again}")
    if isinstance(error, openai.APIConnectionError):
        return UserError(f"{where}: no server can be reached there ({said}); {again}")
    if isinstance(error, openai.NotFoundError | openai.BadRequestError | openai.UnprocessableEntityError):
        return UserError(f"{where}: the server refuses {server.named(model)} ({said}){_models(client)}")
    if isinstance(error, openai.APIStatusError):
        return UserError(f"{where}: the server gives up ({said}); {again}")
    if not isinstance(error, openai.OpenAIError | ValueError):
        return error
    return UserError(f"{where}: what comes back is no {kind} ({said}); see that the address ends in /v1")


def _models(client: Any) -> str:
    """What the server says that it has."""
    try:
        names = [str(model.id) for model in client.with_options(max_retries=0).models.list()]
    except Exception:
        return ""
    return f"; it has {printable(', '.join(names)[:LONGEST])}" if names else ""


def said_by(error: Exception) -> str:
    """What the server answered, in whatever form, or else what went wrong on the way."""
    response = getattr(error, "response", None)
    text = str(error) if response is None else f"{response.status_code}: {response.text}"
    return printable(" ".join(text.split())[:LONGEST])
