"""The typed schema of the composed config, the allow-list of `_target_`, and the checks made before any work.

The schema refuses unknown keys and wrong types at composition. What it cannot see (relations between values, class
paths) is checked here, in one line each. `build` is the only place where a config node becomes an object, and it builds
nothing that `ALLOWED_TARGETS` does not name: somebody else's config can choose among this project's parts, and run
nothing else. Knows nothing of what the parts compute.
"""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from sdd.answers import RULES
from sdd.errors import UserError
from sdd.prompts import LEAK_PHRASES, REWRITE_TEMPLATE


@dataclass
class Model:
    """The unpruned model: a folder, or a hub id pinned by `revision`. `dtype` is the dtype it is loaded in."""

    path: str = MISSING
    revision: str | None = None
    dtype: str = "bfloat16"


@dataclass
class Teacher:
    """Who rewrites; by default the unpruned model itself."""

    path: str | None = None
    revision: str | None = None


@dataclass
class Calibration:
    """Running text that a metric is measured on."""

    _target_: str = MISSING
    path: str | None = None
    num_texts: int = 128
    max_length: int = 256


@dataclass
class Pruning:
    """`size` blocks, where the metric says; `start` forces the span; `blocks` is any list, without a metric."""

    size: int = 0
    start: int | None = None
    blocks: list[int] | None = None


@dataclass
class Dataset:
    """Where fine-tuning rows come from, how the teacher is asked to rewrite them, and how answers are compared."""

    _target_: str = MISSING
    name: str = MISSING
    path: str | None = None
    families: list[str] | None = None
    num_rows: int | None = None
    seed: int = 0
    answer_rule: str = "none"
    template: str = REWRITE_TEMPLATE
    system_prompt: str | None = None
    leak_phrases: list[str] = field(default_factory=lambda: list(LEAK_PHRASES))


@dataclass
class Finetune:
    """`mode` says whose answers are the targets; the rest is the recipe of the optimisation.

    `batch_size` is the global batch in rows; `validation_rows` are held out before `num_rows` are drawn.
    """

    mode: str = "self_distill"
    select: bool = True
    gold_share: float = 0.0
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
    """LoRA (arXiv 2106.09685) on the named modules; `all-linear` means every linear layer but the head."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])


@dataclass
class Merge:
    method: str = "none"


@dataclass
class Evaluation:
    """Tasks, how many items of each, and how answers are generated. `seed` draws the items of procedural tasks."""

    suite: str = MISSING
    tasks: list[str] | None = None
    split: str = "dev"
    limit: int | None = 100
    seed: int = 0
    batch_size: int = 64
    max_new_tokens: int = 96
    dtype: str = "float32"
    system_prompt: str | None = None


@dataclass
class Trainer:
    """Where training and inference run; never part of a result. `micro_batch_tokens` bounds padded tokens a pass."""

    accelerator: str = "cpu"
    devices: int = 1
    threads: int | None = None
    micro_batch_tokens: int = 4096
    inference_batch_size: int = 32
    attention: str = "sdpa"
    checkpoint_every: int = 50


@dataclass
class Paths:
    artifacts: str = "artifacts"


@dataclass
class Store:
    missing: str = "build"


@dataclass
class Config:
    """One node per config group; `study` holds values that an experiment's other settings refer to."""

    model: Model = field(default_factory=Model)
    teacher: Teacher = field(default_factory=Teacher)
    metric: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    pruning: Pruning = field(default_factory=Pruning)
    dataset: Dataset = field(default_factory=Dataset)
    finetune: Finetune = field(default_factory=Finetune)
    adapter: Adapter = field(default_factory=Adapter)
    engine: dict[str, Any] = field(default_factory=dict)
    merge: Merge = field(default_factory=Merge)
    evaluation: Evaluation = field(default_factory=Evaluation)
    trainer: Trainer = field(default_factory=Trainer)
    logger: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    paths: Paths = field(default_factory=Paths)
    store: Store = field(default_factory=Store)
    dry_run: bool = False


# ---- what a config may name -------------------------------------------------------------------------------------

ALLOWED_TARGETS = frozenset(
    {
        "sdd.importance.Angular",
        "sdd.importance.BlockInfluence",
        "sdd.importance.Random",
        "sdd.importance.Last",
        "sdd.data.tiny.TinyTexts",
        "sdd.data.tiny.TinyTasks",
        "sdd.data.local.LocalTexts",
        "sdd.data.local.LocalRows",
        "sdd.engines.HFEngine",
        "sdd.sweep.SweepEnd",
        "pytorch_lightning.loggers.WandbLogger",
    }
)
"""Exact names. `build` also checks that the object found under a name is defined where the name says."""

