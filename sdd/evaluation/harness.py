"""Run tasks on a model through lm-eval's evaluator, one task at a time, with per-sample records.

The embedded model's tasks are handed over as lm-eval configs whose rows and scoring function come from this process;
lm-eval's own tasks come as they are, and so do filters and metrics; who computes likelihoods and answers is one of the
`backends`. Knows nothing of the store, Hydra, or how the model came about.
"""

import logging
import math
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdd.answers import equal, extract
from sdd.errors import UserError
from sdd.evaluation.benchmark import Outcome
from sdd.evaluation.tiny import Item, Task
from sdd.models.chats import end_of_turn
from sdd.models.control import tokenized

log = logging.getLogger(__name__)


def free_scores(response: str, answer: str) -> dict[str, float]:
    """Strict and lenient match of the final answer, and whether the ending states none."""
    strict, anywhere = extract(response, "final"), extract(response, "anywhere")
    return {
        "score": float(strict is not None and equal(strict, answer)),
        "lenient": float(anywhere is not None and equal(anywhere, answer)),
        "malformed": float(strict is None),
    }


def _rows(task: Task) -> list[dict[str, Any]]:
    return [
        {
            "id": item.id,
            "prompt": item.prompt,
            "answer": item.answer,
            "choices": list(item.choices),
            "gold": item.gold or "",
        }
        for item in task.items
    ]


