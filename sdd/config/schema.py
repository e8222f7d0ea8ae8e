"""The typed schema of the composed config: it refuses unknown keys and wrong types at composition.

Every setting says what it is, for `sdd explain`. What a config may *name* is the business of `sdd.config.allowed`.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from sdd.models.chats import LEAK_PHRASES, REWRITE_TEMPLATE


def described(description: str, default: Any = MISSING) -> Any:
    """A field that says what it is; `default` may be a class, which is then called for each config."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"description": description})
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata={"description": description})
    return field(default=default, metadata={"description": description})


@dataclass
class Model:
    """The unpruned model."""

    path: str = described("its folder, or its id on the hub")
    revision: str | None = described("the commit or branch, where it is on the hub", None)
    dtype: str = described("the dtype that it is loaded and looked at in", "bfloat16")
    shape: dict[str, Any] = described("the values of its config.json that a dry run needs before it is fetched", {})


@dataclass
class Teacher:
    """Who rewrites; by default the unpruned model itself."""

    path: str | None = described("folder or hub id of another model that rewrites, or whose logits are learned", None)
    revision: str | None = described("the commit or branch, where it is on the hub", None)


@dataclass
class Hub:
    """Files of a dataset repository on the hub, used where no `path` is given."""

    repository: str | None = described("id of the dataset on the hub", None)
    revision: str | None = described("its commit", None)
    files: list[str] | None = described("names or patterns of its files", None)
    stream: bool = described("whether rows are read as they arrive, instead of fetching the files whole", False)


@dataclass
class Calibration:
    """Running text that a metric is measured on."""

    _target_: str = MISSING
    path: str | None = described("a file of texts: JSONL, JSONL.gz or Parquet", None)
    hub: Hub = described("where the texts are on the hub, if there is no path", Hub)
    seed: int | None = described("of a sample of the corpus; null takes its first texts", None)
    num_texts: int = described("texts that are looked at", 128)
    max_length: int = described("tokens of a text at most", 256)


@dataclass
class Pruning:
    """What is cut: blocks, MLP channels, or blocks and then channels."""

    size: int = described("blocks removed, where the metric says", 0)
    keep: float | None = described("share of all parameters to keep: as many blocks go as leave at least that", None)
    start: int | None = described("the first removed block of a span, instead of where the metric says", None)
    blocks: list[int] | None = described("the removed blocks, instead of where the metric says", None)
    after: list[str] | None = described(
        "overrides, composed over the rest of this config, for a student that is made and then cut further", None
    )
    ratio: float | None = described("share of the parameters removed as MLP channels, instead of blocks or after", None)
    ratio_of: str = described("the parameters of which `ratio` is a share: all, or those of the MLPs", "all")
    multiple: int = described("what the width left is rounded to; 16-bit products like rows of 16 bytes", 8)


@dataclass
class Repair:
    """What is done at a cut without training; `ridge` looks at the calibration texts."""

    method: str = described("ridge refits the projection before each removed block", "none")
    penalty: float = described(
        "hold on the existing weights, in units of the mean square of an MLP activation summed over tokens", 1e-4
    )


@dataclass
class Rows:
    """Where rows come from, how the teacher is asked to rewrite them, and how answers are compared."""

    _target_: str = MISSING
    name: str = described("what reports call the dataset")
    path: str | None = described("a file or folder of rows: JSONL, JSONL.gz or Parquet", None)
    hub: Hub = described("where the rows are on the hub, if there is no path", Hub)
    families: list[str] | None = described("families of the embedded tasks; null is all", None)
    register: str | None = described("of the embedded tasks' references: mild, medium or strong; null is medium", None)
    reasoning: float | None = described("share of the embedded references' worked lines that is kept; null is 1", None)
    fields: dict[str, str] | None = described(
        "columns of dataset=local: prompt, reference, id, answer, messages, system", None
    )
    answer_rule: str = described("how a final answer is found in a text, by which rewrites are judged", "none")
    template: str = described("the request to rewrite, with {prompt} and {reference}", REWRITE_TEMPLATE)
    leak_phrases: list[str] = described("phrases that no rewrite may say", list(LEAK_PHRASES))


@dataclass
class Part(Rows):
    """One dataset of a mixture."""

    weight: float = described("its rows, relative to the other parts'", 1.0)


