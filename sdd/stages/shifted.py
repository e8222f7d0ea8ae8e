"""Stages `surprisals` and `shifted`: how far targets and students are from the unpruned model.

`surprisals` belongs to targets and is shared by all students of them; `shifted` to one student, over the unpruned
model's and its own greedy answers to held-out prompts. Prompts that the student was trained on are left out.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from sdd.analysis import shift
from sdd.errors import UserError
from sdd.forward.teacher_forcing import Row
from sdd.models import checkpoints
from sdd.models.chats import training_ids
from sdd.stages.answered import shown
from sdd.stages.runtime import Runtime, read_facts, read_jsonl, write_json, write_jsonl
from sdd.store import Recipe

log = logging.getLogger(__name__)


def build_surprisals(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`rows.jsonl` ({"id", "source", "reason"}, tokens and NLL of target and of reference) and `surprisals.json`."""
    spec = recipe.spec
    source = runtime.source(spec["model"], "model")
    tokenizer = checkpoints.load_tokenizer(source)
    model = checkpoints.load_model(source, spec["dtype"], runtime.device, runtime.attention)
    checkpoints.check_logits(model)
    rows = list(read_jsonl(inputs["targets"] / "train.jsonl"))
    shown: dict[tuple[str, str], Row] = {}
    for row in rows:
        for text in (row["target"], row["reference"]):
            ids, prompt = training_ids(tokenizer, row["prompt"], text, spec["system_prompt"])
            if len(ids) <= spec["max_length"]:
                shown[row["prompt"], text] = ids[:prompt], ids[prompt:]
    nll = dict(zip(shown, shift.token_nll(model, list(shown.values()), runtime.inference_batch_size), strict=True))
    records = []
    for row in rows:
        texts = {name: nll.get((row["prompt"], row[name])) for name in ("target", "reference")}
        if all(texts.values()):
            record = {key: row[key] for key in ("id", "source", "reason")}
            for name, values in texts.items():
                assert values is not None
                record |= {f"{name}_tokens": len(values), f"{name}_nll": fmean(values)}
            records.append(record)
    if not records:
        raise UserError(f"finetune.max_length={spec['max_length']} is shorter than every training row")
    write_jsonl(folder / "rows.jsonl", records)
    result = {"over_max_length": len(rows) - len(records), **surprise(records)}
    result["reasons"] = dict(Counter(row["reason"] for row in rows))
    write_json(folder / "surprisals.json", result)


def surprise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """NLL in nats per token and lengths in tokens of targets and references, over all rows and over rewritten ones."""
    kept = {"all": records, "rewritten": [record for record in records if record["source"] == "rewrite"]}
    found: dict[str, Any] = {"rows": len(records)}
    for name, chosen in kept.items():
        if not chosen:
            continue
        found[name] = {"rows": len(chosen)}
        for text in ("target", "reference"):
            tokens = [record[f"{text}_tokens"] for record in chosen]
            total = sum(record[f"{text}_nll"] * record[f"{text}_tokens"] for record in chosen)
            found[name][text] = {"nll": total / sum(tokens), "tokens": lengths(tokens)}
    return found


def lengths(tokens: Sequence[int]) -> dict[str, float]:
    """Mean and percentiles of lengths in tokens."""
    cuts = quantiles(tokens, n=20, method="inclusive") if len(tokens) > 1 else [float(tokens[0])] * 19
    return {"mean": fmean(tokens), "p5": cuts[0], "p50": cuts[9], "p95": cuts[18]}


def build_shifted(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`prompts.jsonl` ({"id", "tokens", "kl", "own_tokens", "similarity"}) and `shift.json`, surprisals included."""
    spec, given = recipe.spec, shown(runtime, recipe, inputs)
    own = {row["id"]: row for row in read_jsonl(inputs["responses"] / "answers.jsonl")}
    kl = shift.token_kl(given.teacher, given.student, given.rows, runtime.inference_batch_size)
    records = [
        {"id": answer["id"], "tokens": len(values), "kl": fmean(values), "own_tokens": len(own[answer["id"]]["tokens"])}
        for answer, values in zip(given.answers, kl, strict=True)
    ]
    result: dict[str, Any] = {"prompts": len(records), "tokens": sum(record["tokens"] for record in records)}
    result["kl"] = sum(record["kl"] * record["tokens"] for record in records) / result["tokens"]
    result["tokens_per_answer"] = {
        "teacher": lengths([record["tokens"] for record in records]),
        "student": lengths([record["own_tokens"] for record in records]),
    }
    if "embedder" in spec:
        texts = [own[answer["id"]]["text"] for answer in given.answers]
        embedder = runtime.source(spec["embedder"], "embedder")
        found = shift.similarities(embedder, texts, [answer["text"] for answer in given.answers], runtime.device)
        for record, similarity in zip(records, found, strict=True):
            record["similarity"] = similarity
        result["similarity"] = {"mean": fmean(found), "histogram": shift.histogram(found)}
    write_jsonl(folder / "prompts.jsonl", records)
    if "surprisals" in inputs:
        result["targets"] = read_facts(inputs["surprisals"] / "surprisals.json")
    write_json(folder / "shift.json", result)
    log.info("KL to the unpruned model: %.4f nats per token", result["kl"])
