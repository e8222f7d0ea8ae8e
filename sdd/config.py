"""The typed schema of the composed config, and the checks made before any work.

The schema refuses unknown keys and wrong types at composition. What it cannot see (relations between values) is checked
here, in one line each; what a config may *name* is the business of `sdd.allowed`. Knows nothing of what the parts
compute.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdd.answers import RULES
from sdd.errors import UserError
from sdd.prompts import LEAK_PHRASES, REWRITE_TEMPLATE


@dataclass
class Model:
    """The unpruned model: a folder, or a hub id at `revision`. `dtype` is the dtype it is loaded in.

    `shape` holds those values of a hub model's `config.json` that a dry run needs before it is fetched.
    """

    path: str = MISSING
    revision: str | None = None
    dtype: str = "bfloat16"
    shape: dict[str, Any] = field(default_factory=dict)


@dataclass
class Teacher:
    """Who rewrites; by default the unpruned model itself."""

    path: str | None = None
    revision: str | None = None


@dataclass
class Hub:
    """Files of a dataset repository on the hub, used where no `path` is given. `revision` is a commit."""

    repository: str | None = None
    revision: str | None = None
    files: list[str] | None = None
    stream: bool = False


@dataclass
class Calibration:
    """Running text that a metric is measured on. With `seed`, a sample of the corpus instead of its first texts."""

    _target_: str = MISSING
    path: str | None = None
    hub: Hub = field(default_factory=Hub)
    seed: int | None = None
    num_texts: int = 128
    max_length: int = 256


@dataclass
class Pruning:
    """`size` blocks, where the metric says; `start` forces the span; `blocks` is any list, without a metric.

    `ratio` removes MLP channels instead, or after the blocks: that share of the parameters, of `all` or of those of the
    MLPs (`mlp`). The width is rounded to a `multiple`: 16-bit matrix products are quick in rows of 16 bytes.
    """

    size: int = 0
    start: int | None = None
    blocks: list[int] | None = None
    ratio: float | None = None
    ratio_of: str = "all"
    multiple: int = 8


@dataclass
class Repair:
    """What is done at a cut without training; `ridge` looks at the calibration texts.

    `penalty` holds the refitted weights to the existing ones, in units of the mean square of an MLP activation summed
    over tokens (the mean diagonal of the Gram matrix).
    """

    method: str = "none"
    penalty: float = 1e-4


@dataclass
class Rows:
    """Where rows come from, how the teacher is asked to rewrite them, and how answers are compared.

    `fields` names the columns of `dataset=local`: prompt, reference, id, answer.
    """

    _target_: str = MISSING
    name: str = MISSING
    path: str | None = None
    hub: Hub = field(default_factory=Hub)
    families: list[str] | None = None
    fields: dict[str, str] | None = None
    answer_rule: str = "none"
    template: str = REWRITE_TEMPLATE
    leak_phrases: list[str] = field(default_factory=lambda: list(LEAK_PHRASES))


@dataclass
class Part(Rows):
    """One dataset of a mixture; `weight` is relative to the other parts'."""

    weight: float = 1.0


@dataclass
class Dataset(Rows):
    """Fine-tuning rows, of one source or of the `parts` of a mixture."""

    num_rows: int | None = None
    seed: int = 0
    system_prompt: str | None = None
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass
class Finetune:
    """`mode` says whose answers are the targets; the rest is the recipe of the optimisation.

    `gold_share` leaves the reference in place for that share of rows; `noise_share` puts another row's rewrite into
    that share of the kept ones. `ce_share` and `temperature` belong to `logit_distill`: the weight of the
    cross-entropy beside the divergence from the teacher, and what both distributions are softened by.
    `batch_size` is the global batch in rows; `validation_rows` are held out before `num_rows` are drawn.
    """

    mode: str = "self_distill"
    select: bool = True
    gold_share: float = 0.0
    noise_share: float = 0.0
    ce_share: float = 0.0
    temperature: float = 1.0
    epochs: int = 2
    learning_rate: float = 1e-3
    batch_size: int = 32
    max_length: int = 256
    num_rows: int | None = None
    validation_rows: int = 100
    precision: str = "32"
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclass
class Adapter:
    """What is trained: `lora` (arXiv 2106.09685) on the named modules, `head_and_norms`, or every parameter (`full`).

    `targets`: `all-linear` means every linear layer but the head. `scope` says which blocks LoRA goes into: `all`,
    those `beside_cut` (`blocks` on either side) or the `last` (`blocks` of them). `quantisation=nf4` keeps the base in
    4 bits while LoRA trains (arXiv 2305.14314).
    """

    method: str = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    scope: str = "all"
    blocks: int = 1
    quantisation: str | None = None


