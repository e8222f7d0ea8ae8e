"""An evaluation by a server with OpenAI's interface: lm-eval's own model of its endpoint `completions`.

Chats are rendered and tokenized here and sent as token ids, so that a server answers what a model in this process would
be asked. Likelihoods go by `echo` and `logprobs`: the server says how likely it finds the tokens of a prompt, which not
every server does; what lacks is refused, where lm-eval would take it for a likelihood of 1. Which model a server runs
can only be asked, not verified.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

from sdd.errors import UserError
from sdd.evaluation.chats import ChatsElsewhere
from sdd.models.chats import sent_as_text
from sdd.models.control import control_of, is_masked
from sdd.models.served import Server, client_of, refusal, said_by
from sdd.untrusted import printable

log = logging.getLogger(__name__)

PACKAGES = ("aiohttp", "requests", "tenacity")
"""What lm-eval's model of a server is made with."""
PROBE = "The quick brown fox jumps over the lazy dog."
AGAIN = "finished tasks are kept, run the same command again"


def check(server: Server | None, model: str, prompt_ids: bool, tokenizer: Any, likelihoods: Sequence[str]) -> None:
    """Have the server say one word, so that a wrong address, key or name is known before any work.

    `likelihoods` are the tasks that need those, which the word then comes with. Refuses a server whose tokens of the
    prompt are others than the tokenizer's.
    """
    if server is None:
        where = "evaluation.base_url=http://HOST/v1"
        raise UserError(f"evaluation.backend=server asks a server; say where on the command line: {where}")
    if lacking := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"evaluation.backend=server needs the package {lacking[0]}; run: pip install 'sdd[server]'")
    if likelihoods and not prompt_ids:
        raise UserError(
            f"evaluation.prompt_ids=false: {likelihoods[0]} goes by likelihoods of token ids; leave prompt_ids out, or "
            "name other evaluation.tasks"
        )
    ids = control_of(tokenizer).encode(PROBE, add_special_tokens=True)
    client = client_of(server, retries=1)

    def asked(prompt: Any) -> Any:
        echoed = {"echo": True, "logprobs": 1} if likelihoods else {}
        return client.completions.create(model=model, prompt=prompt, max_tokens=1, temperature=0, **echoed)

    try:
        answer = asked([ids] if prompt_ids else PROBE)
        (choice,) = answer.choices
        if not isinstance(choice.text, str):
            raise ValueError(f"{choice}")
    except Exception as error:
        if prompt_ids and getattr(error, "status_code", None) in (400, 422):
            try:
                client.completions.create(model=model, prompt=PROBE, max_tokens=1, temperature=0)
            except Exception:
                pass  # it is not the ids
            else:
                raise UserError(
                    f"{server.where}: the server takes no token ids ({said_by(error)}); add evaluation.prompt_ids=false"
                ) from None
        unread = isinstance(error, AttributeError | TypeError | ValueError)
        raise refusal(ValueError(f"{error}") if unread else error, server, model, client, "completion") from None
    finally:
        client.close()
    read = getattr(answer.usage, "prompt_tokens", None)
    if read is not None and read != len(ids):
        raise UserError(
            f"{server.where}: evaluation.model={model} reads {read} tokens where the model's tokenizer makes "
            f"{len(ids)}; it serves another model"
        )
    if likelihoods:
        try:
            likelihood(choice.model_dump(), len(ids), 1)
        except ValueError as error:
            raise UserError(
                f"{server.where}: the server gives no likelihoods of a prompt ({error}), by which {likelihoods[0]} "
                "goes; choose one that answers echo and logprobs, as vLLM's does, or name other evaluation.tasks"
            ) from None


def likelihood(choice: dict[str, Any], length: int, context: int) -> tuple[float, bool]:
    """(log-likelihood, whether greedy decoding gives it) of a prompt's tokens from `context` to `length`, of an answer
    that echoes the prompt. A `ValueError` where they are not all there."""
    given = choice.get("logprobs") or {}
    values = (given.get("token_logprobs") or [])[context:length]
    best = (given.get("top_logprobs") or [])[context:length]
    if len(values) != length - context or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{len(values)} of {length - context} tokens")
    if len(best) != len(values) or not all(best):
        raise ValueError("not what is most likely")
    greedy = all(value == max(top.values()) for value, top in zip(values, best, strict=True))
    return float(sum(values)), greedy


