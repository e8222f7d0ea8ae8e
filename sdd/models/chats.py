"""The words put around a task: the rewriting template, and chats rendered by the tokenizer's own template.

Self-data distillation (arXiv 2410.09982, after SDFT, arXiv 2402.13669) shows the teacher a task together with a
reference answer and asks for an answer of its own. Training and evaluation use the bare task. Knows nothing of
datasets, models or Hydra; a tokenizer is one of transformers'.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sdd.errors import UserError
from sdd.models.control import PROBE, control_of, tokenized
from sdd.models.rendering import RefusalError, render_chat

REWRITE_TEMPLATE = (
    "Task: {prompt}\nReference answer: {reference}\nAnswer the task in your own words, guided by the reference."
)

LEAK_PHRASES = ("reference answer", "the reference", "in my own words", "in your own words", "task:")
"""Words of the template that do not belong into an answer (compared without case)."""


CORRECTION_TEMPLATE = (
    "Task: {prompt}\nAn answer that may be wrong: {reference}\nPut right what is wrong in it, in your own words."
)
"""Of an answer that is no reference, where it takes the place of one."""

CORRECTION_LEAKS = ("answer that may be wrong", "the given answer", "in my own words", "in your own words", "task:")


def rewrite_prompt(template: str, prompt: str, reference: str) -> str:
    """Fill the template in one pass, so that braces inside a row are left alone.

    A template without `{reference}` asks the teacher for an answer of its own, unaided.
    """
    parts = template.split("{prompt}")
    return prompt.join(part.replace("{reference}", reference) for part in parts)


PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Answer:\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ 'Question:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:\n' }}{% endif %}"
)
"""The chat template of models that bring none."""


def plain_template(begins: bool) -> str:
    """The template for a tokenizer that brings none, and that `begins` texts with a token of its own, or does not."""
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE


PADS = (
    *("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>"),
    *("<|reserved_special_token_0|>", "<|endoftext|>", "<unk>"),
)
"""Tokens that vocabularies hold for padding, or that no chat uses; best first."""


def prepare_tokenizer(tokenizer: Any, vocabulary: int | None = None) -> Any:
    """Give a tokenizer what it lacks: a plain chat template, and a pad token that ends no turn.

    The pad is a token that is in the vocabulary already (ids below `vocabulary`, the rows of the embedding), so that no
    embedding is resized. Padding is told from targets by position and never by its id.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so that no answer could end; name one in its config"
        )
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenized(tokenizer, PROBE)["input_ids"][:1] == [bos]
        tokenizer.chat_template = plain_template(begins)
    try:
        ends = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    except RefusalError as error:
        raise UserError(f"the chat template does not render a question and its answer ({error.reason})") from None
    if isinstance(vocabulary, int) and (beyond := max(ends)) >= vocabulary:
        raise UserError(f"the token {beyond} ends a turn or a text, and the model has {vocabulary} tokens")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        known = tokenizer.get_vocab()
        names = [*PADS, tokenizer.unk_token, tokenizer.bos_token]
        safe = (n for n in names if n in known and known[n] not in ends and known[n] < (vocabulary or len(known)))
        if (pad := next(safe, None)) is not None:
            tokenizer.pad_token = pad
    return tokenizer


Turns = Sequence[Mapping[str, str]]
"""Turns before a task, each {"role", "content"}; a first one by `system` takes the place of the system prompt."""


def messages_of(prompt: str, system_prompt: str | None = None, before: Turns = ()) -> list[dict[str, str]]:
    """The turns of a task, the system prompt first unless the row has one of its own."""
    own = bool(before) and before[0]["role"] == "system"
    system = [{"role": "system", "content": system_prompt}] if system_prompt and not own else []
    return [*system, *map(dict, before), {"role": "user", "content": prompt}]


def task_text(prompt: str, before: Turns = ()) -> str:
    """All the words of a task: the prompt, after the turns before it."""
    return "\n\n".join([*(turn["content"] for turn in before), prompt])


