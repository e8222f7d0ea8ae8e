"""The typed schema of the composed config: it refuses unknown keys and wrong types at composition.

What a config may *name* is the business of `sdd.config.allowed`.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from sdd.models.chats import LEAK_PHRASES, REWRITE_TEMPLATE


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
    values that an experiment's other settings refer to; `allow` is the command line's alone (`sdd.config.own`).
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
    allow: Any = None


def plain(node: DictConfig) -> dict[str, Any]:
    """A node of the config as plain values, references resolved."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
