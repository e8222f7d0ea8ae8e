"""A dry run of what lies on a hub: nothing is fetched, nothing heavy imported, and every artifact has an estimate."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from launching import REPOSITORY, run, subprocess_run
from test_scripts import HEAVY, RUN_AND_LIST

from sdd.cli.app import config_folder
from sdd.planning import price
from sdd.planning.cost_model import shape_of
from sdd.planning.estimates import PROCESS, Estimate, Training
from sdd.planning.price import Passed, Price
from sdd.stages import evaluated as evaluated_stage
from sdd.stages import graph
from sdd.stages import targets as targets_stage
from sdd.stages import tuned as tuned_stage
from sdd.stages.dry_run import by_gpu, by_way, estimate, lines, planned, summary
from sdd.stages.priced import Paid, expected
from sdd.stages.sizes import Sizes
from sdd.store import Recipe, Store
from sdd.study import Study

UNFETCHED = "model=smollm2_135m_instruct"


def test_unfetched_model_is_planned_without_the_hub_and_without_torch(tmp_path: Path) -> None:
    """What lm-eval's tasks are is known to lm-eval alone, which an evaluation's plan imports."""
    path = str(REPOSITORY / "train.py")
    words = ["-c", RUN_AND_LIST, path, json.dumps(HEAVY), UNFETCHED, "dry_run=true"]
    outcome = subprocess_run(words, tmp_path, HF_HOME=str(tmp_path / "empty"), HF_ENDPOINT="http://127.0.0.1:9")
    assert outcome.code == 0, outcome.stderr
    *planned, imported = outcome.lines
    assert imported == "imported []"
    stages = [line.split()[3].split("/")[0] for line in planned]
    assert sorted(stages) == ["pruned", "rewrites", "scores", "targets", "tuned"]
    for line in planned:
        assert re.match(r"would be built +[a-z]+/\?[0-9a-f]{16} +~\d.* (s|min|h), .* memory, .* disk", line), line
    (cut,) = [line for line in planned if "pruned/" in line.split("<-")[0]]
    assert "0.25 GB disk" in cut  # 28 of 30 blocks of 3,540,096 weights, embeddings, two bytes each
    assert "about " in outcome.stderr and "within a factor of 3" in outcome.stderr
    assert not (tmp_path / "artifacts").exists()
    assert not (tmp_path / "empty").exists()


def test_evaluation_of_an_unfetched_model_is_planned(tmp_path: Path) -> None:
    outcome = run("evaluate", UNFETCHED, "dry_run=true", cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    stages = [line.split()[3].split("/")[0] for line in outcome.lines]
    assert sorted(stages) == ["evaluated", "pruned", "rewrites", "scores", "targets", "tuned"]


def test_bad_cut_of_an_unfetched_model_is_told(tmp_path: Path) -> None:
    outcome = run("prune", UNFETCHED, "pruning.size=30", "dry_run=true", cwd=tmp_path)
    assert outcome.errors == ["error: pruning.size=30 removes all 30 blocks; choose at most 29"]


def test_hub_model_without_sizes_says_how_to_get_it(tmp_path: Path) -> None:
    outcome = run("prune", "model=local", "model.path=nobody/nothing", "dry_run=true", cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.errors == [
        "error: model.path=nobody/nothing: not in the Hugging Face cache; fetch it with: hf download nobody/nothing"
    ]


def test_sweep_counts_what_jobs_share_once(tmp_path: Path) -> None:
    words = ["-m", UNFETCHED, "pruning=n1,n2", "finetune=none", "metric=last", "dry_run=true", "hydra.sweep.dir=sweep"]
    outcome = run("prune", *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert len(outcome.lines) == 4
    assert "the whole sweep: 3 artifacts to build" in outcome.stderr
    assert re.search(r"by several workers, .*: about \S+ \w+ by 2, \S+ \w+ by 4, \S+ \w+ by 8", outcome.stderr)


# ---- the counts behind the estimates -----------------------------------------------------------------------------

CELL = ["experiment=paper/cell", "metric=last", "dry_run=true"]
LORA_BLOCK = 1_310_720
"""Weights of LoRA of rank 16 on the seven linear layers of a block of Llama 3.1 8B."""
SMALLER = (2048, 1024, 512)
"""Tokens of a training pass, of 4,096."""


def counts(tmp_path: Path, *overrides: str) -> tuple[Sizes, Study]:
    """Of one cell of the paper's table: Llama 3.1 8B without its last 6 of 32 blocks."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("config", [*CELL, *overrides])
    GlobalHydra.instance().clear()
    study = Study(config, tmp_path)
    return Sizes(study), study


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Training(26 * LORA_BLOCK, 26)),
        (["adapter.rank=4", "adapter.targets=[q_proj,v_proj]"], Training(26 * 4 * (8192 + 5120), 26)),
        (["adapter=lora_last"], Training(4 * LORA_BLOCK, 4)),
        (["adapter=lora_beside_cut"], Training(2 * LORA_BLOCK, 26)),
        (["adapter=lora_beside_cut", "pruning.start=20"], Training(2 * LORA_BLOCK, 7)),
        (["adapter=lora_beside_cut", "pruning.start=26"], Training(LORA_BLOCK, 1)),
        (["adapter=lora_beside_cut", "pruning.blocks=[8,20]"], Training(4 * LORA_BLOCK, 23)),
        (["adapter=qlora"], Training(26 * LORA_BLOCK, 26, four_bit=True)),
        (["adapter=head_and_norms"], Training(525_553_664)),
        (["adapter=full"], Training(6_721_589_248, whole=True)),
        (["trainer.gradient_checkpointing=true"], Training(26 * LORA_BLOCK, 26, recomputed=True)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_adapter_is_counted_as_what_it_trains(overrides: list[str], expected: Training, tmp_path: Path) -> None:
    assert tuned_stage.training(counts(tmp_path, *overrides)[0]) == expected


@pytest.mark.parametrize(
    ("overrides", "rows", "prompt", "answer"),
    [
        ([], 7400, 235, 287),
        (["dataset.num_rows=null"], 7473, 235, 287),
        (["dataset=openmathinstruct2", "dataset.num_rows=20000"], 20000, 258, 1112),
        (
            [
                *("dataset=mixture", "dataset.num_rows=20000", "dataset.parts.dolly.weight=3"),
            ],
            20000,
            (235 + 3 * 425) / 4,
            (287 + 3 * 358) / 4,
        ),
    ],
    ids=["sample", "whole", "streamed", "mixture"],
)
def test_rows_on_the_hub_are_counted_by_what_is_typical_of_them(
    overrides: list[str], rows: int, prompt: float, answer: float, tmp_path: Path
) -> None:
    """Though a sample of them is asked for, whose rows only the hub knows."""
    found, _ = counts(tmp_path, *overrides)
    assert (found.rows, found.prompt, found.answer) == (rows, prompt / 4 + 30, answer / 4)


def tuned(tmp_path: Path, *overrides: str) -> Estimate:
    found, study = counts(tmp_path, *overrides)
    return estimate(found, tuned_stage.recipe(study))


def test_a_teacher_beside_the_student_is_opened_held_and_run_forward(checkpoint: Path, tmp_path: Path) -> None:
    """2 epochs of 7,200 rows of 160.5 tokens, 4,096 together, each token through 32 blocks and the head; 16 GB held."""
    alone, taught = (tuned(tmp_path, f"finetune={mode}") for mode in ("sft", "logit_distill"))
    tokens = 2 * 7200 * 160.5
    flops = 32 * (2 * 218_112_000 + 4 * 80.25 * 4096) + 2 * 4096 * 128_256
    passed = tokens * flops / 2.5e14 + tokens / 4096 * 32 * 8e-4
    assert taught.seconds - alone.seconds == pytest.approx(2 * 8.030261248 + passed)
    logits = 2 * 256 * 128_256 * 2 * 2  # of a chunk, the student's in either
    assert taught.memory - alone.memory == pytest.approx(2 * 8_030_261_248 + 4096 * 2 * 4096 + logits)
    assert taught.disk == alone.disk
    compared = tuned(tmp_path, "finetune=hidden_states")
    assert compared.memory - taught.memory == pytest.approx(26 * 4096 * 2 * 4096), "the teacher's states of every block"
    other = tuned(tmp_path, "finetune=logit_distill", f"teacher.path={checkpoint}")
    logits = 2 * 256 * json.loads((checkpoint / "config.json").read_text())["vocab_size"] * 2 * 2
    assert other.memory - alone.memory == pytest.approx(2 * 55_584 + 4096 * 2 * 32 + logits), "a smaller teacher"


def test_what_a_student_writes_takes_a_pass_a_token_and_window(tmp_path: Path) -> None:
    """7,200 rows in windows of 32 or of 64 rows, 40 tokens each, through 26 blocks; without a share, nothing."""
    words = ["finetune.epochs=1", "trainer.inference_batch_size=64"]
    own = ["finetune=on_policy", "finetune.rollout_tokens=[40,40]", *words]
    assert tuned(tmp_path, *own, "finetune.student_share=0") == tuned(tmp_path, "finetune=logit_distill", *words)
    one, two = (tuned(tmp_path, *own, f"finetune.rollout_steps={steps}") for steps in (1, 2))
    assert one.seconds - two.seconds == pytest.approx((225 - 113) * 40 * 26 * 8e-4)
    grown = tuned(tmp_path, *own, "finetune.rollout_tokens=[20,40]")
    assert grown.seconds < one.seconds - 225 * 4.9 * 26 * 8e-4, "35 tokens on average"


def test_kept_logits_take_disk_once_and_no_teachers_memory(tmp_path: Path) -> None:
    """8B at the 64 likeliest of 128,256 tokens: 4 bytes each, 2 a class; the student alone is in memory."""
    cached = ["finetune=logit_distill", "finetune.cached=top_k"]
    alone, beside = (tuned(tmp_path, f"finetune={mode}") for mode in ("sft", "logit_distill"))
    assert tuned(tmp_path, *cached).memory == pytest.approx(alone.memory, rel=0.05)
    assert beside.memory > alone.memory + 16e9
    for more, size in (([], 64 * 4 + 65 * 2), (["finetune.cached=sampled"], 64 * 4 + 4)):
        found, study = counts(tmp_path, *cached, *more)
        (recipe,) = (one for one in tuned_stage.recipe(study).walk() if one.stage == "taught")
        kept = estimate(found, recipe)
        assert kept.disk == pytest.approx(found.rows * found.answer * size)
        assert 2 * 8_030_261_248 < kept.memory < 2 * 8_030_261_248 + 6e9


PROMPT, ANSWER, ROWS = 235 / 4 + 30, 287 / 4, 7200
"""Tokens of GSM8K's prompts and answers, rows of an epoch; two epochs."""


def priced(tmp_path: Path, *overrides: str) -> Price:
    found, study = counts(tmp_path, *overrides)
    return expected(found, tuned_stage.recipe(study), {})


def test_a_recovery_is_priced_before_it_is_begun(tmp_path: Path) -> None:
    """26 of 32 blocks trained; the teacher's part is that of 32 blocks, written once or passed in every epoch."""
    study, passed = counts(tmp_path)[1], Passed(2 * ROWS, PROMPT + ANSWER, ANSWER)
    shape, template = shape_of(study.models.sizes), study.config.dataset.template
    sft = priced(tmp_path, "finetune=sft")
    assert sft == Price(pytest.approx(price.trained(shape, 26, passed, 26 * LORA_BLOCK)), 0)
    beside = pytest.approx(price.forward(shape, 32, passed))
    assert priced(tmp_path, "finetune=logit_distill") == Price(sft.student, beside)
    states = pytest.approx(price.forward(shape, 32, passed, head=False))
    assert priced(tmp_path, "finetune=hidden_states") == Price(sft.student, states)
    kept = priced(tmp_path, "finetune=logit_distill", "finetune.cached=top_k")
    assert kept == Price(sft.student, pytest.approx(price.forward(shape, 32, replace(passed, rows=ROWS))))
    alone = priced(tmp_path, "finetune=teacher_answers")
    assert alone == Price(sft.student, pytest.approx(price.written(shape, 32, ROWS, PROMPT, ANSWER)))
    asked = PROMPT + ANSWER + (len(template) - len("{prompt}{reference}")) / 4
    assert priced(tmp_path).teacher == pytest.approx(price.written(shape, 32, ROWS, asked, ANSWER))
    tries = ["engine.tries=4", "engine.temperature=0.7", "finetune.choice"]
    shortest, weighed = (priced(tmp_path, *tries[:2], f"{tries[2]}={choice}") for choice in ("shortest", "most_likely"))
    assert shortest.teacher == pytest.approx(4 * price.written(shape, 32, ROWS, asked, ANSWER))
    passes = price.forward(shape, 32, replace(passed, rows=4 * ROWS))
    assert weighed == Price(sft.student, pytest.approx(shortest.teacher + passes))
    drafts = priced(tmp_path, "finetune=corrected").student - sft.student
    assert drafts == pytest.approx(price.written(shape, 26, ROWS, PROMPT, ANSWER))
    own = priced(tmp_path, "finetune=on_policy", "finetune.student_share=0.5", "finetune.rollout_tokens=[40,40]")
    mixed = replace(passed, tokens=PROMPT + (ANSWER + 40) / 2, targets=(ANSWER + 40) / 2)
    student = price.trained(shape, 26, mixed, 26 * LORA_BLOCK) + price.written(shape, 26, ROWS, PROMPT, 40)
    assert own == Price(pytest.approx(student), pytest.approx(price.forward(shape, 32, mixed)))


def test_what_two_recoveries_share_is_paid_once(tmp_path: Path) -> None:
    found, study = counts(tmp_path, "finetune.num_rows=1000")
    recipe, paid = tuned_stage.recipe(study), Paid()
    first, second = (expected(found, recipe, paid) for _ in range(2))
    assert (first.student, second.teacher) == (second.student, 0) and first.teacher > 0
    more, study = counts(tmp_path, "finetune.num_rows=1500")
    assert expected(more, tuned_stage.recipe(study), paid).teacher == pytest.approx(first.teacher / 2)


def test_a_sweep_tells_ways_by_their_price() -> None:
    def plan(*prices: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"artifact": "pruned/a"}, *({"price": {"student": a, "teacher": b}} for a, b in prices)]

    jobs = [("self_distill", plan((2e9, 3e9))), ("none", plan()), ("sft", plan((2e9, 0))), ("gold", plan((2e9, 0)))]
    assert by_way([*jobs, ("self_distill", plan((2e9, 3e9), (2e9, 0)))]) == [
        "recovery by finetune=sft,gold: about 2 G FLOPs",
        "recovery by finetune=self_distill: about 2 G + 3 G to 4 G + 3 G FLOPs",
    ]