@dataclass
class Dataset(Rows):
    """Fine-tuning rows, of one source or of the `parts` of a mixture."""

    num_rows: int | None = described("rows taken; null is all", None)
    seed: int = described("of the sample of rows", 0)
    system_prompt: str | None = described("what stands before every task, in rewriting and in training", None)
    parts: dict[str, Part] = described("the datasets of a mixture, by name", {})


@dataclass
class Finetune:
    """Whose answers are the targets, and how the student is optimised on them."""

    mode: str = described("whose answers are the targets, and the loss where `loss` is null", "self_distill")
    loss: Any = described("what is minimised: a loss by name, or {name: weight, ...}; null is the mode's own", None)
    request: str = described(
        "what the teacher is shown: the reference, a draft of the student's, or the prompt alone", "reference"
    )
    select: bool = described("whether a rewrite that fails the selection gives way to the reference", True)
    choice: str = described("which of several rewrites is the target; all but first have every try written", "first")
    gold_share: float = described("share of rows whose reference stays in place", 0.0)
    noise_share: float = described("share of the kept rewrites that another row's takes the place of", 0.0)
    ce_share: float = described("weight of cross-entropy beside a mode's own loss on the teacher's logits", 0.0)
    temperature: float = described("what teacher and student are softened by in divergences", 1.0)
    skew: float = described("the teacher's share of the mixture in skew_kl", 0.1)
    jsd_beta: float = described("of jsd: near 0 it is like forward KL, near 1 like reverse KL", 0.5)
    taid_start: float = described("the teacher's share of the target at the first step of taid", 0.4)
    clip_mass: float = described("probability of the teacher's likeliest tokens that dac_kl keeps", 0.95)
    rejected_weight: float = described("weight of the rejected rewrites in redi", 0.8)
    student_share: float = described("share of the rows that the student answers itself, in on_policy", 1.0)
    rollout_tokens: list[int] = described("tokens of such an answer at most: at first, and half-way on", [16, 96])
    rollout_steps: int = described("steps whose rows are answered at once, by the student as it then is", 1)
    rollout_temperature: float = described("that the student's answers are sampled at; 0 takes the likeliest", 1.0)
    cached: str | None = described("what is kept of the teacher's logits in its place: top_k, sampled or null", None)
    cached_k: int = described("tokens that are kept of every distribution", 64)
    cached_bits: int = described("of a probability in top_k: 8, 16 or 32", 16)
    epochs: int = described("passes over the training rows", 2)
    learning_rate: float = described("the highest of the schedule", 1e-3)
    batch_size: int = described("rows of a step", 32)
    max_length: int = described("tokens of a row at most; longer rows are left out", 256)
    same_rows: bool = described("whether references say which rows are left out, the same in every arm", False)
    num_rows: int | None = described("rows trained on; null is all beside the held-out ones", None)
    num_tokens: int | None = described("target tokens trained on at most, instead of num_rows", None)
    choose: str = described("which rows are taken: random ones, or those that the cut did most damage to", "random")
    choose_temperature: float = described(
        "of the draw by damage, in its standard deviations; 0 takes the largest, the same for every seed",
        0.5,
    )
    weights: str | None = described("damage: a row's loss counts in proportion to what the cut took from it", None)
    domains: str | None = described("damage: what the cut harmed more has a larger share of the target tokens", None)
    deduplicate: float | None = described(
        "likeness by word 5-grams at which a row is left out for an earlier or held-out one; 1: same words",
        None,
    )
    validation_rows: int = described("rows held out before num_rows are drawn, at most a fifth of all", 100)
    precision: str = described("of the weights in training: 32 bits, or bf16 under mixed precision", "32")
    warmup_share: float = described("share of the steps over which the rate rises", 0.05)
    weight_decay: float = described("of AdamW", 0.0)
    clip_norm: float = described("largest norm of the gradients of a step", 1.0)
    keep: str = described("which student is saved: the last, or the best by its loss on the held-out rows", "last")


@dataclass
class Judge:
    """Who chooses among a row's rewrites with finetune.choice=judge: a model behind a server."""

    base_url: str | None = described("where the server answers, http://HOST/v1; of the command line alone", None)
    model: str | None = described("the name by which the server knows it", None)
    template: str | None = described(
        "the question, with {prompt}, {answers} and if need be {reference}; null is the project's own", None
    )
    max_new_tokens: int = described("tokens of its answer; one that is cut there is not read", 256)
    concurrency: int = described("requests that are on their way to the server at once", 16)
    retries: int = described("how often a request is sent again, after waits of up to 8 seconds", 12)
    timeout: float = described("seconds that an answer may take", 300.0)


