"""A student in training, whose answers a server writes: prompts as token ids go there, answers as token ids come back.

vLLM's server takes ids and gives them. `transformers serve` takes text and gives text, which is tokenized here in its
place behind the prompt: where a model said what its tokenizer would not have made of the same words, the tokens differ
from those that it said, and control tokens among them are lost. How a server comes by the student is not known here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sdd.errors import UserError
from sdd.forward.decoding import Ending
from sdd.models.chats import end_of_turn, sent_as_text
from sdd.models.control import control_of, tokenized
from sdd.models.served import Server
from sdd.rewriting.engines import Completion, Place, Request
from sdd.rewriting.server import OpenAIEngine


class ServedStudent(OpenAIEngine):
    """Answers by the model that a server calls `model`, up to one of `stops`; it has `vocabulary` tokens, and reads
    `context` of them at most.

    Greedy answers in float32 are those of `HFEngine`; a sampled one has a seed of its own.
    """

    asked_by, group = "rollouts.backend", "rollouts"
    keeps_space = True

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[int],
        vocabulary: int,
        context: int | None,
        as_text: bool,
        temperature: float,
        seed: int,
        server: Server | None,
    ) -> None:
        super().__init__(endpoint="completions", temperature=temperature, seed=seed)
        self.tokenizer, self.stops, self.as_text = tokenizer, frozenset(stops), as_text
        self.vocabulary, self.context = vocabulary, context
        self.also = {} if as_text else {"extra_body": {"return_token_ids": True}}
        self.place, self.prompts = Place(server=server), dict[str, list[int]]()

    def text_of(self, prompt: list[int]) -> str:
        """What a server is sent that takes text; refused where it would read other tokens."""
        text = self.tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = sent_as_text(self.tokenizer, text)
        if tokenized(self.tokenizer, text)["input_ids"] != prompt:
            raise UserError(
                "rollouts.backend=transformers sends text, and a prompt is other tokens there than here (control tokens"
                " in its words?); choose another, or leave such rows out"
            )
        return text

    def continued(
        self, model: str, prompts: Sequence[list[int]], names: Sequence[str], limit: int, ending: Ending
    ) -> Iterator[tuple[int, list[int]]]:
        """(index of a prompt, its new tokens), as the server answers: up to a token of `stops`, to where `ending` has
        it end, or to `limit` tokens."""
        self.model, self.max_new_tokens = model, limit
        self.prompts, index = dict(zip(names, prompts, strict=True)), {name: at for at, name in enumerate(names)}
        texts = map(self.text_of, prompts) if self.as_text else ("" for _ in prompts)
        for completion in self.complete([Request(name, text) for name, text in zip(names, texts, strict=True)]):
            tokens = self._ended(completion, limit)
            yield index[completion.id], tokens[: ending(tokens, len(tokens)) or len(tokens)]

    def _prompt(self, request: Request) -> Any:
        return request.prompt if self.as_text else [self.prompts[request.id]]

    def _limit(self, request: Request) -> int:
        """One more than is kept: some say of an answer that ends with the last token it may have that it was cut."""
        most = self.max_new_tokens + 1
        return most if self.context is None else max(1, min(most, self.context - len(self.prompts[request.id])))

    def _ended(self, completion: Completion, limit: int) -> list[int]:
        """The tokens of an answer, at least one; where the server says that it ended, with the one that ends it."""
        prompt = self.prompts[completion.id]
        if completion.finish == "too_long":
            raise UserError(f"the server takes no prompt of {len(prompt)} tokens; lower finetune.max_length")
        tokens = list(completion.tokens) or self._tokens(prompt, completion.text)
        if unknown := next((token for token in tokens if not 0 <= token < self.vocabulary), None):
            raise UserError(f"the server says the token {unknown}, which the student has not; it serves another model")
        end = next((at + 1 for at, token in enumerate(tokens) if token in self.stops), None)
        if end is None and (completion.finish == "stop" or not tokens):
            tokens.append(end_of_turn(self.tokenizer))
        return tokens[:end][:limit]

    def _tokens(self, prompt: list[int], text: str) -> list[int]:
        control = control_of(self.tokenizer)
        masked = control.masked(text)
        asked = self.tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = control.encode(asked + masked, add_special_tokens=False)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return control.encode(masked, add_special_tokens=False)