SERVED = {
    "rewrites": ["engine=openai", "~engine.batch_size", "engine.base_url=http://a/v1", "engine.model=m"],
    "evaluated": ["evaluation.backend=server", "evaluation.base_url=http://a/v1", "evaluation.model=m"],
}


@pytest.mark.parametrize("stage", SERVED)
def test_what_a_server_computes_takes_no_memory_here_and_nobody_knows_how_long(stage: str, tmp_path: Path) -> None:
    plans = []
    for words in ([], SERVED[stage]):
        _, study = counts(tmp_path, *words)
        wanted = graph.wanted(study, "evaluate")
        assert wanted is not None
        plans.append(planned(wanted, study, Store(tmp_path)))
    here, there = ({one.recipe.stage: one for one in plan} for plan in plans)
    assert there[stage].estimate == Estimate(0, PROCESS, here[stage].estimate.disk, on_cpu=True, elsewhere=True)
    assert here[stage].estimate.memory > 13e9 and not here[stage].estimate.elsewhere
    assert there[stage].fits == {} != here[stage].fits
    (line,) = (line for line in lines(plans[1]) if f" {stage}/" in line.split("<-")[0])
    assert " a server's time, 0.3 GB memory, " in line
    told = [summary([one.record() for one in plan]) for plan in plans]
    assert "server" not in told[0] and " and what servers take, at most " in told[1]


