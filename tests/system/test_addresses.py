"""Equal work has equal addresses: what is in the key of each stage, and what is not, for every setting there is."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import run
from omegaconf import DictConfig, OmegaConf

from sdd.cli.app import config_folder
from sdd.stages import graph
from sdd.study import Study

FOLLOWS = {
    "scores": {"pruned", "tuned", "evaluated"},
    "pruned": {"tuned", "evaluated"},
    "rewrites": {"targets", "tuned", "evaluated"},
    "answered": {"rewrites", "targets", "tuned", "evaluated"},
    "targets": {"tuned", "evaluated"},
    "taught": {"tuned", "evaluated"},
    "tuned": {"evaluated"},
    "evaluated": set(),
}
STAGES = set(FOLLOWS) - {"taught", "answered"}
FOLLOWS |= {"surprisals": {"damaged", "tuned", "evaluated"}}

Addresses = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def addresses(composed: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Addresses:
    """A function from overrides (groups) and values (settings) to the address of each stage of the full study."""
    memory = tmp_path_factory.mktemp("digests")
    known: dict[str, dict[str, str]] = {}

    def function(*groups: str, values: dict[str, Any] | None = None) -> dict[str, str]:
        key = json.dumps([groups, values])
        if key not in known or "path" in key:  # what lies at a path may have changed
            config = composed(*groups)
            for name, value in (values or {}).items():
                OmegaConf.update(config, name, value, force_add=True)
            wanted = graph.wanted(Study(config, memory), "evaluate")
            assert wanted is not None
            known[key] = {recipe.stage: recipe.address for recipe in wanted.walk()}
        return known[key]

    return function


def name_of(value: Any) -> str:
    """A test's name for a value, the same in every process: sets are written in an order of their own in each."""
    return str(sorted(value) if isinstance(value, set) else value)[:40]


def changed(a: dict[str, str], b: dict[str, str]) -> set[str]:
    return {stage for stage in a.keys() | b.keys() if a.get(stage) != b.get(stage)}


SAMPLING = {"engine.temperature": 0.7}
SEVERAL = {**SAMPLING, "engine.tries": 2}
JUDGED = {**SEVERAL, "finetune.choice": "judge", "judge.model": "m"}
RANDOM = ["metric=random"]
BY_TASK = {"metric.by": "task"}
REPAIRED = ["repair=ridge"]
SDM = ["metric=sdm", "pruning=mlp20"]
LOGITS = ["finetune=logit_distill"]
OWN = ["finetune=on_policy"]
WRITTEN = {"rollouts.backend": "transformers"}
CACHED = {"finetune.cached": "top_k"}

SERVED = {"evaluation.backend": "server", "evaluation.model": "m"}