ALLOWED_PLUGINS = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    }
)
ALLOWED_LOGGING = frozenset(
    {
        "logging.Formatter",
        "logging.StreamHandler",
        "logging.FileHandler",
        "logging.NullHandler",
        "colorlog.ColoredFormatter",
    }
)
ALLOWED_RESOLVERS = frozenset({"now", "process_id", "package_folder"})
"""What `${name:...}` may call: values that cannot name a class. `hydra` is allowed outside the `hydra` node."""

_ALLOWED_STREAMS = ("ext://sys.stderr", "ext://sys.stdout")
_LOG_FILE = re.compile(r"\$\{hydra\.runtime\.output_dir\}/[^/].*")
_REFUSED_SETTINGS = {
    ("hydra", "job", "env_set"): "changes the environment",
    ("hydra", "job", "env_copy"): "reads the environment",
    ("hydra", "launcher", "setup"): "runs commands of its own",
    ("hydra", "launcher", "srun_args"): "runs commands of its own",
    ("hydra", "launcher", "additional_parameters"): "runs commands of its own",
    ("hydra", "sweeper", "custom_search_space"): "runs a function of its own",
}
_SAMPLER = re.compile(r"optuna\.samplers\.[A-Z][A-Za-z]*Sampler")


def check_targets(config: DictConfig) -> None:
    """Refuse a composed config (its `hydra` node included) that names anything outside the allow-list.

    Names of classes are literals. Inside the `hydra` node, which is instantiated before any of our code is asked, an
    interpolation stands for a plain value, so that what is checked here is what Hydra will see.
    """
    _check_node(OmegaConf.to_container(config, resolve=False), (), config)


def _check_node(node: Any, where: tuple[Any, ...], root: DictConfig) -> None:
    if isinstance(node, list):
        for index, value in enumerate(node):
            _check_node(value, (*where, index), root)
    elif isinstance(node, dict):
        for key, value in node.items():
            path = (*where, key)
            if path in _REFUSED_SETTINGS and value:
                raise UserError(f"{_dotted(path)} {_REFUSED_SETTINGS[path]}; refused in a config")
            if key == "_target_" and value != MISSING:
                _check_target(value, path)
            elif key == "()" or (key == "class" and _in_logging(path)):
                if value not in ALLOWED_LOGGING:
                    raise UserError(f"{_dotted(path)}={value} is not an allowed logging class; refused")
            else:
                _check_node(value, path, root)
    elif isinstance(node, str):
        _check_text(node, where, root)


def _check_target(value: Any, path: tuple[Any, ...]) -> None:
    plugin = path in (("hydra", "launcher", "_target_"), ("hydra", "sweeper", "_target_"))
    if path == ("hydra", "sweeper", "sampler", "_target_") and _SAMPLER.fullmatch(str(value)):
        return
    if value not in (ALLOWED_PLUGINS if plugin else ALLOWED_TARGETS):
        raise UserError(f"{_dotted(path)}={value} is not one of this project's parts; refused")


def _check_text(text: str, path: tuple[Any, ...], root: DictConfig) -> None:
    in_hydra, where = path[:1] == ("hydra",), _dotted(path)
    if "ext://" in text and text not in _ALLOWED_STREAMS:
        raise UserError(f"{where}={text} is not an allowed stream; refused")
    if "${" not in text:
        return
    try:
        calls, nested = _interpolations(text)
    except OmegaConfBaseException:
        raise UserError(f"{where}={text} is not a valid interpolation") from None
    for call in calls:
        if call.startswith(("oc.env", "env")):
            raise UserError(f"{where} reads an environment variable ({text}); pass the value on the command line")
        if call not in ALLOWED_RESOLVERS and (in_hydra or call != "hydra"):
            raise UserError(f"{where}={text} calls {call!r}, which a config may not; refused")
    if in_hydra and nested:
        raise UserError(f"{where}={text} nests interpolations, which a config may not under hydra; refused")
    if _in_logging(path) and not _LOG_FILE.fullmatch(text):
        raise UserError(f"{where}={text} may only begin with ${{hydra.runtime.output_dir}}/ or be plain; refused")
    if in_hydra and OmegaConf.is_config(_resolved(root, path)):
        raise UserError(f"{where}={text} stands for a whole node, which a config may not under hydra; refused")


def _interpolations(text: str) -> tuple[list[str], bool]:
    """The resolvers that a string calls (one whose name is itself composed reads `${...}`), and whether any nests."""
    calls, nested = [], False
    queue = [(parse(text), 0)]
    while queue:
        tree, depth = queue.pop()
        kind = type(tree).__name__
        if kind == "InterpolationContext":
            depth += 1
            nested |= depth > 1
        elif kind == "ResolverNameContext":
            calls.append(tree.getText())
        queue += [(child, depth) for child in getattr(tree, "children", None) or []]
    return calls, nested