@dataclass
class Rollouts:
    """Who writes what the student says itself with finetune=on_policy."""

    backend: str = described("hf in this process; a server: transformers (`transformers serve`) or vllm", "hf")
    base_url: str | None = described("where the server answers, http://HOST/v1; of the command line alone", None)
    concurrency: int = described("requests that are on their way to the server at once", 16)
    retries: int = described("how often a request is sent again, after waits of up to 8 seconds", 12)
    timeout: float = described("seconds that an answer may take", 300.0)


@dataclass
class Adapter:
    """What is trained of the student."""

    method: str = described("lora (arXiv 2106.09685), head_and_norms, or every parameter (full)", "lora")
    rank: int = described("of LoRA's matrices", 16)
    alpha: int = described("LoRA's scale: its update counts alpha / rank", 32)
    dropout: float = described("of LoRA's inputs in training", 0.0)
    targets: list[str] = described("modules with LoRA; all-linear is every linear layer but the head", ["all-linear"])
    scope: str = described("blocks with LoRA: all, those beside_cut on either side, or the last", "all")
    blocks: int = described("how many blocks beside_cut (on either side) or last are", 1)
    quantisation: str | None = described("nf4 keeps the base in 4 bits while LoRA trains (arXiv 2305.14314)", None)


@dataclass
class Merge:
    """How students become one."""

    method: str = described("of merging", "none")
    students: list[list[str]] = described("overrides for each student, composed over the rest of this config", [])
    t: Any = described("slerp's place between the two: a number, a list over the blocks, or either by kind", None)
    space: str | None = described("what slerp interpolates: weights or task_vectors", None)
    weights: list[float] | None = described("a number for each student", None)
    density: float | None = described("share of each tensor's changes that ties keeps", None)


@dataclass
class Evaluation:
    """Tasks, how many items of each, and how answers are generated."""

    suite: str = described("the set of tasks")
    tasks: list[str] | None = described("tasks of the suite; null is all", None)
    split: str | None = described("of the embedded tasks: dev or test", "dev")
    limit: int | None = described("items of a task; null is all", 100)
    seed: int = described("of the embedded tasks' items", 0)
    data_dir: str | None = described("folder of lm-eval's rows; null fetches them", None)
    num_fewshot: int | None = described("examples shown before an item; null is the task's own number", None)
    batch_size: int | str = described("rows of a pass; auto: as memory allows", 64)
    max_new_tokens: int | None = described("tokens of an answer; null leaves the limit to lm-eval's tasks", 96)
    dtype: str = described("the student runs in it; auto is the unpruned checkpoint's own", "float32")
    system_prompt: str | None = described("what stands before every item", None)
    chat_template: bool = described("whether items are put as a chat", True)
    backend: str = described("who computes: hf in this process, vllm on its GPU, or a server", "hf")
    base_url: str | None = described("where the server answers, http://HOST/v1; of the command line alone", None)
    model: str | None = described("the name by which the server knows the student", None)
    prompt_ids: bool = described("whether the server is sent token ids; false sends text, which it tokenizes", True)
    concurrency: int = described("requests that are on their way to the server at once", 16)
    retries: int = described("how often a request is sent again, after waits of up to 10 seconds", 12)
    timeout: float = described("seconds that an answer may take", 300.0)


@dataclass
class Analysis:
    """What is measured of a student besides its scores."""

    kind: str = described("speculative drafting, shift from the unpruned model, or cost", "none")
    prompts: Dataset | None = described("the dataset whose held-out prompts are answered; null is `dataset`", None)
    num_prompts: int | None = described("held-out prompts; null is all", None)
    max_new_tokens: int = described("tokens of an answer", 96)
    dtype: str = described("both models run in it; auto is the checkpoint's own", "float32")
    temperature: float = described("of the distributions that are compared", 1.0)
    draft_lengths: list[int] = described("tokens that are drafted at once", list(range(1, 9)))
    timed_lengths: list[int] = described("draft lengths that are timed", [3])
    timed_prompts: int = described("prompts that are timed", 4)
    repeats: int = described("rounds of timings; 0 takes none", 3)
    embedder: str | None = described("folder or hub id of a sentence-transformers model; null compares none", None)
    embedder_revision: str | None = described("its commit", None)
    context: int = described("tokens that costs are counted at", 256)
    prompt_tokens: int = described("tokens of a prompt that is timed", 128)
    new_tokens: int = described("tokens of an answer that is timed", 32)
    batch_size: int = described("rows of a pass that is timed", 8)