IN_KEY: list[tuple[str, Any, set[str], list[str], dict[str, Any]]] = [
    # setting, another value, the first stages that change, groups and settings that both sides share
    ("calibration.num_texts", 5, {"scores"}, [], {}),
    ("calibration.max_length", 20, {"scores"}, [], {}),
    ("metric.contiguous", True, {"scores"}, ["metric=block_influence"], {}),
    ("metric.seed", 1, {"scores"}, RANDOM, {}),
    ("metric.keep_final", False, {"scores"}, ["metric=last_keep_final"], {}),
    ("metric.num_texts", 3, {"scores"}, ["metric=taylor"], {}),
    ("metric.by", "angular", {"scores"}, ["metric=greedy"], {}),
    ("metric.depth", 3, {"scores"}, ["metric=greedy"], {}),
    ("calibration.num_texts", 5, {"scores"}, ["metric=greedy"], BY_TASK),
    ("calibration.max_length", 20, {"scores"}, ["metric=greedy"], BY_TASK),
    ("dataset.system_prompt", "Be brief.", {"scores", "rewrites", "tuned"}, ["metric=greedy"], BY_TASK),
    ("dataset.seed", 1, {"scores", "rewrites"}, ["metric=greedy"], BY_TASK),
    ("model.dtype", "bfloat16", {"rewrites"}, ["metric=magnitude"], {}),
    ("metric.seed", 1, {"scores"}, ["metric=random_width", "pruning=mlp20"], {}),
    ("metric.first_cut", 0.1, {"scores"}, SDM, {}),
    ("metric.alpha", 0.5, {"scores"}, SDM, {}),
    ("metric.temperature", 0.7, {"scores"}, SDM, {}),
    ("pruning.ratio", 0.3, {"pruned"}, ["metric=taylor_width", "pruning=mlp20"], {}),
    ("pruning.ratio_of", "mlp", {"pruned"}, ["metric=taylor_width", "pruning=mlp20"], {}),
    ("pruning.multiple", 4, {"pruned"}, ["metric=taylor_width", "pruning=mlp20"], {}),
    ("pruning.ratio", 0.3, {"scores"}, SDM, {}),
    ("width_metric.seed", 1, {"pruned"}, ["metric@width_metric=random_width"], {"pruning.ratio": 0.2}),
    ("model.dtype", "bfloat16", {"scores", "rewrites"}, [], {}),
    ("pruning.size", 1, {"pruned"}, [], {}),
    ("pruning.keep", 0.3, {"pruned"}, ["pruning=n1"], {}),
    ("pruning.start", 1, {"pruned"}, [], {"pruning.blocks": None, "pruning.start": 0}),
    ("pruning.blocks", [0, 3], {"pruned"}, [], {"pruning.blocks": [0, 2]}),
    ("dataset.num_rows", 139, {"rewrites"}, [], {}),
    ("dataset.seed", 1, {"rewrites"}, [], {}),
    ("dataset.families", ["word"], {"rewrites"}, [], {}),
    ("dataset.register", "strong", {"rewrites"}, [], {}),
    ("dataset.reasoning", 0.5, {"rewrites"}, [], {}),
    ("dataset.template", "{prompt} {reference}", {"rewrites"}, [], {}),
    ("dataset.system_prompt", "Be brief.", {"rewrites", "tuned"}, [], {}),
    ("dataset.answer_rule", "none", {"targets"}, [], {}),
    ("dataset.leak_phrases", ["leak"], {"targets"}, [], {}),
    ("dataset.answer_rule", "none", {"rewrites"}, [], {**SAMPLING, "engine.tries": 2}),
    ("engine.max_new_tokens", 5, {"rewrites"}, [], {}),
    ("engine.max_prompt_tokens", 99, {"rewrites"}, [], {}),
    ("engine.temperature", 0.5, {"rewrites"}, [], {}),
    ("engine.top_p", 0.5, {"rewrites"}, [], SAMPLING),
    ("engine.tries", 2, {"rewrites"}, [], SAMPLING),
    ("engine.seed", 1, {"rewrites"}, [], SAMPLING),
    ("repair.penalty", 0.5, {"pruned"}, REPAIRED, {}),
    ("repair.method", "ridge", {"pruned"}, [], {}),
    ("calibration.num_texts", 5, {"pruned"}, [*REPAIRED, "metric=last"], {}),
    ("calibration.max_length", 20, {"pruned"}, [*REPAIRED, "metric=last"], {}),
    ("model.dtype", "bfloat16", {"pruned"}, [*REPAIRED, "metric=last", "finetune=sft"], {}),
    ("finetune.select", False, {"targets"}, [], {}),
    ("finetune.gold_share", 0.5, {"targets"}, [], {}),
    ("finetune.noise_share", 0.5, {"targets"}, [], {}),
    ("finetune.mode", "sft", {"targets"}, [], {}),
    ("finetune.mode", "logit_distill", {"targets"}, [], {}),
    ("finetune.ce_share", 0.5, {"tuned"}, LOGITS, {}),
    ("finetune.temperature", 2.0, {"tuned"}, LOGITS, {}),
    ("model.dtype", "bfloat16", {"tuned"}, [*LOGITS, "metric=last"], {}),
    ("finetune.loss", "jsd", {"tuned"}, [], {}),
    ("finetune.loss", {"jsd": 1.0, "cross_entropy": 0.5}, {"tuned"}, ["finetune=jsd"], {}),
    ("finetune.loss", "redi", {"targets"}, [], {}),
    ("finetune.cached", "top_k", {"taught"}, LOGITS, {}),
    ("finetune.cached", "sampled", {"taught"}, LOGITS, CACHED),
    ("finetune.cached_k", 5, {"taught"}, LOGITS, CACHED),
    ("finetune.cached_bits", 8, {"taught"}, LOGITS, CACHED),
    ("finetune.temperature", 2.0, {"taught"}, LOGITS, CACHED),
    ("finetune.max_length", 99, {"taught"}, LOGITS, CACHED),
    ("finetune.num_rows", 11, {"tuned"}, LOGITS, CACHED),
    ("pruning.size", 1, {"pruned"}, LOGITS, CACHED),
    ("seed", 1, {"tuned"}, LOGITS, CACHED),
    ("finetune.skew", 0.2, {"tuned"}, ["finetune=skew_kl"], {}),
    ("finetune.jsd_beta", 0.2, {"tuned"}, ["finetune=jsd"], {}),
    ("finetune.taid_start", 0.2, {"tuned"}, ["finetune=taid"], {}),
    ("finetune.clip_mass", 0.2, {"tuned"}, ["finetune=dac_kl"], {}),
    ("finetune.rejected_weight", 0.2, {"tuned"}, ["finetune=redi"], {}),
    ("finetune.request", "alone", {"rewrites"}, [], {}),
    ("finetune.request", "draft", {"answered", "rewrites"}, [], {}),
    ("finetune.mode", "on_policy", {"targets"}, [], {}),
    ("finetune.loss", "reverse_kl", {"tuned"}, OWN, {}),
    ("finetune.jsd_beta", 0.2, {"tuned"}, OWN, {}),
    ("finetune.student_share", 0.5, {"tuned"}, OWN, {}),
    ("finetune.student_share", 0.0, {"tuned"}, OWN, {}),
    ("finetune.rollout_tokens", [2, 9], {"tuned"}, OWN, {}),
    ("finetune.rollout_steps", 2, {"tuned"}, OWN, {}),
    ("finetune.rollout_temperature", 0.5, {"tuned"}, OWN, {}),
    ("rollouts.backend", "transformers", {"tuned"}, OWN, {}),
    ("rollouts.backend", "vllm", {"tuned"}, OWN, WRITTEN),
    ("finetune.epochs", 1, {"tuned"}, [], {}),
    ("finetune.learning_rate", 1e-4, {"tuned"}, [], {}),
    ("finetune.batch_size", 5, {"tuned"}, [], {}),
    ("finetune.max_length", 99, {"tuned"}, [], {}),
    ("finetune.num_rows", 11, {"tuned"}, [], {}),
    ("finetune.num_tokens", 50, {"tuned"}, [], {}),
    ("finetune.deduplicate", 0.8, {"tuned"}, [], {}),
    ("finetune.choose", "damage", {"surprisals"}, [], {}),
    ("finetune.weights", "damage", {"surprisals"}, [], {}),
    ("finetune.domains", "damage", {"surprisals"}, [], {}),
    ("finetune.weights", "damage", {"tuned"}, [], {"finetune.choose": "damage"}),
    ("finetune.choose_temperature", 0.0, {"tuned"}, [], {"finetune.choose": "damage"}),
    ("finetune.validation_rows", 5, {"tuned"}, [], {}),
    ("finetune.precision", "bf16", {"tuned"}, [], {}),
    ("finetune.warmup_share", 0.5, {"tuned"}, [], {}),
    ("finetune.weight_decay", 0.1, {"tuned"}, [], {}),
    ("finetune.clip_norm", 0.5, {"tuned"}, [], {}),
    ("finetune.keep", "best", {"tuned"}, [], {}),
    ("adapter.rank", 3, {"tuned"}, [], {}),
    ("adapter.alpha", 3, {"tuned"}, [], {}),
    ("adapter.dropout", 0.1, {"tuned"}, [], {}),
    ("adapter.targets", ["q_proj"], {"tuned"}, [], {}),
    ("adapter.method", "full", {"tuned"}, [], {}),
    ("adapter.scope", "last", {"tuned"}, [], {}),
    ("adapter.blocks", 2, {"tuned"}, ["adapter=lora_beside_cut"], {}),
    ("adapter.quantisation", "nf4", {"tuned"}, [], {}),
    ("seed", 1, {"tuned"}, [], {}),
    ("seed", 1, {"tuned"}, RANDOM, SAMPLING),
    ("evaluation.tasks", ["arithmetic"], {"evaluated"}, [], {}),
    ("evaluation.split", "test", {"evaluated"}, [], {}),
    ("evaluation.limit", 2, {"evaluated"}, [], {}),
    ("evaluation.seed", 1, {"evaluated"}, [], {}),
    ("evaluation.max_new_tokens", 5, {"evaluated"}, [], {}),
    ("evaluation.dtype", "bfloat16", {"evaluated"}, [], {}),
    ("evaluation.system_prompt", "Be brief.", {"evaluated"}, [], {}),
    ("evaluation.chat_template", False, {"evaluated"}, [], {}),
    ("finetune.same_rows", True, {"tuned"}, [], {}),
    ("finetune.choice", "shortest", {"rewrites"}, [], SEVERAL),
    ("finetune.choice", "most_likely", {"targets"}, [], {**SEVERAL, "finetune.choice": "shortest"}),
    ("finetune.choice", "judge", {"targets"}, [], {**JUDGED, "finetune.choice": "shortest"}),
    ("finetune.request", "alone", {"rewrites"}, [], JUDGED),
    ("judge.model", "another", {"targets"}, [], JUDGED),
    ("judge.template", "{prompt} {answers}", {"targets"}, [], JUDGED),
    ("judge.max_new_tokens", 5, {"targets"}, [], JUDGED),
    ("evaluation.backend", "vllm", {"evaluated"}, [], {}),
    ("evaluation.backend", "server", {"evaluated"}, [], {"evaluation.model": "m"}),
    ("evaluation.model", "another", {"evaluated"}, [], SERVED),
    ("evaluation.prompt_ids", False, {"evaluated"}, [], SERVED),
]

