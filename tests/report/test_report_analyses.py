"""Analyses of arms from records of known sums, without a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdd.report import write_report

TASKS = ("add", "sort")
PROMPTS = 30
SEEDS = (0, 1)
ACCEPTED = {"sft": 0.6, "self_distill": 0.8}


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def drafted(art: Any, model: str, answers: str, accepted: float, seed: int) -> str:
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(PROMPTS - seed):  # the second seed lacks a prompt
        tokens = 20 + n
        matched = round(tokens * accepted) + int(rng.integers(0, 3))
        lengths = {"1": {"passes": tokens - matched // 2, "drafted": tokens, "accepted": matched // 2}}
        rows.append({"id": f"p{n}", "tokens": tokens, "matched": matched, "sampling_acceptance": accepted})
        rows[-1]["lengths"] = lengths
    files: dict[str, Any] = {"prompts.jsonl": as_lines(rows), "drafted.json": {"prompts": len(rows)}}
    files["timings.json"] = {"machine": {"device": "a processor"}}
    labels = {"dataset": "tiny_math", "prompts": "tiny_instruct"}
    inputs = {"model": model, "answers": answers}
    return art.put("drafted", {"draft_lengths": [1], "dtype": "float32"}, inputs, labels=labels, **files)


@pytest.fixture(scope="module")
def analyses(artifacts_at: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    art = artifacts_at(tmp_path_factory.mktemp("artifacts"))
    pruned = art.pruned(4)
    answers = art.put("answered", {"model": "m" * 20}, {}, **{"answers.jsonl": ""})
    scores = {task: [1.0, 0.0, 1.0] for task in TASKS}
    folders = [art.evaluated(pruned, scores)]
    for mode in ("sft", "self_distill"):
        targets = art.targets(mode)
        for seed in SEEDS:
            model = art.tuned(pruned, targets, seed)
            folders.append(art.evaluated(model, scores))
            drafted(art, model, answers, ACCEPTED[mode], seed)
            similar = as_lines([{"id": f"p{n}", "tokens": 10, "kl": 0.5 + seed, "similarity": 0.9} for n in range(4)])
            shift = {"prompts.jsonl": similar, "shift.json": {"kl": 0.5}}
            art.put("shifted", {"dtype": "float32"}, {"model": model, "answers": answers}, **shift)
    art.put("measured", {"context": 8}, {"model": pruned}, **{"costs.json": {"dtype": "float32"}})
    out = write_report(folders, art.root, tmp_path_factory.mktemp("out"))
    assert out is not None
    found: dict[str, Any] = json.loads((out / "analyses.json").read_text())
    return found


def record(analyses: dict[str, Any], arm: str, kind: str) -> dict[str, Any]:
    (found,) = [each for each in analyses["arms"] if (each["arm"], each["kind"]) == (arm, kind)]
    return found


def test_a_record_for_every_arm_and_kind(analyses: dict[str, Any]) -> None:
    kinds = {(each["arm"], each["kind"]) for each in analyses["arms"]}
    tuned = {(arm, kind) for arm in ACCEPTED for kind in ("speculative", "shift")}
    assert kinds == tuned | {("pruned", "cost")}
    assert record(analyses, "pruned", "cost")["results"] == [{"dtype": "float32"}]
    assert record(analyses, "pruned", "cost")["timings"] == [None]


@pytest.mark.parametrize("arm", ACCEPTED)
def test_measures_are_ratios_of_sums_over_shared_prompts(analyses: dict[str, Any], arm: str) -> None:
    found = record(analyses, arm, "speculative")
    assert (found["seeds"], found["prompts"], found["prompts_of"]) == ([0, 1], PROMPTS - 1, "tiny_instruct")
    assert found["timings"] == [{"machine": {"device": "a processor"}}] * 2
    by_seed = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        draws = [int(rng.integers(0, 3)) for _ in range(PROMPTS - 1)]
        matched = sum(round((20 + n) * ACCEPTED[arm]) + extra for n, extra in enumerate(draws))
        by_seed.append(matched / sum(20 + n for n in range(PROMPTS - 1)))
    rate = found["measures"]["acceptance_rate"]
    assert rate["by_seed"] == pytest.approx(by_seed)
    assert rate["mean"] == pytest.approx(sum(by_seed) / 2)
    assert rate["low"] < rate["mean"] < rate["high"]
    assert found["measures"]["sampling_acceptance"]["mean"] == pytest.approx(ACCEPTED[arm])
    # tokens / (tokens - accepted) at one token a draft
    efficiency, accepted = (found["measures"][f"{name}@1"] for name in ("block_efficiency", "mean_accepted_length"))
    assert efficiency["by_seed"] == pytest.approx([1 + value for value in accepted["by_seed"]])


def test_shift_of_seeds(analyses: dict[str, Any]) -> None:
    kl = record(analyses, "sft", "shift")["measures"]["kl"]
    assert kl["by_seed"] == [0.5, 1.5]
    assert (kl["mean"], kl["high"] - kl["mean"]) == (1.0, pytest.approx(12.7062 * 0.5, rel=1e-4))  # t, one degree
    assert record(analyses, "sft", "shift")["measures"]["similarity"]["mean"] == pytest.approx(0.9)


def test_contrast_is_the_later_mode_minus_the_earlier(analyses: dict[str, Any]) -> None:
    found = {each["measure"]: each for each in analyses["contrasts"] if each["kind"] == "speculative"}
    rate = found["acceptance_rate"]
    assert (rate["a"], rate["b"], rate["prompts"]) == ("self_distill", "sft", PROMPTS - 1)
    means = [record(analyses, arm, "speculative")["measures"]["acceptance_rate"]["mean"] for arm in ACCEPTED]
    assert rate["mean"] == pytest.approx(means[1] - means[0])
    assert 0.15 < rate["low"] <= rate["high"] < 0.25, "prompts and seeds are paired"
    (kl,) = [each for each in analyses["contrasts"] if each["measure"] == "kl"]
    assert (kl["mean"], kl["low"], kl["high"]) == (0, 0, 0)


def test_no_file_where_nothing_was_analysed(artifacts: Any, tmp_path: Path) -> None:
    art = artifacts
    evaluated = art.evaluated(art.pruned(4), {task: [1.0, 0.0] for task in TASKS})
    out = write_report([evaluated], art.root, tmp_path / "out")
    assert out is not None and not (out / "analyses.json").exists()
