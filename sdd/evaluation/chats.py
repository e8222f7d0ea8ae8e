"""lm-eval's requests as this project tokenizes: chats as in training, words of rows that stay words.

A request is strings in which a row's words and the template's stand side by side. So the words are masked
(`sdd.models.control`) before they come together, and what is masked is told apart when it is tokenized. Goes before a
model class of lm-eval's among the bases of a class; who computes is that class's business.
"""

import dataclasses
from typing import Any

from sdd.errors import UserError
from sdd.models.chats import accepted
from sdd.models.control import control_of
from sdd.models.rendering import render_chat

_CUT = "\ue010"
"""Where a begun answer ends; a template goes on behind it."""


class Chats:
    """What is mixed into a model class of lm-eval's."""

    is_chat = True
    """Whether contexts come from `apply_chat_template`, their words masked there."""
    own_ending = ""
    """The token that ends an answer, where tasks of this project put it there."""
    tokenizer: Any

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in training; lm-eval drops a system prompt that the template refuses."""
        turns = accepted(self.tokenizer, chat_history)
        if add_generation_prompt:
            return render_chat(self.tokenizer, turns, add_generation_prompt=True)
        before, last = turns[:-1], turns[-1]
        text = render_chat(self.tokenizer, [*before, {**last, "content": f"{last['content']}{_CUT}"}])
        head, cut, _ = text.rpartition(_CUT)
        if not cut:
            raise UserError("the chat template drops the beginning of an answer that a task gives")
        return head

    def _masked(self, requests: list[Any]) -> list[Any]:
        """The requests with the words of rows masked: contexts outside of chats, and continuations."""
        control = control_of(self.tokenizer)
        masked = []
        for request in requests:
            context, *rest = request.args
            if not self.is_chat:
                context = control.masked(context)
            if rest and isinstance(rest[0], str):
                words = rest[0].removesuffix(self.own_ending)
                rest[0] = control.masked(words) + rest[0][len(words) :]
            masked.append(dataclasses.replace(request, arguments=(context, *rest)))
        return masked

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(self._masked(requests), disable_tqdm=disable_tqdm)  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(self._masked(requests), disable_tqdm=disable_tqdm)  # type: ignore[misc]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().generate_until(self._masked(requests), disable_tqdm=disable_tqdm)  # type: ignore[misc]

    def ids_of(self: Any, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids as HFLM's `tok_encode` has them: the tokenizer's own first token, unless the text has it."""
        if add_special_tokens is None:
            begins = text.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not begins and self.add_bos_token is not False
        ids: list[int] = control_of(self.tokenizer).encode(text, add_special_tokens)
        return ids


class ChatsElsewhere(Chats):
    """For model classes of lm-eval's that compute elsewhere: every text is tokenized here, and asked for as ids."""

    def tok_encode(
        self, string: Any, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> Any:
        """Ids of a text; of several, which are the prompts of answers, the ids of each."""
        if not isinstance(string, str):
            return [self.ids_of(one) for one in string]
        ids = self.ids_of(string, add_special_tokens)
        return ids[-left_truncate_len:] if left_truncate_len else ids