ANALYSIS = {"kind", "prompts", "num_prompts", "max_new_tokens", "dtype", "temperature", "draft_lengths", "repeats"}
ANALYSIS |= {"timed_lengths", "timed_prompts", "embedder", "embedder_revision", "context", "prompt_tokens"}
ANALYSIS |= {"new_tokens", "batch_size"}

NOT_IN_KEY: list[tuple[str, Any, list[str], dict[str, Any]]] = [
    ("trainer.accelerator", "gpu", [], {}),
    ("model.shape", {"num_hidden_layers": 3}, [], {}),
    ("trainer.devices", 2, [], {}),
    ("trainer.num_nodes", 2, [], {}),
    ("trainer.strategy", "fsdp", ["trainer.devices=2"], {}),
    ("trainer.device_map", "auto", [], {}),
    ("trainer.max_memory", {"cpu": "3MB"}, ["trainer.device_map=auto"], {}),
    ("trainer.threads", 2, [], {}),
    ("trainer.micro_batch_tokens", 99, [], {}),
    ("trainer.micro_batch_tokens", "auto", [], {}),
    ("trainer.inference_batch_size", 3, [], {}),
    ("trainer.inference_batch_size", "auto", [], {}),
    ("trainer.attention", "sdpa", [], {}),
    ("trainer.checkpoint_every", 7, [], {}),
    ("trainer.gradient_checkpointing", True, [], {}),
    ("repair.penalty", 0.5, [], {}),
    ("trainer.inference_batch_size", 3, REPAIRED, {}),
    ("adapter.blocks", 2, [], {}),
    ("adapter.rank", 3, ["adapter=full"], {}),
    ("engine.batch_size", 3, [], {}),
    ("engine.batch_size", "auto", [], {}),
    ("evaluation.batch_size", 3, [], {}),
    ("judge.base_url", "http://b/v1", [], JUDGED),
    ("judge.concurrency", 3, [], JUDGED),
    ("judge.retries", 3, [], JUDGED),
    ("judge.timeout", 3.0, [], JUDGED),
    ("judge.model", "another", [], {**JUDGED, "finetune.choice": "shortest"}),
    ("rollouts.backend", "transformers", ["finetune=logit_distill"], {}),
    ("rollouts.backend", "transformers", OWN, {"finetune.student_share": 0.0}),
    ("rollouts.base_url", "http://b/v1", OWN, WRITTEN),
    ("rollouts.concurrency", 3, OWN, WRITTEN),
    ("rollouts.retries", 3, OWN, WRITTEN),
    ("rollouts.timeout", 3.0, OWN, WRITTEN),
    ("evaluation.batch_size", "auto", [], {}),
    ("evaluation.base_url", "http://b/v1", [], SERVED),
    ("evaluation.concurrency", 3, [], SERVED),
    ("evaluation.retries", 3, [], SERVED),
    ("evaluation.timeout", 3.0, [], SERVED),
    ("paths.artifacts", "elsewhere", [], {}),
    ("store.missing", "raise", [], {}),
    ("dry_run", True, [], {}),
    ("fetch", True, [], {}),
    ("allow", "mine.metrics.Middle", [], {}),
    ("dataset.name", "renamed", [], {}),
    ("engine.seed", 1, [], {}),
    ("dataset.template", "{prompt}", ["finetune=sft"], {}),
    ("dataset.answer_rule", "none", ["finetune=sft"], {}),
    ("finetune.request", "draft", ["finetune=sft"], {}),
    ("finetune.select", False, ["finetune=sft"], {}),
    ("finetune.choice", "shortest", ["finetune=sft"], SEVERAL),
    ("finetune.gold_share", 0.5, ["finetune=sft"], {}),
    ("finetune.noise_share", 0.5, ["finetune=sft"], {}),
    ("finetune.ce_share", 0.5, [], {}),
    ("finetune.choose_temperature", 0.0, [], {"finetune.weights": "damage"}),
    ("finetune.temperature", 2.0, [], {}),
    ("finetune.loss", "cross_entropy", [], {}),
    ("finetune.loss", "forward_kl", LOGITS, {}),
    ("finetune.skew", 0.2, ["finetune=jsd"], {}),
    ("finetune.student_share", 0.5, LOGITS, {}),
    ("finetune.rollout_tokens", [2, 9], [], {}),
    ("finetune.rollout_steps", 2, LOGITS, {}),
    ("finetune.rollout_temperature", 0.5, ["finetune=sft"], {}),
    ("finetune.rollout_steps", 2, OWN, {"finetune.student_share": 0.0}),
    ("finetune.cached", "top_k", [], {}),
    ("finetune.cached_k", 5, LOGITS, {}),
    ("finetune.cached_bits", 8, LOGITS, {"finetune.cached": "sampled"}),
    ("dataset.template", "{prompt}", LOGITS, {}),
    ("dataset.template", "{prompt} {reference}", ["finetune=corrected"], {}),
    ("dataset.answer_rule", "none", ["finetune=teacher_answers"], {}),
    ("finetune.noise_share", 0.5, LOGITS, {}),
    ("engine.max_new_tokens", 5, ["finetune=sft"], {}),
    ("engine.temperature", 0.5, ["finetune=sft"], {}),
    ("calibration.num_texts", 5, RANDOM, {}),
    ("calibration.num_texts", 5, ["metric=magnitude"], {}),
    ("calibration.num_texts", 5, ["metric=taylor"], {"metric.num_texts": 4}),
    ("calibration.num_texts", 5, ["metric=magnitude_width", "pruning=mlp20"], {}),
    ("metric.alpha", 0.4, SDM, {}),
    ("pruning.ratio_of", "mlp", [], {}),
    ("pruning.multiple", 4, [], {}),
    ("calibration.max_length", 20, ["metric=last"], {}),
    ("metric.contiguous", True, ["metric=block_influence"], {"pruning.blocks": [1]}),
    ("calibration.num_texts", 5, [], {"pruning.start": 1}),
]

