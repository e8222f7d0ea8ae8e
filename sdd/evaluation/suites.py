"""What the ready suites ask of lm-eval: its tasks by name, how many examples are shown, and which metric counts.

`openllm_v1` is the OpenLLM Leaderboard v1 (Hugging Face, 2023-2024): its shots and its metric per task. Its MMLU is the
plain mean over the 57 subjects, where lm-eval weights them by their size: the leaderboard's about page says "average of
all the results acc", its maintainers say the same (discussion 185 of open-llm-leaderboard/open_llm_leaderboard, August
2023), and its front end took the mean of every accuracy named `hendrycksTest`.
`sdmprune_zero_shot` is the zero-shot set of SDMPrune (arXiv 2506.11120), length-normalised accuracy where a task has
it; CrowS-Pairs measures bias, lower is better, and so stands beside the average. `lm_eval` is any task by name.
Pure data; knows nothing of where rows come from or how tasks run.
"""

from dataclasses import dataclass

from sdd.errors import UserError


@dataclass(frozen=True)
class Asked:
    """One task or group of lm-eval. `shots` and `weight_by_size` None: as defined there; `metric` None: see
    `benchmark.chosen_metric`. `weight_by_size` says what a group's mean over its tasks is weighted by, if anything.
    """

    task: str
    shots: int | None = None
    metric: str | None = None
    weight_by_size: bool | None = None


ANY = "lm_eval"
SUITES = {
    "openllm_v1": (
        Asked("arc_challenge", 25, "acc_norm,none"),
        Asked("hellaswag", 10, "acc_norm,none"),
        Asked("truthfulqa_mc2", 0, "acc,none"),
        Asked("mmlu", 5, "acc,none", weight_by_size=False),
        Asked("winogrande", 5, "acc,none"),
        Asked("gsm8k", 5, "exact_match,strict-match"),
    ),
    "sdmprune_zero_shot": (
        Asked("arc_easy", 0, "acc_norm,none"),
        Asked("arc_challenge", 0, "acc_norm,none"),
        Asked("boolq", 0, "acc,none"),
        Asked("openbookqa", 0, "acc_norm,none"),
        Asked("piqa", 0, "acc_norm,none"),
        Asked("race", 0, "acc,none"),
        Asked("social_iqa", 0, "acc,none"),
        Asked("truthfulqa_mc2", 0, "acc,none"),
        Asked("winogrande", 0, "acc,none"),
        Asked("crows_pairs_english", 0, "pct_stereotype,none"),
    ),
    ANY: (),
}

HOMES = (
    *("arc", "hellaswag", "truthfulqa", "mmlu/default", "winogrande", "gsm8k", "super_glue/boolq", "openbookqa"),
    *("piqa", "race", "siqa", "crows_pairs"),
)
"""Folders of lm-eval's package that define the suites' tasks: the whole index of 14,000 names takes seconds to read."""

FOLDERS = {
    "truthfulqa_mc1": "truthfulqa_mc",
    "truthfulqa_mc2": "truthfulqa_mc",
    "crows_pairs_english": "crows_pairs",
}
"""Folder of local rows where it is not named after the task."""

REVISIONS = {
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "truthfulqa/truthful_qa": "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "openai/gsm8k": "740312add88f781978c0658806c59bc2815b9866",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
    "baber/piqa": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    "EleutherAI/race": "e30efe648089df42c548e93faa9c5f1816e2c44f",
}
"""Commits of hub datasets. A dataset that is not here is read at `main`, with a warning."""


def asked(suite: str, names: list[str] | None, num_fewshot: int | None) -> list[Asked]:
    """The tasks of a suite, or those of it that `names` keeps, in the suite's order; for `lm_eval` any names."""
    if suite == ANY:
        if not names:
            raise UserError(f"evaluation={ANY} needs names; add for example evaluation.tasks=[arc_easy,piqa]")
        return [Asked(name, num_fewshot) for name in sorted(set(names))]
    if num_fewshot is not None:
        raise UserError(f"evaluation.num_fewshot belongs to evaluation={ANY}; {suite} has its own number of examples")
    whole = SUITES[suite]
    for name in names or ():
        if name not in {task.task for task in whole}:
            known = ", ".join(task.task for task in whole)
            raise UserError(f"evaluation.tasks: {name} is not in {suite}; choose from {known}, or evaluation={ANY}")
    return [task for task in whole if names is None or task.task in names]