@dataclass
class Merge:
    """How students become one. `students`: a list of overrides for each, composed over the rest of this config.

    `t` (slerp) is a number, a list over the blocks, or a mapping of either by kind of tensor. `space` says what is
    interpolated: `weights` or `task_vectors`. `weights` has a number for each student, `density` belongs to ties.
    """

    method: str = "none"
    students: list[list[str]] = field(default_factory=list)
    t: Any = None
    space: str | None = None
    weights: list[float] | None = None
    density: float | None = None


@dataclass
class Evaluation:
    """Tasks, how many items of each, and how answers are generated.

    `split` and `seed` choose the items of the embedded tasks; `data_dir` and `num_fewshot` belong to lm-eval's.
    `max_new_tokens` null leaves the limit to lm-eval's tasks; `dtype` auto is the unpruned checkpoint's own.
    """

    suite: str = MISSING
    tasks: list[str] | None = None
    split: str | None = "dev"
    limit: int | None = 100
    seed: int = 0
    data_dir: str | None = None
    num_fewshot: int | None = None
    batch_size: int = 64
    max_new_tokens: int | None = 96
    dtype: str = "float32"
    system_prompt: str | None = None
    chat_template: bool = True


@dataclass
class Analysis:
    """What is measured of a student besides its scores: `speculative`, `shift` or `cost`.

    The prompts are the first `num_prompts` of the held-out rows of the dataset, or of another one (`prompts`).
    `repeats` rounds of timings are taken, none with 0, at those draft lengths that `timed_lengths` names. `embedder` is
    a sentence-transformers model. `context`, `prompt_tokens` and `new_tokens` are what costs are counted and timed at.
    """

    kind: str = "none"
    prompts: Dataset | None = None
    num_prompts: int | None = None
    max_new_tokens: int = 96
    dtype: str = "float32"
    temperature: float = 1.0
    draft_lengths: list[int] = field(default_factory=lambda: list(range(1, 9)))
    timed_lengths: list[int] = field(default_factory=lambda: [3])
    timed_prompts: int = 4
    repeats: int = 3
    embedder: str | None = None
    embedder_revision: str | None = None
    context: int = 256
    prompt_tokens: int = 128
    new_tokens: int = 32
    batch_size: int = 8


@dataclass
class Trainer:
    """Where training and inference run; never part of a result. `micro_batch_tokens` bounds padded tokens a pass.

    `gradient_checkpointing` keeps one state a block in training: less memory for about a third more time.
    """

    accelerator: str = "cpu"
    devices: int = 1
    threads: int | None = None
    micro_batch_tokens: int = 4096
    inference_batch_size: int = 32
    attention: str = "sdpa"
    checkpoint_every: int = 50
    gradient_checkpointing: bool = False


@dataclass
class Paths:
    artifacts: str = "artifacts"


@dataclass
class Store:
    missing: str = "build"


@dataclass
class Config:
    """One node per config group; `width_metric` is a second `metric`, for channels where blocks go too; `study` holds
    values that an experiment's other settings refer to.
    """

    model: Model = field(default_factory=Model)
    teacher: Teacher = field(default_factory=Teacher)
    metric: dict[str, Any] = field(default_factory=dict)
    width_metric: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    pruning: Pruning = field(default_factory=Pruning)
    repair: Repair = field(default_factory=Repair)
    dataset: Dataset = field(default_factory=Dataset)
    finetune: Finetune = field(default_factory=Finetune)
    adapter: Adapter = field(default_factory=Adapter)
    engine: dict[str, Any] = field(default_factory=dict)
    merge: Merge = field(default_factory=Merge)
    evaluation: Evaluation = field(default_factory=Evaluation)
    analysis: Analysis = field(default_factory=Analysis)
    trainer: Trainer = field(default_factory=Trainer)
    logger: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    paths: Paths = field(default_factory=Paths)
    store: Store = field(default_factory=Store)
    dry_run: bool = False