HUB = ("repository", "revision", "files", "stream")
ELSEWHERE = {
    *("model.path", "model.revision", "teacher.path", "teacher.revision", "metric._target_", "calibration._target_"),
    *(f"{group}.hub.{key}" for group in ("calibration", "dataset") for key in HUB),
    *("calibration.seed", "dataset.fields", "calibration.path", "dataset._target_", "dataset.path", "engine._target_"),
    "evaluation.suite",
    "pruning.after",  # test_cut_twice.py
    *(f"merge.{key}" for key in ("method", "students", "t", "space", "weights", "density")),  # test_merged_students.py
    *("evaluation.data_dir", "evaluation.num_fewshot"),  # tests/system/test_benchmark.py
    *(f"analysis.{key}" for key in ANALYSIS),  # tests/system/test_analyses.py
}
"""Settings with tests of their own below, or with one value so far."""


@pytest.mark.parametrize(("key", "value", "first", "groups", "shared"), IN_KEY, ids=name_of)
def test_setting_is_in_the_key(
    key: str, value: Any, first: set[str], groups: list, shared: dict, addresses: Addresses
) -> None:
    expected = first | {stage for start in first for stage in FOLLOWS[start]}
    assert (
        changed(addresses(*groups, values=shared), addresses(*groups, values={**shared, key: value}))
        - {
            # leaving self-distillation, the rewrites go
            *({"rewrites"} if key == "finetune.mode" else ()),
        }
        == expected
    )