def _lm_eval_task(task: Task, max_new_tokens: int, end_of_turn: str) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    common: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(_rows(task))},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    if task.kind == "choice":
        kind = {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["choices"].index(row["answer"]),
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    elif task.kind == "likelihood":
        kind = {
            "output_type": "loglikelihood",
            "doc_to_target": lambda row: row["gold"] + end_of_turn,
            "process_results": lambda row, results: {"log_likelihood": results[0][0]},
            "metric_list": [{"metric": "log_likelihood", "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        kind = {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "process_results": lambda row, results: free_scores(results[0], row["answer"]),
            "generation_kwargs": {"until": [end_of_turn], "do_sample": False, "max_gen_toks": max_new_tokens},
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": name != "malformed"}
                for name in ("score", "lenient", "malformed")
            ],
        }
    return ConfigurableTask(config=common | kind)


class Harness:
    """lm-eval's evaluator around one model of a backend; tasks are run one at a time.

    `max_new_tokens` None leaves the limit of generated tokens to each task. What is computed in this process is kept in
    files named after `kept` (see `Parts`), and taken from there.
    """

    kept: Path | None = None

    def __init__(
        self,
        language_model: Any,
        tokenizer: Any,
        max_new_tokens: int | None,
        system_prompt: str | None = None,
        chat_template: bool = True,
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.language_model, self.tokenizer, self.max_new_tokens = language_model, tokenizer, max_new_tokens
        self.system_prompt, self.chat_template = system_prompt, chat_template
        self.language_model.is_chat = chat_template

    def _evaluate(self, name: str, task: Any, **settings: Any) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate

        self.language_model.kept = self.kept
        with _templates_kept():
            results: dict[str, Any] | None = evaluate(
                self.language_model,
                {"tasks": {name: task}},
                apply_chat_template=self.chat_template,
                fewshot_as_multiturn=self.chat_template,
                system_instruction=self.system_prompt,
                log_samples=True,
                **settings,
            )
        assert results is not None, "lm-eval answers None away from rank 0; there is one rank here"
        return results

    def run(self, task: Task) -> list[dict[str, Any]]:
        """Per-sample records of an embedded task, in the order of the items."""
        assert self.max_new_tokens is not None, "the embedded tasks set no limit of their own"
        ending = self.tokenizer.convert_ids_to_tokens(end_of_turn(self.tokenizer))
        built = _lm_eval_task(task, self.max_new_tokens, ending)
        self.language_model.own_ending = ending
        try:
            results = self._evaluate(task.name, built, bootstrap_iters=0)
        finally:
            self.language_model.own_ending = ""
        samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
        return [_record(task.kind, *pair, self.tokenizer) for pair in zip(task.items, samples, strict=True)]

    def prepare(self, name: str, task: Any) -> None:
        """Set the limit of generated tokens, and refuse one that leaves no room for a prompt."""
        if task.get_config("output_type") != "generate_until":
            return
        if self.max_new_tokens is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": self.max_new_tokens}, update=True)
        limit = task.get_config("generation_kwargs").get("max_gen_toks", self.language_model.max_gen_toks)
        if limit >= (length := self.language_model.max_length):
            raise UserError(
                f"{name} generates up to {limit} tokens, but the model's context is {length}; "
                "set evaluation.max_new_tokens to less"
            )

    def run_stock(self, name: str, task: Any, limit: int | None) -> Outcome:
        """One of lm-eval's own tasks, prepared, on its first `limit` items, seeded as by lm-eval's command line."""
        import numpy
        import torch
        from lm_eval.api.metrics import mean
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
        torch.manual_seed(DEFAULT_OTHER_SEED)
        with _cut_prompts() as cut:
            results = self._evaluate(name, task, limit=limit)
        if cut:
            what = "batches of prompts" if task.get_config("output_type") == "generate_until" else "requests"
            length = self.language_model.max_length
            log.warning("%s: lm-eval cut %d %s to the model's %d tokens, from the left", name, len(cut), what, length)
        result, higher = results["results"][name], task.higher_is_better()
        keys = [key for key in result if "," in key and not key.split(",")[0].endswith("_stderr")]
        values = {key: [_number(result[key]), _number(result[key.replace(",", "_stderr,", 1)])] for key in keys}
        records = _stock_records(results["samples"][name])
        metrics = [
            key
            for key in keys
            if higher.get(metric := key.split(",")[0])
            and task.aggregation().get(metric) is mean
            and all(isinstance(record["metrics"].get(key), float) for record in records)
        ]
        return Outcome(values, metrics, records)


@contextmanager
def _templates_kept() -> Iterator[None]:
    """lm-eval's templates are compiled once while this lasts, and not again for every item."""
    from lm_eval.utils import env

    env.from_string = lru_cache(maxsize=64)(env.from_string)
    try:
        yield
    finally:
        del env.from_string


@contextmanager
def _cut_prompts() -> Iterator[list[str]]:
    """What lm-eval says of prompts longer than the model's context while this lasts; nothing of it is shown."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "runcat" in (text := record.getMessage()):
                messages.append(text)

    logger, listener = logging.getLogger("lm_eval.models.huggingface"), Listener()
    before = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(listener)
        logger.level, logger.propagate = before


def _number(value: Any) -> float | None:
    """lm-eval's value; it writes "N/A" where there is none."""
    return None if isinstance(value, str) or value is None else float(value)


def _plain(value: Any) -> Any:
    """A metric's value of one item as JSON: numbers as float, pairs as lists."""
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else float(value)


def _stock_records(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record per item, in the order of the items, from lm-eval's sample per item and filter."""
    records: dict[int, dict[str, Any]] = {}
    for sample in samples:
        record = records.setdefault(sample["doc_id"], {"doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"]})
        record["prompt_hash"], record["target"] = sample["prompt_hash"], sample["target"]
        if isinstance(sample["resps"][0][0], str):
            record["response"] = sample["resps"][0] if len(sample["resps"][0]) > 1 else sample["resps"][0][0]
            record.setdefault("filtered", {})[sample["filter"]] = sample["filtered_resps"][0]
        else:
            pairs = [response[0] for response in sample["resps"]]
            record["log_likelihoods"] = [float(pair[0] if isinstance(pair, tuple) else pair) for pair in pairs]
        measured = record.setdefault("metrics", {})
        measured |= {f"{metric},{sample['filter']}": _plain(sample[metric]) for metric in sample["metrics"]}
    return [records[number] for number in sorted(records)]


def _record(kind: str, item: Item, sample: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    assert sample["doc"]["id"] == item.id, f"record of {sample['doc']['id']} for item {item.id}"
    record: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "answer": item.answer}
    if kind == "free":
        return record | {"response": sample["resps"][0][0], **{k: sample[k] for k in ("score", "lenient", "malformed")}}
    if kind == "choice":
        likelihoods = [response[0][0] for response in sample["resps"]]
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        return record | {
            "response": item.choices[best],
            "score": float(item.choices[best] == item.answer),
            "log_likelihoods": likelihoods,
        }
    tokens = len(tokenized(tokenizer, str(item.gold), add_special_tokens=False)["input_ids"]) + 1
    return record | {"response": item.gold, "log_likelihood": sample["log_likelihood"], "tokens": tokens}


def summary(kind: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A task's value with its standard error, from its records alone.

    Free and choice tasks: the mean score. Likelihood: nats per token, total over total, with the standard error of a
    ratio (Cochran 1977, eq. 2.39 without the finite-population factor).
    """
    n = len(records)
    if kind == "likelihood":
        tokens = sum(record["tokens"] for record in records)
        value = -sum(record["log_likelihood"] for record in records) / tokens
        residuals = [-record["log_likelihood"] - value * record["tokens"] for record in records]
        spread = math.sqrt(sum(r * r for r in residuals) / (n - 1)) if n > 1 else 0.0
        return {"metric": "nats_per_token", "value": value, "stderr": spread / (tokens / n) / math.sqrt(n), "n": n}
    scores = [record["score"] for record in records]
    result: dict[str, Any] = {
        "metric": "exact_match" if kind == "free" else "acc",
        "value": statistics.fmean(scores),
        "stderr": statistics.stdev(scores) / math.sqrt(n) if n > 1 else 0.0,
        "n": n,
    }
    if kind == "free":
        result |= {key: statistics.fmean(record[key] for record in records) for key in ("lenient", "malformed")}
    return result
