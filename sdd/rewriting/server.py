"""An engine that asks a server with OpenAI's interface: vLLM, SGLang, `transformers serve`, llama.cpp, or another.

How it is reached, and what is tried again, is `sdd.models.served`'s business.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from threading import Event
from typing import Any

from sdd.errors import UserError
from sdd.models.chats import chat_messages, chat_prompt_ids, completion_prompt, task_text
from sdd.models.checkpoints import Checkpoint
from sdd.models.served import Server, client_of, refusal, said_by
from sdd.rewriting.engines import Completion, Place, Request, sampling, seed_of

ENDPOINTS = ("chat", "completions")
TOO_LONG = ("context_length_exceeded", "maximum context length", "maximum model length", "context size")
"""How servers say that a prompt has more tokens than their model reads."""


class OpenAIEngine:
    """Rewrites by the model that a server calls `model`, which must be the teacher that the config names.

    With `endpoint="chat"` the server's own chat template is used; with "completions" the teacher's is, here. Greedy
    unless `temperature` is above 0; then each try has a seed of its own, which servers obey as far as they can.
    """

    kind = "openai"
    asks_alone = True
    asked_by, group = "engine=openai", "engine"
    keeps_space = False
    """Whether what stands around an answer's words is a part of it."""
    also: Mapping[str, Any] = {}
    """What a request says besides."""

    def __init__(
        self,
        model: str | None = None,
        endpoint: str = "chat",
        max_new_tokens: int = 256,
        max_prompt_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        tries: int = 1,
        seed: int = 0,
        base_url: str | None = None,
        concurrency: int = Server.concurrency,
        retries: int = Server.retries,
        timeout: float = Server.timeout,
    ) -> None:
        if endpoint not in ENDPOINTS:
            raise UserError(f"engine.endpoint={endpoint} is unknown; choose one of {', '.join(ENDPOINTS)}")
        self.model, self.endpoint = model, endpoint
        self.max_new_tokens, self.max_prompt_tokens = max_new_tokens, max_prompt_tokens
        self.temperature, self.top_p, self.tries, self.seed = temperature, top_p, tries, seed

    def spec(self) -> dict[str, Any]:
        """Part of the rewrites' key: which server answers, and how it is asked, is none of it."""
        if not self.model:
            raise UserError("engine=openai needs the name that the server gives the model; add engine.model=NAME")
        return {
            "kind": self.kind,
            "model": self.model,
            "endpoint": self.endpoint,
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            **sampling(self.temperature, self.top_p, self.tries, self.seed),
        }

    def check(self, place: Place) -> None:
        """Have the server say one word, so that a wrong address, key or name is known before any work."""
        client = self._client(place, retries=1)
        try:
            self._answer(client, [{"role": "user", "content": "Hello"}] if self.endpoint == "chat" else "Hello", 1, 0)
        except Exception as error:
            raise self._refusal(error, place, client) from None
        finally:
            client.close()

    def open(self, checkpoint: Checkpoint, dtype: str, system_prompt: str | None, place: Place) -> None:
        """Only the teacher's tokenizer is loaded here; in which dtype it computes is its server's business."""
        self.tokenizer, self.system_prompt, self.place = checkpoint.tokenizer(), system_prompt, place

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions as they come; prompts that begin alike are asked one after another, which caches like.

        After a failure nothing more is asked; what was on its way, and is paid for, comes before it is told.
        """
        asked = []
        for request in requests:
            if (prompt := self._prompt(request)) is None:
                yield Completion(request.id, "", "too_long")
            else:
                asked.append((request, prompt))  # made here: a tokenizer serves one thread at a time
        asked.sort(key=lambda pair: task_text(pair[0].prompt, pair[0].before))
        client, failed = self.client, Event()
        with ThreadPoolExecutor(self.place.at_once, thread_name_prefix="server") as pool:
            futures = [pool.submit(self._completed, client, failed, *pair) for pair in asked]
            try:
                for future in as_completed(futures):
                    if future.exception() is None and (completion := future.result()) is not None:
                        yield completion
            finally:
                failed.set()  # where it is left early, too
        for future in futures:
            future.result()

    def _prompt(self, request: Request) -> Any:
        """Messages, or for the endpoint "completions" a text; None where it has too many tokens."""
        words = self.tokenizer, request.prompt, self.system_prompt, request.before
        if len(chat_prompt_ids(*words)) > self.max_prompt_tokens:
            return None
        return chat_messages(*words) if self.endpoint == "chat" else completion_prompt(*words)

    def _limit(self, request: Request) -> int:
        """Tokens of its answer at most."""
        return self.max_new_tokens

    def _completed(self, client: Any, failed: Event, request: Request, prompt: Any) -> Completion | None:
        """None where another has failed before it is asked."""
        if failed.is_set():
            return None
        try:
            text, finish, tokens = self._answer(client, prompt, self._limit(request), seed_of(self.seed, request))
        except Exception as error:
            if getattr(error, "status_code", None) == 400 and any(words in said_by(error) for words in TOO_LONG):
                return Completion(request.id, "", "too_long")
            failed.set()
            raise self._refusal(error, self.place, client) from None
        return Completion(request.id, text if self.keeps_space else text.strip(), finish, tokens)

    def _answer(self, client: Any, prompt: Any, limit: int, seed: int) -> tuple[str, str, tuple[int, ...]]:
        """(text, "stop" or "length", token ids where they are asked for and given) of one request."""
        settings: dict[str, Any] = {"model": self.model, "max_tokens": limit, "temperature": self.temperature}
        settings |= self.also
        if self.temperature > 0:
            settings |= {"top_p": self.top_p, "seed": seed}
        if self.endpoint == "chat":
            response = client.chat.completions.create(messages=prompt, **settings)
        else:
            response = client.completions.create(prompt=prompt, **settings)
        try:
            (choice,) = response.choices
            text, finish = choice.message.content if self.endpoint == "chat" else choice.text, choice.finish_reason
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"{response}") from None
        tokens = (getattr(choice, "token_ids", None) or ()) if self.also else ()
        if not isinstance(text, str | None) or not isinstance(finish, str) or not all(type(id) is int for id in tokens):
            raise ValueError(f"{choice}")
        whole = (text or "").encode("utf-8", "replace").decode()  # half a character is none
        return whole, "stop" if finish == "stop" else "length", tuple(tokens)

    @cached_property
    def client(self) -> Any:
        return self._client(self.place)

    def _client(self, place: Place, retries: int | None = None) -> Any:
        if place.server is None:
            raise UserError(
                f"{self.asked_by} asks a server; say where on the command line: {self.group}.base_url=http://HOST/v1"
            )
        return client_of(place.server, retries)

    def _refusal(self, error: Exception, place: Place, client: Any) -> Exception:
        assert place.server is not None
        kind = "chat completion" if self.endpoint == "chat" else "completion"
        return refusal(error, place.server, self.model, client, kind)