@pytest.mark.parametrize(("key", "value", "groups", "shared"), NOT_IN_KEY, ids=name_of)
def test_setting_is_not_in_the_key(key: str, value: Any, groups: list, shared: dict, addresses: Addresses) -> None:
    assert addresses(*groups, values=shared) == addresses(*groups, values={**shared, key: value})


def test_every_setting_is_accounted_for(composed: Callable[..., DictConfig]) -> None:
    def leaves(node: Any, prefix: str = "") -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{key}.")
            elif value != {}:
                yield f"{prefix}{key}"

    plain = {name: node for name, node in OmegaConf.to_container(composed()).items() if name != "hydra"}
    settings = set(leaves(plain)) | {"metric.contiguous", "metric.seed", "model.shape", "width_metric.seed"}
    settings |= {"metric.keep_final", "metric.num_texts", "metric.by", "metric.depth"}
    settings |= {"metric.first_cut", "metric.alpha", "metric.temperature"}
    accounted = {row[0] for row in IN_KEY} | {row[0] for row in NOT_IN_KEY} | ELSEWHERE
    assert settings == accounted


@pytest.mark.parametrize(
    "groups",
    [
        *(["trainer=gpu"], ["trainer=ddp"], ["trainer=fsdp", "trainer.devices=2"]),
        *(["logger=wandb"], ["logger=tensorboard"], ["logger=wandb", "logger.project=other"]),
    ],
)
def test_option_is_not_in_the_key(groups: list[str], addresses: Addresses) -> None:
    assert addresses() == addresses(*groups)


