"""Run tasks on a model through lm-eval's evaluator, one task at a time, with per-sample records.

Tasks are handed over as lm-eval configs whose rows and scoring function come from this process; generation, batching
and likelihoods are lm-eval's own. Knows nothing of the store, Hydra, or how the model came about.
"""

import logging
import math
import statistics
from typing import Any

from sdd.answers import equal, extract
from sdd.evaluation.tiny import Item, Task


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
    """lm-eval's own model wrapper and evaluator around one model; tasks are run one at a time."""

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int, max_new_tokens: int, system_prompt: str | None = None
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.tokenizer, self.max_new_tokens, self.system_prompt = tokenizer, max_new_tokens, system_prompt
        self.language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def run(self, task: Task) -> list[dict[str, Any]]:
        """Per-sample records, in the order of the items."""
        from lm_eval.evaluator import evaluate

        results = evaluate(
            self.language_model,
            {task.name: _lm_eval_task(task, self.max_new_tokens, self.tokenizer.eos_token)},
            apply_chat_template=True,
            system_instruction=self.system_prompt,
            log_samples=True,
            bootstrap_iters=0,
        )
        assert results is not None, "lm-eval answers None away from rank 0; there is one rank here"
        samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
        return [_record(task.kind, *pair, self.tokenizer) for pair in zip(task.items, samples, strict=True)]


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
    tokens = len(tokenizer(item.gold, add_special_tokens=False)["input_ids"]) + 1
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