def test_tries_that_the_teacher_weighs_take_a_pass_each(tmp_path: Path) -> None:
    """4 tries of 7,400 rows, each as long as a prompt and an answer in the teacher's own words, with its weights."""
    told = []
    for choice in ("shortest", "most_likely"):
        words = ["engine.tries=4", "engine.temperature=0.7", f"finetune.choice={choice}"]
        found, study = counts(tmp_path, *words)
        told.append(estimate(found, targets_stage.recipe(study)))
    shortest, weighed = told
    passed = found.shown("bfloat16", 4 * 7400, found.prompt + found.written)
    assert shortest.on_cpu and not weighed.on_cpu
    assert (weighed.memory, weighed.disk) == (passed.memory, shortest.disk) and weighed.memory > 16e9
    assert weighed.seconds == shortest.seconds + passed.seconds > 10 * shortest.seconds


def test_what_does_not_fit_in_a_gpu_is_said_with_the_settings_that_would(tmp_path: Path) -> None:
    """13.4 GB of weights, 0.6 of LoRA, 6 GB for 1,024 tokens: no row has more, so that fewer a pass take no less."""
    found, study = counts(tmp_path)
    recipe = tuned_stage.recipe(study)
    plan = planned(recipe, study, Store(tmp_path))
    fits = {one.recipe.stage: one.fits for one in plan}
    as_it_is = {24: {}, 48: {}, 80: {}}
    assert fits["scores"] == fits["targets"] == fits["pruned"] == {}, "no model is looked at"
    assert (fits["rewrites"], fits["tuned"]) == (as_it_is, as_it_is | {24: {"trainer.micro_batch_tokens": 1024}})
    assert " 39 GB memory [48, 80; 24: trainer.micro_batch_tokens=1024], " in lines(plan)[-1]
    words = by_gpu([one.record() for one in plan])
    assert words[0] == "in 24 GB: tuned with trainer.micro_batch_tokens=1024, the rest as it is"
    assert words[1:] == ["in 48 GB: all as it is", "in 80 GB: all as it is"]
    memory = {
        tokens: estimate(found.given({"trainer.micro_batch_tokens": tokens}), recipe).memory for tokens in SMALLER
    }
    assert memory[2048] > 24e9 > memory[1024] == memory[512]