def test_forward_kl_with_cross_entropy_is_said_in_two_ways_and_is_the_same_work(addresses: Addresses) -> None:
    mixed = {"finetune.loss": {"cross_entropy": 0.25, "forward_kl": 0.75}}
    assert addresses(*LOGITS, values=mixed) == addresses(*LOGITS, values={"finetune.ce_share": 0.25})
    assert addresses(values=mixed)["targets"] == addresses()["targets"], "whoever wrote the answers"


def test_metric_is_in_the_key(addresses: Addresses) -> None:
    found = {metric: addresses(f"metric={metric}") for metric in ("angular", "block_influence", "random", "last")}
    for stage in ("scores", "pruned", "tuned", "evaluated"):
        assert len({one[stage] for one in found.values()}) == 4
    assert len({one["rewrites"] for one in found.values()}) == 1


def test_greedy_and_iterative_by_the_same_measure_are_the_same_work(addresses: Addresses) -> None:
    assert addresses("metric=iterative", values={"metric.by": "perplexity"}) == addresses("metric=greedy")
    assert addresses("metric=last_keep_final")["scores"] != addresses("metric=last")["scores"]


def test_renamed_option_is_the_same_work(small: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own" / "metric"
    own.mkdir(parents=True)
    shutil.copyfile(config_folder() / "metric" / "angular.yaml", own / "mine.yaml")
    shutil.copytree(Path(small[0].removeprefix("--config-dir=")) / "experiment", tmp_path / "own" / "experiment")
    words = [f"--config-dir={tmp_path / 'own'}", "experiment=small", "dry_run=true"]
    plain, renamed = (run("prune", *words, *more, cwd=tmp_path) for more in ([], ["metric=mine"]))
    assert plain.code == renamed.code == 0
    assert plain.stdout == renamed.stdout


def walked(config: DictConfig, memory: Path) -> list[Any]:
    wanted = graph.wanted(Study(config, memory), "prune")
    assert wanted is not None
    return list(wanted.walk())


def test_second_stage_shares_the_first_with_its_ablation(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    alone = walked(composed("metric=taylor_width", "pruning=mlp20"), tmp_path)
    first, second, cut = walked(composed("metric=sdm", "pruning=mlp30"), tmp_path)
    assert first.address == alone[0].address
    assert second.inputs == {"first": first}
    assert cut.inputs == {"scores": second}
    assert second.spec["metric"] | {"_target_": ""} == {
        "_target_": "",
        "first_cut": 0.025,
        "alpha": 0.42,
        "temperature": 0.5,
    }


def test_depth_goes_before_width(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    """The channels are scored on what the depth cut left; the original is the second stage's teacher."""
    depth = walked(composed("pruning=n2"), tmp_path)
    both = walked(composed("pruning=n2", "metric@width_metric=sdm", "pruning.ratio=0.2"), tmp_path)
    assert [recipe.address for recipe in both[:2]] == [recipe.address for recipe in depth]
    _, between, first, second, cut = both
    assert first.inputs == {"pruned": between}
    assert "model" not in first.spec
    assert second.inputs == {"pruned": between, "first": first}
    assert second.spec["model"] == between.spec["model"]
    assert cut.inputs == {"scores": second, "pruned": between}
    assert cut.labels["metric"] == "angular+sdm"
    listed = walked(composed("metric=taylor_width", "pruning.blocks=[1]", "pruning.ratio=0.2"), tmp_path)
    assert [recipe.stage for recipe in listed] == ["pruned", "scores", "pruned"]


def test_experiment_over_several_sizes_shares_scores(addresses: Addresses) -> None:
    sizes = [addresses(f"pruning=n{size}") for size in (1, 2, 3)]
    assert len({one["scores"] for one in sizes}) == 1
    assert len({one["pruned"] for one in sizes}) == 3


# ---- models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "another" / "place"))


def test_model_that_moved_is_the_same(addresses: Addresses, moved: Path) -> None:
    (moved / "README.md").write_text("a note beside the model\n")
    assert addresses() == addresses(values={"model.path": str(moved)})


def _append_token(moved: Path) -> None:
    path = moved / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 3]}))


