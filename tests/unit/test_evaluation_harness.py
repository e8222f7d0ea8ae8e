"""Scores through lm-eval against likelihoods and answers taken from the model directly; their summary by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from sdd.evaluation import generation
from sdd.evaluation.backends import in_process
from sdd.evaluation.harness import Harness, free_scores, summary
from sdd.evaluation.tiny import Item, Task, suite_tasks
from sdd.models.chats import answer_ids, chat_prompt_ids
from sdd.models.checkpoints import Checkpoint

NEW = 10


@pytest.mark.parametrize(
    ("response", "strict", "lenient", "malformed"),
    [
        ("3 + 4 = 7.\nThe answer is 7.", 1, 1, 0),
        ("3 + 4 = 7 yeah\n#### 7", 1, 1, 0),
        ("ans: 7.0", 1, 1, 0),
        ("The answer is 8.", 0, 0, 0),
        ("The answer is 7.\nI hope this helps!", 0, 1, 1),
        ("The answer is 8.\nok", 0, 0, 1),
        ("7", 0, 0, 1),
        ("", 0, 0, 1),
    ],
)
def test_free_scores(response: str, strict: int, lenient: int, malformed: int) -> None:
    assert free_scores(response, "7") == {"score": strict, "lenient": lenient, "malformed": malformed}


# ---- summary ----------------------------------------------------------------------------------------------------


def test_summary_of_free_answers_by_hand() -> None:
    records = [
        {"score": 1.0, "lenient": 1.0, "malformed": 0.0},
        {"score": 0.0, "lenient": 1.0, "malformed": 1.0},
        {"score": 0.0, "lenient": 0.0, "malformed": 1.0},
        {"score": 0.0, "lenient": 0.0, "malformed": 0.0},
    ]
    found = summary("free", records)
    assert found == {
        "metric": "exact_match",
        "value": 0.25,
        "stderr": pytest.approx(math.sqrt(0.25 / 4)),
        "n": 4,
        "lenient": 0.5,
        "malformed": 0.5,
    }
    p = found["value"]
    assert found["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 3)), "the sample variance, n - 1"


def test_summary_of_choices_by_hand() -> None:
    found = summary("choice", [{"score": 1.0}, {"score": 0.0}])
    assert found == {"metric": "acc", "value": 0.5, "stderr": pytest.approx(0.5), "n": 2}


def test_summary_of_likelihoods_is_total_over_total() -> None:
    """6 nats over 2 tokens and 2 nats over 6: 1 nat a token, where the mean of ratios would say 1.67."""
    records = [{"log_likelihood": -6.0, "tokens": 2}, {"log_likelihood": -2.0, "tokens": 6}]
    residual = 6 - 1 * 2
    expected = math.sqrt(2 * residual**2 / 1) / 4 / math.sqrt(2)
    assert summary("likelihood", records) == {
        "metric": "nats_per_token",
        "value": 1.0,
        "stderr": pytest.approx(expected),
        "n": 2,
    }


@pytest.mark.parametrize("kind", ["free", "choice", "likelihood"])
def test_one_record_has_no_spread(kind: str) -> None:
    record = {"score": 1.0, "lenient": 1.0, "malformed": 0.0, "log_likelihood": -3.0, "tokens": 2}
    assert summary(kind, [record])["stderr"] == 0.0


# ---- the real thing ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return suite_tasks("tiny", ["word", "fact", "fact_choice", "nll"], "dev", 0, 7)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return Checkpoint(tiny_llama).model("float32")


@pytest.fixture(scope="module")
def harness(model: Any, tiny_llama: Path) -> Harness:
    tokenizer = Checkpoint(tiny_llama).tokenizer()
    return Harness(in_process(model, tokenizer, 3), tokenizer, max_new_tokens=NEW)


@torch.no_grad()
def log_likelihood(model: Any, prompt: list[int], target: list[int]) -> float:
    logits = model(torch.tensor([prompt + target]), use_cache=False).logits[0].double().log_softmax(dim=-1)
    return sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(target))


def test_choices_are_scored_by_their_likelihood(
    harness: Harness, model: Any, tokenizer: Any, tasks: dict[str, Task]
) -> None:
    task = tasks["fact_choice"]
    records = harness.run(task)
    for item, record in zip(task.items, records, strict=True):
        prompt = chat_prompt_ids(tokenizer, item.prompt)
        expected = [log_likelihood(model, prompt, answer_ids(tokenizer, choice)[:-1]) for choice in item.choices]
        assert record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        best = item.choices[expected.index(max(expected))]
        assert (record["id"], record["prompt"], record["answer"]) == (item.id, item.prompt, item.answer)
        assert (record["response"], record["score"]) == (best, float(best == item.answer))
    assert len({record["response"] for record in records}) > 1


def test_likelihoods_include_the_end_of_turn(
    harness: Harness, model: Any, tokenizer: Any, tasks: dict[str, Task]
) -> None:
    task = tasks["nll"]
    for item, record in zip(task.items, harness.run(task), strict=True):
        assert item.gold is not None
        target = answer_ids(tokenizer, item.gold)
        expected = log_likelihood(model, chat_prompt_ids(tokenizer, item.prompt), target)
        assert record["log_likelihood"] == pytest.approx(expected, abs=1e-3)
        assert record["tokens"] == len(target)
        assert (record["id"], record["response"]) == (item.id, item.gold)


@torch.no_grad()
def generated(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = chat_prompt_ids(tokenizer, prompt)
    output = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
    kept = output[: output.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in output else output
    text: str = tokenizer.decode(kept, skip_special_tokens=True)
    return text


def test_generated_answers_are_the_models_own(
    harness: Harness, model: Any, tokenizer: Any, tasks: dict[str, Task]
) -> None:
    for name in ("word", "fact"):
        records = harness.run(tasks[name])
        for item, record in zip(tasks[name].items, records, strict=True):
            expected = generated(model, tokenizer, item.prompt)
            assert record["response"].strip() == expected.strip()
            assert {key: record[key] for key in ("score", "lenient", "malformed")} == free_scores(expected, item.answer)
        assert [record["id"] for record in records] == [item.id for item in tasks[name].items]
        assert len({record["response"] for record in records}) > 2


def test_answers_end_at_stop_strings_as_lm_evals_do(
    harness: Harness, model: Any, tokenizer: Any, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against lm-eval's own generation of one prompt at a time; a stop string may run over several tokens."""
    texts = [generated(model, tokenizer, item.prompt) for item in tasks["word"].items]
    halves = [text[len(text) // 2 :][:2] for text in texts]
    settings = {"until": [halves[0], halves[1], tokenizer.eos_token], "do_sample": False, "max_gen_toks": NEW}
    prompts = [item.prompt for item in tasks["word"].items]

    def answers(language_model: Any) -> list[str]:
        contexts = [language_model.apply_chat_template([{"role": "user", "content": text}]) for text in prompts]
        requests = [Instance("generate_until", {}, (text, dict(settings)), 0) for text in contexts]
        return language_model.generate_until(requests, disable_tqdm=True)

    own = answers(harness.language_model)
    alone = Harness(in_process(model, tokenizer, 1), tokenizer, max_new_tokens=NEW).language_model
    monkeypatch.setattr(generation, "keeps_all", lambda model: False)
    assert own == answers(alone)
    assert own[0] == texts[0][: texts[0].index(halves[0])] != texts[0]


@pytest.mark.parametrize(
    ("settings", "greedy"),
    [
        ({"until": ["\n"], "do_sample": False, "temperature": 0.7}, True),
        ({"until": ["\n"], "max_gen_toks": 3, "temperature": 0.0, "top_p": 0.9}, True),
        ({"temperature": 0.7}, False),
        ({"do_sample": True}, False),
        ({"do_sample": False, "num_beams": 2}, False),
        ({"max_length": 30}, False),
    ],
)
def test_what_is_more_than_greedy_is_left_to_lm_eval(settings: dict[str, Any], greedy: bool) -> None:
    assert generation.is_greedy(settings) is greedy


def test_a_right_answer_is_counted(harness: Harness, model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    """The scoring function sees the generated text and the item's own answer."""
    items = tuple(Item(str(n), f"Say {n}.", str(n)) for n in range(4))
    monkeypatch.setattr(
        harness.language_model,
        "generate_until",
        lambda requests, **_: [f"The answer is {request.doc['answer']}." for request in requests[:3]] + ["hm"],
    )
    records = harness.run(Task("say", "free", items))
    assert [record["score"] for record in records] == [1.0, 1.0, 1.0, 0.0]
    assert summary("free", records)["value"] == 0.75
    assert summary("free", records)["malformed"] == 0.25


def test_records_do_not_depend_on_the_batch_size(
    harness: Harness, model: Any, tokenizer: Any, tasks: dict[str, Task]
) -> None:
    alone = Harness(in_process(model, tokenizer, 1), tokenizer, max_new_tokens=NEW)
    for task in tasks.values():
        for one, other in zip(alone.run(task), harness.run(task), strict=True):
            for key, value in one.items():
                numeric = key in ("log_likelihood", "log_likelihoods")
                assert other[key] == (pytest.approx(value, abs=1e-3) if numeric else value), key


def test_templates_are_not_compiled_for_every_item(
    harness: Harness, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.utils import env

    compiled: list[str] = []
    real = env.compile
    monkeypatch.setattr(env, "compile", lambda source, *rest: compiled.append(source) or real(source, *rest))
    harness.run(tasks["nll"])
    assert 0 < compiled.count("{{prompt}}") < len(tasks["nll"].items)
    assert "from_string" not in vars(env), "lm-eval's own way is put back"


def test_a_system_prompt_reaches_the_model(model: Any, tokenizer: Any, tasks: dict[str, Task]) -> None:
    task = tasks["nll"]
    harness = Harness(in_process(model, tokenizer, 4), tokenizer, max_new_tokens=NEW, system_prompt="Be brief.")
    item, record = task.items[0], harness.run(task)[0]
    prompt = chat_prompt_ids(tokenizer, item.prompt, "Be brief.")
    expected = log_likelihood(model, prompt, answer_ids(tokenizer, item.gold or ""))
    assert record["log_likelihood"] == pytest.approx(expected, abs=1e-3)


def test_a_system_prompt_that_the_template_refuses_reaches_the_model_too(
    model: Any, tokenizer: Any, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the task's words, as in training; lm-eval alone drops it."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + tokenizer.chat_template)
    test_a_system_prompt_reaches_the_model(model, tokenizer, tasks)


@pytest.mark.parametrize("prompt", ["Braces {{ 7 * 7 }} and {% raw %}", "Two lines\nand a last one\n", "  spaced  "])
def test_prompts_reach_the_model_letter_by_letter(prompt: str, harness: Harness, model: Any, tokenizer: Any) -> None:
    (record,) = harness.run(Task("odd", "likelihood", (Item("a", prompt, "7", gold="It is {{ 7 }}.\nSo 7 "),)))
    expected = log_likelihood(model, chat_prompt_ids(tokenizer, prompt), answer_ids(tokenizer, "It is {{ 7 }}.\nSo 7 "))
    assert record["log_likelihood"] == pytest.approx(expected, abs=1e-3)
