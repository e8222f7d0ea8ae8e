"""The words put around a task: the rewriting template, and chats rendered by the tokenizer's own template.

Self-data distillation (arXiv 2410.09982, after SDFT, arXiv 2402.13669) shows the teacher a task together with a
reference answer and asks for an answer of its own. Training and evaluation use the bare task. Knows nothing of
datasets, models or Hydra; a tokenizer is anything with `apply_chat_template`.
"""

from typing import Any

REWRITE_TEMPLATE = (
    "Task: {prompt}\nReference answer: {reference}\nAnswer the task in your own words, guided by the reference."
)

LEAK_PHRASES = ("reference answer", "the reference", "in my own words", "in your own words", "task:")
"""Words of the template that do not belong into an answer (compared without case)."""


def rewrite_prompt(template: str, prompt: str, reference: str) -> str:
    """Fill the template in one pass, so that braces inside a row are left alone.

    A template without `{reference}` asks the teacher for an answer of its own, unaided.
    """
    parts = template.split("{prompt}")
    return prompt.join(part.replace("{reference}", reference) for part in parts)


def chat_prompt_ids(tokenizer: Any, prompt: str, system_prompt: str | None = None) -> list[int]:
    """Token ids of a chat up to where the assistant's answer starts, special tokens included exactly once."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer and the end-of-turn token that closes it."""
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]