def _flip_weight(moved: Path) -> None:
    path = moved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit_config(moved: Path) -> None:
    path = moved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def _edit_template(moved: Path) -> None:
    path = moved / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def _edit_tokenizer(moved: Path) -> None:
    path = moved / "tokenizer.json"
    path.write_text(path.read_text() + " ")


CONTENTS = [_append_token, _flip_weight, _edit_config, _edit_template, _edit_tokenizer]


@pytest.mark.parametrize("change", CONTENTS, ids=lambda function: function.__name__)
def test_content_of_a_model_is_in_the_key(change: Callable, addresses: Addresses, moved: Path) -> None:
    change(moved)
    assert changed(addresses(), addresses(values={"model.path": str(moved)})) == STAGES


@pytest.mark.parametrize("metric", ["random", "last"])
def test_controls_depend_on_the_number_of_blocks_only(metric: str, addresses: Addresses, moved: Path) -> None:
    _flip_weight(moved)
    before, after = addresses(f"metric={metric}"), addresses(f"metric={metric}", values={"model.path": str(moved)})
    assert before["scores"] == after["scores"]
    assert before["pruned"] != after["pruned"]


def test_teacher_is_in_the_key_of_the_rewrites_alone(addresses: Addresses, moved: Path) -> None:
    assert addresses(values={"teacher.path": str(moved)}) == addresses()
    _flip_weight(moved)
    assert changed(addresses(), addresses(values={"teacher.path": str(moved)})) == {"rewrites", *FOLLOWS["rewrites"]}
    assert addresses("finetune=sft", values={"teacher.path": str(moved)}) == addresses("finetune=sft")
    distilled = addresses(*LOGITS, values={"teacher.path": str(moved)})
    assert changed(addresses(*LOGITS), distilled) == {"tuned", "evaluated"}, "whose logits"