def accepted(tokenizer: Any, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages, a first one by `system` before the words of the first task if the template refuses or drops it.

    Their words are masked where they would become control tokens (`sdd.models.control`).
    """
    control = control_of(tokenizer)
    masked = [{**message, "content": control.masked(message["content"])} for message in messages]
    return system_placed(tokenizer, masked)


def system_placed(tokenizer: Any, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """`accepted`, without masking any words."""
    if messages[0]["role"] != "system":
        return messages
    (system, first), rest = messages[:2], messages[2:]
    try:
        if system["content"].strip() in render_chat(tokenizer, messages, add_generation_prompt=True):
            return messages
    except RefusalError:
        pass
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def chat_messages(
    tokenizer: Any, prompt: str, system_prompt: str | None = None, before: Turns = ()
) -> list[dict[str, str]]:
    """The turns before the answer. A system prompt that the template refuses or drops goes before the task's words."""
    return accepted(tokenizer, messages_of(prompt, system_prompt, before))


def chat_prompt_ids(tokenizer: Any, prompt: str, system_prompt: str | None = None, before: Turns = ()) -> list[int]:
    """Token ids of a chat up to where the assistant's answer starts, special tokens included exactly once."""
    messages = chat_messages(tokenizer, prompt, system_prompt, before)
    return _ids(tokenizer, render_chat(tokenizer, messages, add_generation_prompt=True))


def completion_prompt(tokenizer: Any, prompt: str, system_prompt: str | None = None, before: Turns = ()) -> str:
    """The same chat as text for whoever tokenizes it and adds the tokenizer's own first token, which is left out."""
    messages = chat_messages(tokenizer, prompt, system_prompt, before)
    return sent_as_text(tokenizer, render_chat(tokenizer, messages, add_generation_prompt=True))


def sent_as_text(tokenizer: Any, text: str) -> str:
    """A text for another's tokenizer, without the first token that tokenizers of its kind add.

    Words that stand for a control token stay masked: there, private characters are all that they can be.
    """
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenized(tokenizer, PROBE)["input_ids"][:1] == [bos]
    return text.removeprefix(tokenizer.bos_token) if adds else text


def text_ids(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """Token ids of running text with the tokenizer's default special tokens and no others, cut to `max_length`."""
    control = control_of(tokenizer)
    return control.encode(control.masked(text), add_special_tokens=True, at_most=max_length)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return control_of(tokenizer).encode(text, add_special_tokens=False)


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token with which the model's template ends the assistant's turn."""
    return control_of(tokenizer).ending_id


def stop_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Ids that end an answer: the template's end of turn, the tokenizer's end of sequence, and those that the model's
    generation config lists."""
    listed = getattr(generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    return sorted({i for i in [end_of_turn(tokenizer), tokenizer.eos_token_id, *listed] if i is not None})


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer on its own and the end-of-turn token that closes it."""
    control = control_of(tokenizer)
    return [*_ids(tokenizer, control.masked(answer)), control.ending_id]


def _written(tokenizer: Any, messages: list[dict[str, str]], answer: str) -> str:
    """What the template makes of an answer, up to what ends its turn.

    Some templates render a chat without its answer otherwise than the same chat with it (Mistral's puts the system
    prompt into the task only while that comes last); the task alone then tells. The answer as it is where neither does.
    """
    closing, token = control_of(tokenizer).ending
    for turns in (messages, messages[-1:]):
        asked = render_chat(tokenizer, turns, add_generation_prompt=True)
        whole = render_chat(tokenizer, [*turns, {"role": "assistant", "content": answer}])
        if whole.startswith(asked) and token in whole[len(asked) :]:
            return whole[len(asked) :].rsplit(closing, 1)[0]
    return answer


def training_ids(
    tokenizer: Any, prompt: str, target: str, system_prompt: str | None = None, before: Turns = ()
) -> tuple[list[int], int]:
    """(token ids of the chat with the target as its answer, length of the prompt); the rest is the target.

    The prompt's ids are exactly those that generation starts from, and the target ends in the token that ends the turn.
    Between them stands what the template makes of the answer, tokenized in its place where that leaves the prompt's
    tokens as they are.
    """
    messages = chat_messages(tokenizer, prompt, system_prompt, before)
    asked = render_chat(tokenizer, messages, add_generation_prompt=True)
    prompt_ids = _ids(tokenizer, asked)
    control = control_of(tokenizer)
    answered = _written(tokenizer, messages, control.masked(target)) + control.ending[0]
    ids = _ids(tokenizer, asked + answered)
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + _ids(tokenizer, answered)
    return ids, len(prompt_ids)
