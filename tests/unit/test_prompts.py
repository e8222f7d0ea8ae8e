"""What the teacher is shown, and the token ids around an answer."""

from pathlib import Path
from typing import Any

import pytest

from sdd.models.chats import LEAK_PHRASES, REWRITE_TEMPLATE, answer_ids, chat_prompt_ids, rewrite_prompt
from sdd.models.lengths import lengths_of


def test_the_template_is_filled() -> None:
    assert rewrite_prompt("T: {prompt} R: {reference}.", "2 + 2?", "four") == "T: 2 + 2? R: four."
    assert rewrite_prompt("{prompt}{prompt}", "a", "b") == "aa"


@pytest.mark.parametrize(
    ("prompt", "reference"),
    [
        ("Print {reference} with {0} and {}", "f'{x!r}' and {prompt}"),
        ("{prompt}", "{reference}"),
        ("a { lone brace", "and } another %s \\1"),
    ],
)
def test_braces_inside_a_row_are_left_alone(prompt: str, reference: str) -> None:
    assert rewrite_prompt("Q {prompt} A {reference} E", prompt, reference) == f"Q {prompt} A {reference} E"


def test_a_template_without_reference_shows_none() -> None:
    assert rewrite_prompt("Answer: {prompt}", "2 + 2?", "SECRET") == "Answer: 2 + 2?"


def test_the_leak_list_covers_the_templates_own_words() -> None:
    words = rewrite_prompt(REWRITE_TEMPLATE, "", "").casefold()
    assert [phrase for phrase in LEAK_PHRASES if phrase in words] == [
        "reference answer",
        "the reference",
        "in your own words",
        "task:",
    ]


def test_a_chat_starts_with_one_begin_token_and_ends_where_the_answer_starts(tokenizer: Any) -> None:
    ids = chat_prompt_ids(tokenizer, "What is 2 + 2?")
    assert tokenizer.decode(ids) == "<|begin|><|user|>What is 2 + 2?<|end|><|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    plain = tokenizer("<|begin|>What is 2 + 2?")["input_ids"]
    assert plain.count(tokenizer.bos_token_id) == 2, "the default call would add a second one"


def test_a_system_prompt_comes_first(tokenizer: Any) -> None:
    ids = chat_prompt_ids(tokenizer, "Hello", system_prompt="Be brief.")
    assert tokenizer.decode(ids) == "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"
    assert chat_prompt_ids(tokenizer, "Hello", "") == chat_prompt_ids(tokenizer, "Hello")


def test_an_answer_ends_with_one_end_of_turn(tokenizer: Any) -> None:
    ids = answer_ids(tokenizer, "The answer is 4.")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "The answer is 4."
    assert tokenizer.bos_token_id not in ids
    assert answer_ids(tokenizer, "") == [tokenizer.eos_token_id]


def test_lengths_are_counted_as_they_are_in_training(tiny_llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    lengths, task = lengths_of(tiny_llama, None), "What is 3 plus 4?"
    assert lengths is not None
    for system_prompt in (None, "be kind"):
        around = lengths.around(system_prompt)
        assert around + lengths.of(task) == len(chat_prompt_ids(tokenizer, task, system_prompt))
    assert lengths.of(task) + 1 == len(answer_ids(tokenizer, task))
    assert lengths_of(tmp_path, None) is None, "there is no tokenizer here"