# ---- values -----------------------------------------------------------------------------------------------------

CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "repair.method": ("none", "ridge"),
    "finetune.mode": ("self_distill", "sft", "gold", "logit_distill", "none"),
    "finetune.precision": ("32", "bf16"),
    "adapter.method": ("lora", "head_and_norms", "full"),
    "adapter.scope": ("all", "beside_cut", "last"),
    "pruning.ratio_of": ("all", "mlp"),
    "merge.method": ("none", "slerp", "linear", "task_arithmetic", "ties"),
    "evaluation.dtype": ("auto", "float32", "bfloat16", "float16"),
    "analysis.kind": ("none", "speculative", "shift", "cost"),
    "analysis.dtype": ("auto", "float32", "bfloat16", "float16"),
    "trainer.accelerator": ("cpu", "gpu"),
    "trainer.attention": ("eager", "sdpa", "flash_attention_2"),
    "store.missing": ("build", "raise"),
}
AT_LEAST = {
    "calibration.num_texts": 1,
    "calibration.max_length": 2,
    "pruning.size": 0,
    "pruning.multiple": 1,
    "calibration.seed": 0,
    "dataset.num_rows": 1,
    "finetune.epochs": 1,
    "finetune.batch_size": 1,
    "finetune.max_length": 8,
    "finetune.num_rows": 1,
    "finetune.validation_rows": 0,
    "adapter.rank": 1,
    "adapter.alpha": 1,
    "adapter.blocks": 1,
    "evaluation.limit": 1,
    "evaluation.num_fewshot": 0,
    "evaluation.batch_size": 1,
    "evaluation.max_new_tokens": 1,
    "analysis.num_prompts": 1,
    "analysis.max_new_tokens": 1,
    "analysis.timed_prompts": 1,
    "analysis.repeats": 0,
    "analysis.context": 1,
    "analysis.prompt_tokens": 1,
    "analysis.new_tokens": 1,
    "analysis.batch_size": 1,
    "trainer.devices": 1,
    "trainer.threads": 1,
    "trainer.micro_batch_tokens": 1,
    "trainer.inference_batch_size": 1,
    "trainer.checkpoint_every": 1,
    "engine.batch_size": 1,
    "engine.max_new_tokens": 1,
    "engine.tries": 1,
    "engine.seed": 0,
    "metric.seed": 0,
    "metric.depth": 1,
    "metric.num_texts": 1,
    "width_metric.seed": 0,
}
WITHIN = {
    "finetune.gold_share": (0.0, 1.0),
    "finetune.noise_share": (0.0, 1.0),
    "finetune.ce_share": (0.0, 1.0),
    "finetune.temperature": (1e-2, 100.0),
    "finetune.warmup_share": (0.0, 1.0),
    "finetune.weight_decay": (0.0, 10.0),
    "finetune.clip_norm": (1e-6, 1e6),
    "adapter.dropout": (0.0, 0.99),
    "analysis.temperature": (1e-3, 100.0),
    "engine.temperature": (0.0, 100.0),
    "engine.top_p": (1e-6, 1.0),
    **{
        f"{metric}.{key}": limits
        for metric in ("metric", "width_metric")
        for key, limits in {"first_cut": (0.0, 0.99), "alpha": (0.0, 1.0), "temperature": (1e-3, 100.0)}.items()
    },
}
NOT_EMPTY = ("pruning.blocks", "dataset.families", "adapter.targets", "evaluation.tasks", "analysis.draft_lengths")
MERGE_SETTINGS = {
    "slerp": ("t", "space"),
    "linear": ("weights",),
    "task_arithmetic": ("weights",),
    "ties": ("weights", "density"),
}
"""By `merge.method`: the settings that count."""
LOGGER_SETTINGS = ("_target_", "project", "entity", "group", "job_type", "tags", "notes", "offline")
"""What a config may say to the tracker; others of its settings choose servers and folders, or upload code."""