def _only_the_first(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Of requests that fail together one is told of; the others, which lm-eval leaves alone, print no tracebacks."""
    if "never retrieved" not in context["message"]:
        loop.default_exception_handler(context)


@cache
def _model() -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.models.utils import postprocess_generated_text

    class ServerChats(ChatsElsewhere, LocalCompletionsAPI):
        """lm-eval's own model of a server, whose answers end at the stop strings of their task whatever it does."""

        lengths: Sequence[int] = ()

        def tok_encode(self, string: Any, *args: Any, **named: Any) -> Any:
            ids = super().tok_encode(string, *args, **named)
            if not isinstance(string, str):
                self.lengths = [len(row) for row in ids]
            return ids

        def create_message(self, messages: Any, generate: bool = False) -> Any:
            if self.tokenized_requests:
                return messages
            (text,) = messages
            return sent_as_text(self.tokenizer, text)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            self.lengths = ()
            with self.told():
                answers = super().generate_until(requests, disable_tqdm)
            if self.lengths:
                for length, request in zip(self.lengths, requests, strict=False):
                    warn_of_cut(length, self.max_length - request.args[1].get("max_gen_toks", self._max_gen_toks))
            if self.tokenized_requests is False and any(is_masked(request.args[0]) for request in requests):
                log.warning("control tokens in the words of rows: as text they are sent as private characters")
            return [
                postprocess_generated_text(answer, request.args[1].get("until"), None)
                for request, answer in zip(requests, answers, strict=True)
            ]

        def _loglikelihood_tokens(self, requests: list[Any], **named: Any) -> Any:
            for _, context, continuation in requests:
                warn_of_cut(len(context) + len(continuation), self.max_length)
            with self.told():
                return list(super()._loglikelihood_tokens(requests, **named))

        async def get_batched_requests(self, *args: Any, **named: Any) -> Any:
            asyncio.get_running_loop().set_exception_handler(_only_the_first)
            return await super().get_batched_requests(*args, **named)

        @staticmethod
        def parse_logprobs(outputs: Any, tokens: Any = None, ctxlens: Any = None, **_: Any) -> Any:
            choices = [
                choice
                for output in (outputs if isinstance(outputs, list) else [outputs])
                for choice in sorted(output["choices"], key=lambda choice: choice["index"])
            ]
            rows = zip(choices, tokens, ctxlens, strict=True)
            return [likelihood(choice, len(ids), context) for choice, ids, context in rows]

        @contextmanager
        def told(self) -> Iterator[None]:
            """What goes wrong on the way, as one line."""
            import aiohttp
            import requests

            try:
                yield
            except (TimeoutError, aiohttp.ClientError, requests.RequestException, OSError) as error:
                status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", "")
                said = printable(" ".join(f"{status} {type(error).__name__}".split()))
                raise UserError(f"{self.where}: the server gives up ({said}); {AGAIN}") from None
            except (KeyError, TypeError, ValueError) as error:
                said = printable(f"{type(error).__name__}: {error}"[:200])
                raise UserError(f"{self.where}: what comes back is no completion ({said}); {AGAIN}") from None

    return ServerChats


def warn_of_cut(length: int, room: int) -> None:
    """What HFLM says of a prompt that is cut, in its name."""
    if length > room:
        logger = logging.getLogger("lm_eval.models.huggingface")
        logger.warning("Truncating %d tokens from the left of %d", length - room, length)


def by_server(server: Server, model: str, prompt_ids: bool, config: Any, tokenizer: Any) -> Any:
    """The model that a server calls `model`; config and tokenizer are its checkpoint's here."""
    from lm_eval.models.utils import resolve_max_length

    logging.getLogger("lm_eval.models.api_models").setLevel(logging.CRITICAL)  # every failed try, whole answers
    language_model = _model()(
        model=model,
        base_url=f"{server.url.rstrip('/')}/completions",
        tokenizer_backend="None",  # else it opens one itself, by name
        add_bos_token=None,
        num_concurrent=server.concurrency,
        max_retries=server.retries + 1,
        timeout=max(1, round(server.timeout)),
        max_length=resolve_max_length(config, tokenizer),
    )
    language_model.where = server.where
    language_model.tokenizer, language_model.tokenizer_backend = tokenizer, "huggingface"
    language_model.tokenized_requests = prompt_ids
    return language_model