@dataclass
class Trainer:
    """Where training and inference run; never part of a result."""

    accelerator: str = described("cpu or gpu", "cpu")
    devices: int = described("devices that share a job's passes and training", 1)
    num_nodes: int = described("machines that do so together, each with so many devices and the same command", 1)
    strategy: str = described("ddp: each device trains with the whole model; fsdp: with its part of each tensor", "ddp")
    device_map: str | None = described(
        "how a model that no device holds is spread over them to be passed, such as auto; null: not", None
    )
    max_memory: Any = described(
        "what of each device a spread model may take, such as {gpu0: 70GiB, cpu: 100GiB}; null: what is free", None
    )
    threads: int | None = described("CPU threads; null leaves it to PyTorch", None)
    micro_batch_tokens: int | str = described("padded tokens of a training pass at most; auto: as memory allows", 4096)
    inference_batch_size: int | str = described("rows of a pass without gradients; auto: as memory allows", 32)
    attention: str = described("the implementation of attention", "sdpa")
    checkpoint_every: int = described("steps between checkpoints to go on from", 50)
    gradient_checkpointing: bool = described("one state a block is kept: less memory, a third more time", False)


@dataclass
class Paths:
    """Where things lie."""

    artifacts: str = described("folder of the artifacts", "artifacts")


@dataclass
class Store:
    """How artifacts are come by."""

    missing: str = described("what is done where an artifact is not there: build it, or raise", "build")


@dataclass
class Config:
    """One node per config group."""

    model: Model = described("the unpruned model", Model)
    teacher: Teacher = described("who rewrites, where it is not the unpruned model", Teacher)
    metric: dict[str, Any] = described("the criterion by which blocks, or channels, go", {})
    width_metric: dict[str, Any] = described("a second criterion, for channels where blocks go too", {})
    calibration: Calibration = described("running text that a criterion or a repair looks at", Calibration)
    pruning: Pruning = described("how much is cut, and where", Pruning)
    repair: Repair = described("what is done at the cut without training", Repair)
    dataset: Dataset = described("the rows that are rewritten and trained on", Dataset)
    finetune: Finetune = described("whose answers are the targets, and how long and hard is trained", Finetune)
    judge: Judge = described("who chooses among rewrites with finetune.choice=judge", Judge)
    rollouts: Rollouts = described("who writes the student's own answers with finetune=on_policy", Rollouts)
    adapter: Adapter = described("what is trained of the student", Adapter)
    engine: dict[str, Any] = described("how rewrites are generated", {})
    merge: Merge = described("how several students become one", Merge)
    evaluation: Evaluation = described("the tasks that a student is scored on", Evaluation)
    analysis: Analysis = described("what is measured of a student besides its scores", Analysis)
    trainer: Trainer = described("where training and inference run; never part of a result", Trainer)
    logger: dict[str, Any] = described("the tracker that training reports to", {})
    study: dict[str, Any] = described("values that an experiment's other settings refer to", {})
    seed: int = described("of training, and of what it draws", 0)
    paths: Paths = described("where things lie", Paths)
    store: Store = described("how artifacts are come by", Store)
    dry_run: bool = described("show what would be built and what it takes, and build nothing", False)
    fetch: bool = described("fetch models, rows and evaluation data that the hub has, and build nothing", False)
    allow: Any = described("classes of your own that this command line allows; no file may say it", None)


hints_of: Callable[[Any], dict[str, Any]] = cache(get_type_hints)
"""The types of a group's settings, by name."""


def plain(node: DictConfig) -> dict[str, Any]:
    """A node of the config as plain values, references resolved."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


class Values(dict[str, Any]):
    """Plain values by name, as attributes too: read a hundred times as fast as a node of the config."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Groups:
    """The groups of a config as plain values, references resolved, each as it is when it is first asked for."""

    def __init__(self, config: DictConfig) -> None:
        self._config = config

    def __getattr__(self, group: str) -> Any:
        values = _values(OmegaConf.to_container(self._config[group], resolve=True))
        setattr(self, group, values)
        return values


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        return Values((str(key), _values(entry)) for key, entry in value.items())
    return value