def check_values(config: DictConfig) -> None:
    """Refuse values that are wrong on their own or together, whatever the model."""
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    _check_keys(config)
    for key, choices in CHOICES.items():
        if (value := OmegaConf.select(config, key)) not in choices:
            raise UserError(f"{key}={value} is unknown; choose one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(config, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"{key}={value} must be an integer of at least {least}")
    for key, (low, high) in WITHIN.items():
        value = OmegaConf.select(config, key)
        if value is not None and not (_is_number(value) and low <= value <= high):
            raise UserError(f"{key}={value} must lie between {low:g} and {high:g}")
    for key in NOT_EMPTY:
        value = OmegaConf.select(config, key)
        if value is not None and not len(value):
            raise UserError(f"{key}=[] names nothing; name at least one, or leave it out")
    if not 0 < config.finetune.learning_rate < math.inf:
        raise UserError(f"finetune.learning_rate={config.finetune.learning_rate} must be positive and finite")
    for key in ("contiguous", "keep_final"):
        if not isinstance(OmegaConf.select(config, f"metric.{key}", default=False), bool):
            raise UserError(f"metric.{key}={config.metric[key]} must be true or false")
    if not 0 < config.repair.penalty < math.inf:
        raise UserError(f"repair.penalty={config.repair.penalty} must be positive and finite")
    for key in config.logger:
        if key not in LOGGER_SETTINGS:
            raise UserError(f"logger.{key} is no setting here; choose from {', '.join(LOGGER_SETTINGS[1:])}")
    pruning = config.pruning
    if pruning.blocks is not None and (pruning.start is not None):
        raise UserError("pruning.blocks and pruning.start exclude each other; keep one")
    if pruning.blocks is not None and len(set(pruning.blocks)) < len(pruning.blocks):
        raise UserError(f"pruning.blocks={list(pruning.blocks)} names a block twice")
    if pruning.ratio is not None and not 0 < pruning.ratio < 1:
        raise UserError(f"pruning.ratio={pruning.ratio:g} must lie between 0 and 1, both excluded")
    if pruning.start is not None and pruning.size == 0:
        raise UserError("pruning.start needs pruning.size; add for example pruning=n2")
    adapter = config.adapter
    if adapter.quantisation not in (None, "nf4"):
        raise UserError(f"adapter.quantisation={adapter.quantisation} is unknown; choose nf4, or null for none")
    if adapter.method != "lora" and (adapter.quantisation is not None or adapter.scope != "all"):
        key = "scope" if adapter.quantisation is None else "quantisation"
        raise UserError(f"adapter.{key}={adapter[key]} goes with LoRA; leave it out, or choose adapter.method=lora")
    engine = config.engine
    if engine.get("tries", 1) > 1 and not engine.get("temperature"):
        raise UserError("engine.tries > 1 needs sampling; set engine.temperature above 0")
    _check_merge(config.merge)
    for key in ("draft_lengths", "timed_lengths"):
        if any(length < 1 for length in config.analysis[key]):
            raise UserError(f"analysis.{key}={list(config.analysis[key])} must be tokens to draft, each at least 1")
    if not set(config.analysis.timed_lengths) <= set(config.analysis.draft_lengths):
        raise UserError("analysis.timed_lengths must be among analysis.draft_lengths")
    if config.analysis.prompts is not None:
        _check_rows(config.analysis.prompts, "analysis.prompts")
    _check_rows(config.dataset, "dataset")
    for name, part in config.dataset.parts.items():
        _check_rows(part, f"dataset.parts.{name}")
        if "/" in name:
            raise UserError(f"dataset.parts: a part's name has no slash; rename {name}")
        if not 0 < part.weight < math.inf:
            raise UserError(f"dataset.parts.{name}.weight={part.weight} must be positive and finite")


def _check_merge(merge: Any) -> None:
    method, number = merge.method, len(merge.students)
    if method == "none":
        return
    if number < 2 or (method == "slerp" and number > 2):
        needs = "exactly two students" if method == "slerp" else "at least two students"
        instead = "; choose merge=linear for more" if number > 2 else ""
        raise UserError(
            f"merge={method} needs {needs}, merge.students has {number}{instead}; write them as "
            "merge.students=[[dataset=tiny_math],[dataset=tiny_instruct]]"
        )
    own = MERGE_SETTINGS[method]
    for key in ("t", "space", "weights", "density"):
        if merge[key] is not None and key not in own:
            raise UserError(f"merge.{key} does not belong to merge.method={method}; leave it out, or choose the option")
        if merge[key] is None and key in own and key != "weights":
            raise UserError(f"merge.method={method} needs merge.{key}; choose the option merge={method}")
    if "t" in own:
        _check_share(OmegaConf.to_container(merge, resolve=True)["t"], "merge.t")  # type: ignore[index,call-overload]
    if merge.space not in (None, "weights", "task_vectors"):
        raise UserError(f"merge.space={merge.space} is unknown; choose one of weights, task_vectors")
    if merge.weights is not None:
        weights = list(merge.weights)
        if len(weights) != number or not all(map(math.isfinite, weights)):
            raise UserError(f"merge.weights={weights} must have one number for each of the {number} students")
        if method != "task_arithmetic" and min(weights) <= 0:
            raise UserError(f"merge.weights={weights} must be positive for merge={method}")
    if merge.density is not None and not 0 < merge.density <= 1:
        raise UserError(f"merge.density={merge.density} must be above 0 and at most 1")


def _check_share(t: Any, where: str) -> None:
    """`t` is a number in [0, 1], a list of such, or a mapping of either."""
    if isinstance(t, dict) and t and where == "merge.t":
        for kind, value in t.items():
            _check_share(value, f"merge.t.{kind}")
    elif isinstance(t, list) and t:
        for value in t:
            if not _is_number(value):
                raise UserError(f"{where}={t} must be a list of numbers between 0 and 1")
            _check_share(value, where)
    elif not (_is_number(t) and 0 <= t <= 1):
        raise UserError(f"{where}={t} must lie between 0 and 1")


def _check_rows(rows: Any, where: str) -> None:
    if rows.answer_rule not in RULES:
        raise UserError(f"{where}.answer_rule={rows.answer_rule} is unknown; choose one of {', '.join(RULES)}")
    if "{prompt}" not in rows.template:
        raise UserError(f"{where}.template lacks {{prompt}}; it shows the task, and {{reference}} the reference answer")


def _check_keys(node: Any, where: str = "") -> None:
    """Refuse a key that `+key=...` added beside those of the schema."""
    kind = OmegaConf.get_type(node)
    known = {item.name for item in fields(kind)} if is_dataclass(kind) else set(node)
    for key in node:
        if key not in known:
            raise UserError(f"{where}{key} is not a setting; choose from {', '.join(sorted(known))}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _check_keys(child, f"{where}{key}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_pruning(pruning: Any, num_blocks: int) -> None:
    """Refuse a cut that the model with `num_blocks` blocks cannot bear."""
    blocks = pruning.blocks
    if blocks is not None:
        wrong = [block for block in blocks if not 0 <= block < num_blocks]
        if wrong:
            raise UserError(f"pruning.blocks: no block {wrong[0]}; the model has blocks 0 to {num_blocks - 1}")
    size = pruning.size if blocks is None else len(blocks)
    what = f"pruning.size={size}" if blocks is None else f"pruning.blocks={list(blocks)}"
    if size >= num_blocks:
        verb = "removes all" if size == num_blocks else "is more than the"
        raise UserError(f"{what} {verb} {num_blocks} blocks; choose at most {num_blocks - 1}")
    if pruning.start is not None and not 0 <= pruning.start <= num_blocks - size:
        raise UserError(
            f"pruning.start={pruning.start} with pruning.size={size} leaves the model; choose 0 to {num_blocks - size}"
        )
