"""What to try next follows from what a study lacks."""

from typing import Any

from sdd.report.next_steps import next_steps

HALF = {"add": [1, 0] * 20}
BETTER = {"add": [1, 1, 1, 0] * 10}


def beginnings(artifacts: Any, read_study: Any) -> list[str]:
    return [step.split(":")[0].split(" (")[0] for step in next_steps(read_study(artifacts.root).study)]


def test_models_to_compare_with_come_first(artifacts, read_study):
    pruned = artifacts.pruned(4)
    artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets("sft"), 0), HALF)
    steps = beginnings(artifacts, read_study)
    assert steps[:2] == ["Evaluate the unpruned model", "Evaluate the pruned model as it was cut"]
    assert {"Fine-tune with finetune=self_distill", "Cut other sizes", "Run more seeds"} <= set(steps)
    artifacts.evaluated(None, HALF)
    artifacts.evaluated(pruned, HALF)
    assert not [step for step in beginnings(artifacts, read_study) if step.startswith("Evaluate")]


def test_seeds_items_and_rates_of_what_could_be_chance(artifacts, read_study):
    artifacts.evaluated(None, BETTER)
    for size in (2, 4):
        pruned = artifacts.pruned(size)
        artifacts.evaluated(pruned, HALF)
        for mode in ("sft", "self_distill"):
            artifacts.evaluated(artifacts.tuned(pruned, artifacts.targets(mode), 0), HALF)
    study = read_study(artifacts.root).study
    assert next_steps(study) == [
        "Run more seeds (seed=1,2,3,4): self_distill n2 minus sft n2 is +0.0 [+0.0, +0.0] points over 1 seed, "
        "which could be chance.",
        "Tune the learning rate of each way of fine-tuning on the dev split (experiment=tune): all ran at 0.0003, "
        "and one rate seldom suits all.",
    ]
    for size in (2, 4):
        for seed in range(1, 5):
            for mode in ("sft", "self_distill"):
                artifacts.evaluated(artifacts.tuned(artifacts.pruned(size), artifacts.targets(mode), seed), HALF)
    assert beginnings(artifacts, read_study)[0] == "Ask more items"


def test_an_unpruned_model_alone_is_to_be_pruned(artifacts, read_study):
    artifacts.evaluated(None, HALF)
    assert beginnings(artifacts, read_study) == ["Prune the model"]