def test_what_is_off_adds_nothing_to_a_key(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    """Shares of nothing and the settings of another arm: addresses made before they existed are still good."""
    wanted = graph.wanted(Study(composed(), tmp_path), "evaluate")
    assert wanted is not None
    by_stage = {recipe.stage: recipe.spec for recipe in wanted.walk()}
    assert set(by_stage["targets"]) == {"mode", "rule", "leak_phrases", "select", "gold_share"}
    assert not set(by_stage["tuned"]["finetune"]) & {"noise_share", "ce_share", "temperature"}
    assert "distillation" not in by_stage["tuned"]


# ---- spans and lists of blocks, data ------------------------------------------------------------------------------


def test_given_blocks_need_no_metric(addresses: Addresses) -> None:
    plain = addresses(values={"pruning.blocks": [1, 2]})
    assert "scores" not in plain
    for groups in (["metric=random"], ["metric=block_influence"]):
        assert addresses(*groups, values={"pruning.blocks": [2, 1]}) == plain
    assert addresses(values={"pruning.start": 1, "pruning.size": 2}) == plain


def test_same_texts_from_a_file_are_the_same(addresses: Addresses, tmp_path: Path) -> None:
    def scored(name: str, lines: list[str]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        values = {"calibration.path": str(tmp_path / name), "calibration.num_texts": 2}
        return addresses("calibration=local", "calibration.path=x", values=values)["scores"]

    first = scored("a.jsonl", ["some text", "more text"])
    assert scored("b.jsonl", ["some text", "more text", "text that is not used"]) == first
    assert scored("c.jsonl", ["some text", "more texts"]) != first


def test_rows_of_a_file_are_named_by_content(addresses: Addresses, tmp_path: Path) -> None:
    def targeted(name: str, reference: str) -> dict[str, str]:
        rows = [{"prompt": f"p{n}", "reference": reference} for n in range(30)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"dataset.path": str(tmp_path / name), "dataset.num_rows": None}
        return addresses("dataset=local", "dataset.path=x", values=values)

    first = targeted("a.jsonl", "r")
    assert targeted("b.jsonl", "r") == first
    assert changed(targeted("c.jsonl", "s"), first) == {"rewrites", *FOLLOWS["rewrites"]}


def test_unpruned_student_and_teacher(addresses: Addresses) -> None:
    assert set(addresses("pruning=none", "finetune=none")) == {"evaluated"}
    assert set(addresses("pruning=none", "finetune=sft")) == {"targets", "tuned", "evaluated"}
    assert set(addresses("finetune=none")) == {"scores", "pruned", "evaluated"}
    plain = addresses("pruning=none", "finetune=none")
    assert addresses("pruning=none", "finetune=none", "metric=random", values={"seed": 3}) == plain