def evaluated(tmp_path: Path, *overrides: str) -> Estimate:
    found, study = counts(tmp_path, *overrides)
    return estimate(found, evaluated_stage.recipe(study, graph.student(study)))


@pytest.mark.parametrize(
    ("overrides", "items"),
    [
        ([], 1172 + 10042 + 817 + 14042 + 1267 + 1319),
        (["evaluation.limit=2"], 5 * 2 + 57 * 2),
        (["evaluation.limit=100"], 5 * 100 + 57 * 100),
        (["evaluation.tasks=[mmlu,gsm8k]", "evaluation.limit=10"], 570 + 10),
        (["evaluation=lm_eval", "evaluation.tasks=[mmlu]", "evaluation.limit=10"], 570),
        (["evaluation=lm_eval", "evaluation.tasks=[ai2_arc]"], 1172 + 2376),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_limit_holds_for_every_task_of_a_group(overrides: list[str], items: int, tmp_path: Path) -> None:
    assert evaluated(tmp_path, *overrides).disk == 2e3 * items


@pytest.mark.parametrize(
    ("task", "shots", "least", "most"), [("hellaswag", 10, 3, 11), ("mmlu", 5, 1.01, 1.3)], ids=["drawn", "the same"]
)
def test_examples_shown_are_in_every_request(task: str, shots: int, least: float, most: float, tmp_path: Path) -> None:
    """By name alone lm-eval shows none. Those of MMLU are the same before all items of a subject, and computed once."""
    ready = evaluated(tmp_path, f"evaluation.tasks=[{task}]")
    named = ["evaluation=lm_eval", f"evaluation.tasks=[{task}]"]
    assert evaluated(tmp_path, *named, f"evaluation.num_fewshot={shots}") == ready
    assert least < ready.seconds / evaluated(tmp_path, *named).seconds < most


def test_no_student_is_opened_in_32_bits(tmp_path: Path) -> None:
    """LoRA is merged a layer at a time: 13.4 GB in bfloat16 either way, beside what evaluation needs."""
    lora, whole = (evaluated(tmp_path, f"adapter={name}", "evaluation.tasks=[winogrande]") for name in ("lora", "full"))
    assert 2 * 6_721_589_248 < lora.memory == whole.memory < 16e9


def whole(study: Study) -> list[Recipe]:
    wanted = graph.wanted(study, "evaluate")
    assert wanted is not None
    return list(wanted.walk())


STUDIES = config_folder() / "experiment" / "paper"


def test_header_of_the_papers_cell_states_what_its_dry_run_does(tmp_path: Path) -> None:
    """But for the calibration, under a minute of it."""
    header = " ".join(line.lstrip("# ") for line in (STUDIES / "cell.yaml").read_text().splitlines())
    stated = re.search(r"not measured\): (\S+) GPU hours, (\S+) GB of GPU memory, (\S+) GB of disk", header)
    assert stated
    found, study = counts(tmp_path)
    estimates = [estimate(found, recipe) for recipe in whole(study)]
    hours = sum(one.seconds for one in estimates) / 3600
    memory, disk = max(one.memory for one in estimates) / 1e9, sum(one.disk for one in estimates) / 1e9
    assert [float(number) for number in stated.groups()] == pytest.approx([hours, memory, disk], rel=0.05)


def test_every_dataset_and_model_of_the_main_table_is_planned_without_the_hub(tmp_path: Path) -> None:
    """Each at its longest way; their sizes differ, so that the estimates do."""
    swept = yaml.safe_load((STUDIES / "main_table.yaml").read_text())["hydra"]["sweeper"]["params"]
    hours = []
    for key, other in (("dataset", "model"), ("model", "dataset")):
        for option in swept[key].split(","):
            found, study = counts(tmp_path, f"{key}={option}", f"{other}={swept[other].split(',')[0]}", "seed=1")
            stages = {recipe.stage: estimate(found, recipe) for recipe in whole(study)}
            assert set(stages) == {"scores", "pruned", "rewrites", "targets", "tuned", "evaluated"}
            hours.append(sum(one.seconds for one in stages.values()))
    assert len(set(hours)) == len(hours) - 1, "one cell is there twice"