def _resolved(root: DictConfig, path: tuple[Any, ...]) -> Any:
    """The value at `path`; None where it is not known before the job runs."""
    node: Any = root
    try:
        for key in path:
            node = node[key]
    except OmegaConfBaseException:
        return None
    return node


def _in_logging(path: tuple[Any, ...]) -> bool:
    return path[:2] in (("hydra", "job_logging"), ("hydra", "hydra_logging"))


def _dotted(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def build(node: Any, *args: Any, **values: Any) -> Any:
    """Instantiate a config node (a mapping with `_target_`), after checking name, identity and arguments."""
    import inspect

    from hydra.utils import get_object, instantiate

    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    name = node.get("_target_")
    if name not in ALLOWED_TARGETS:
        raise UserError(f"_target_={name} is not one of this project's parts; refused")
    found = get_object(name)
    home = f"{found.__module__}.{found.__qualname__}"
    if home != name and not home.startswith("pytorch_lightning.loggers."):
        raise UserError(f"_target_={name} is really {home}; refused")
    given = {key: value for key, value in node.items() if key != "_target_"} | values
    try:
        inspect.signature(found).bind(*args, **given)
    except TypeError as error:
        raise UserError(f"{name}: {error}") from None
    return instantiate({"_target_": name, "_partial_": True})(*args, **given)


# ---- values -----------------------------------------------------------------------------------------------------

CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "finetune.mode": ("self_distill", "sft", "gold", "none"),
    "finetune.precision": ("32", "bf16"),
    "dataset.answer_rule": RULES,
    "merge.method": ("none",),
    "evaluation.dtype": ("float32", "bfloat16", "float16"),
    "trainer.accelerator": ("cpu", "gpu"),
    "trainer.attention": ("eager", "sdpa", "flash_attention_2"),
    "store.missing": ("build", "raise"),
}
AT_LEAST = {
    "calibration.num_texts": 1,
    "calibration.max_length": 2,
    "pruning.size": 0,
    "dataset.num_rows": 1,
    "finetune.epochs": 1,
    "finetune.batch_size": 1,
    "finetune.max_length": 8,
    "finetune.num_rows": 1,
    "finetune.validation_rows": 0,
    "adapter.rank": 1,
    "adapter.alpha": 1,
    "evaluation.limit": 1,
    "evaluation.batch_size": 1,
    "evaluation.max_new_tokens": 1,
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
}
WITHIN = {
    "finetune.gold_share": (0.0, 1.0),
    "finetune.warmup_share": (0.0, 1.0),
    "finetune.weight_decay": (0.0, 10.0),
    "finetune.clip_norm": (1e-6, 1e6),
    "adapter.dropout": (0.0, 0.99),
    "engine.temperature": (0.0, 100.0),
    "engine.top_p": (1e-6, 1.0),
}
NOT_EMPTY = ("pruning.blocks", "dataset.families", "adapter.targets", "evaluation.tasks")
LOGGER_SETTINGS = ("_target_", "project", "entity", "group", "job_type", "tags", "notes", "offline")
"""What a config may say to the tracker; others of its settings choose servers and folders, or upload code."""


def check_values(config: DictConfig) -> None:
    """Refuse values that are wrong on their own or together, whatever the model."""
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except Exception as error:
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
    if not isinstance(OmegaConf.select(config, "metric.contiguous", default=False), bool):
        raise UserError(f"metric.contiguous={config.metric.contiguous} must be true or false")
    for key in config.logger:
        if key not in LOGGER_SETTINGS:
            raise UserError(f"logger.{key} is no setting here; choose from {', '.join(LOGGER_SETTINGS[1:])}")
    pruning = config.pruning
    if pruning.blocks is not None and (pruning.start is not None):
        raise UserError("pruning.blocks and pruning.start exclude each other; keep one")
    if pruning.blocks is not None and len(set(pruning.blocks)) < len(pruning.blocks):
        raise UserError(f"pruning.blocks={list(pruning.blocks)} names a block twice")
    if pruning.start is not None and pruning.size == 0:
        raise UserError("pruning.start needs pruning.size; add for example pruning=n2")
    engine = config.engine
    if engine.get("tries", 1) > 1 and not engine.get("temperature"):
        raise UserError("engine.tries > 1 needs sampling; set engine.temperature above 0")
    if "{prompt}" not in config.dataset.template:
        raise UserError("dataset.template lacks {prompt}; it shows the task, and {reference} the reference answer")


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
