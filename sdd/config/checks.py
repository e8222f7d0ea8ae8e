"""What the schema cannot see: bounds of values and relations between them, each checked in one line.

Knows nothing of what the parts compute.
"""

import math
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdd.answers import RULES
from sdd.config.parts import TENSORBOARD
from sdd.config.schema import plain
from sdd.errors import UserError
from sdd.finetuning.losses import LOSSES
from sdd.finetuning.modes import MODES, REQUESTS
from sdd.models.spread import AMOUNT, DEVICE, MAPS
from sdd.store import ANALYSES

BACKENDS = ("hf", "vllm", "server")
CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "repair.method": ("none", "ridge"),
    "finetune.mode": (*MODES, "none"),
    "finetune.request": tuple(REQUESTS),
    "finetune.choice": ("first", "answer_correct", "shortest", "most_likely", "judge"),
    "finetune.precision": ("32", "bf16"),
    "finetune.choose": ("random", "damage"),
    "finetune.keep": ("last", "best"),
    "rollouts.backend": ("hf", "transformers", "vllm"),
    "adapter.method": ("lora", "head_and_norms", "full"),
    "adapter.scope": ("all", "beside_cut", "last"),
    "pruning.ratio_of": ("all", "mlp"),
    "merge.method": ("none", "slerp", "linear", "task_arithmetic", "ties"),
    "evaluation.backend": BACKENDS,
    "evaluation.dtype": ("auto", "float32", "bfloat16", "float16"),
    "analysis.kind": ("none", *ANALYSES),
    "analysis.dtype": ("auto", "float32", "bfloat16", "float16"),
    "trainer.accelerator": ("cpu", "gpu"),
    "trainer.strategy": ("ddp", "fsdp"),
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
    "finetune.cached_k": 1,
    "finetune.epochs": 1,
    "finetune.batch_size": 1,
    "finetune.max_length": 8,
    "finetune.num_rows": 1,
    "finetune.num_tokens": 1,
    "finetune.validation_rows": 0,
    "finetune.rollout_steps": 1,
    "adapter.rank": 1,
    "adapter.alpha": 1,
    "adapter.blocks": 1,
    "evaluation.limit": 1,
    "evaluation.num_fewshot": 0,
    "evaluation.batch_size": 1,
    "evaluation.max_new_tokens": 1,
    "evaluation.concurrency": 1,
    "evaluation.retries": 0,
    "judge.max_new_tokens": 1,
    "judge.concurrency": 1,
    "judge.retries": 0,
    "rollouts.concurrency": 1,
    "rollouts.retries": 0,
    "analysis.num_prompts": 1,
    "analysis.max_new_tokens": 1,
    "analysis.timed_prompts": 1,
    "analysis.repeats": 0,
    "analysis.context": 1,
    "analysis.prompt_tokens": 1,
    "analysis.new_tokens": 1,
    "analysis.batch_size": 1,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.threads": 1,
    "trainer.micro_batch_tokens": 1,
    "trainer.inference_batch_size": 1,
    "trainer.checkpoint_every": 1,
    "engine.batch_size": 1,
    "engine.max_new_tokens": 1,
    "engine.tries": 1,
    "engine.seed": 0,
    "engine.concurrency": 1,
    "engine.retries": 0,
    "metric.seed": 0,
    "metric.depth": 1,
    "metric.num_texts": 1,
    "width_metric.seed": 0,
}
AUTO = ("trainer.micro_batch_tokens", "trainer.inference_batch_size", "engine.batch_size", "evaluation.batch_size")
"""Where `auto` stands for what free memory allows (`sdd.stages.fitting`)."""
LARGEST = (1 << 31) - 1
"""Of whole numbers: what libraries take as a seed, a size or a count."""
AT_MOST = {
    "finetune.epochs": 10_000,
    "finetune.cached_k": 1 << 20,
    "adapter.rank": 65_536,
    "trainer.threads": 1_024,
    "engine.concurrency": 10_000,
    "evaluation.concurrency": 10_000,
    "judge.concurrency": 10_000,
    "rollouts.concurrency": 10_000,
}
"""Where less than `LARGEST` is too much for any machine."""
WITHIN = {
    "finetune.gold_share": (0.0, 1.0),
    "finetune.noise_share": (0.0, 1.0),
    "finetune.ce_share": (0.0, 1.0),
    "finetune.temperature": (1e-2, 100.0),
    "finetune.skew": (0.0, 0.99),
    "finetune.jsd_beta": (1e-3, 0.999),
    "finetune.taid_start": (0.0, 0.99),
    "finetune.clip_mass": (1e-3, 1.0),
    "finetune.rejected_weight": (0.0, 1.0),
    "finetune.choose_temperature": (0.0, 100.0),
    "finetune.student_share": (0.0, 1.0),
    "finetune.rollout_temperature": (0.0, 100.0),
    "finetune.warmup_share": (0.0, 1.0),
    "finetune.weight_decay": (0.0, 10.0),
    "finetune.clip_norm": (1e-6, 1e6),
    "adapter.dropout": (0.0, 0.99),
    "analysis.temperature": (1e-3, 100.0),
    "engine.temperature": (0.0, 100.0),
    "engine.top_p": (1e-6, 1.0),
    "engine.timeout": (1e-3, 1e6),
    "evaluation.timeout": (1.0, 1e6),
    "judge.timeout": (1e-3, 1e6),
    "rollouts.timeout": (1e-3, 1e6),
    **{
        f"{metric}.{key}": limits
        for metric in ("metric", "width_metric")
        for key, limits in {"first_cut": (0.0, 0.99), "alpha": (0.0, 1.0), "temperature": (1e-3, 100.0)}.items()
    },
}
POSITIVE = ("finetune.learning_rate", "repair.penalty")
"""Numbers above 0, and finite."""
SHARES_ABOVE_0 = ("pruning.keep", "merge.density", "finetune.deduplicate")
"""Numbers above 0 and at most 1."""
NOT_EMPTY = ("pruning.blocks", "dataset.families", "adapter.targets", "evaluation.tasks", "analysis.draft_lengths")
MOST_WEIGHT = 1e6
"""Of a loss beside others."""
MOST_STUDENTS = 32
"""Each is composed and checked like a config of its own."""
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
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    _check_keys(config)
    for key, choices in CHOICES.items():
        if (value := _at(values, key)) not in choices:
            raise UserError(f"{key}={value} is unknown; choose one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        value, by_memory = _at(values, key), key in AUTO
        if value is None or (by_memory and value == "auto"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{key}={value} must be an integer of at least {least}{', or auto' if by_memory else ''}")
    for key, most in AT_MOST.items():
        value = _at(values, key)
        if value is not None and value > most:
            raise UserError(f"{key}={value} must be an integer of at most {most:,}")
    for key, (low, high) in WITHIN.items():
        value = _at(values, key)
        if value is not None and not (_is_number(value) and low <= value <= high):
            raise UserError(f"{key}={value} must lie between {low:g} and {high:g}")
    for key in NOT_EMPTY:
        value = _at(values, key)
        if value is not None and not len(value):
            raise UserError(f"{key}=[] names nothing; name at least one, or leave it out")
    for key in POSITIVE:
        if not 0 < (value := _at(values, key)) < math.inf:
            raise UserError(f"{key}={value} must be positive and finite")
    for key in SHARES_ABOVE_0:
        value = _at(values, key)
        if value is not None and not 0 < value <= 1:
            raise UserError(f"{key}={value:g} must be above 0 and at most 1")
    for key in ("contiguous", "keep_final"):
        if not isinstance(OmegaConf.select(config, f"metric.{key}", default=False), bool):
            raise UserError(f"metric.{key}={config.metric[key]} must be true or false")
    for key in config.logger:
        if key not in LOGGER_SETTINGS:
            raise UserError(f"logger.{key} is no setting here; choose from {', '.join(LOGGER_SETTINGS[1:])}")
        if key != "_target_" and config.logger.get("_target_") == TENSORBOARD:
            raise UserError(f"logger.{key} belongs to logger=wandb; logger=tensorboard has no settings, leave it out")
    if config.fetch and config.dry_run:
        raise UserError("fetch=true and dry_run=true exclude each other: a dry run fetches nothing; keep one")
    pruning = config.pruning
    if pruning.blocks is not None and (pruning.start is not None):
        raise UserError("pruning.blocks and pruning.start exclude each other; keep one")
    if pruning.blocks is not None and len(set(pruning.blocks)) < len(pruning.blocks):
        raise UserError(f"pruning.blocks={list(pruning.blocks)} names a block twice")
    if pruning.ratio is not None and not 0 < pruning.ratio < 1:
        raise UserError(f"pruning.ratio={pruning.ratio:g} must lie between 0 and 1, both excluded")
    other = next((key for key in ("size", "blocks", "ratio") if pruning[key]), None)
    if pruning.keep is not None and other is not None:
        raise UserError(
            f"pruning.keep={pruning.keep:g} and pruning.{other}={pruning[other]} both say how much goes; keep one "
            f"(pruning={pruning.keep:g} on the command line)"
        )
    if pruning.start is not None and pruning.size == 0 and pruning.keep is None:
        raise UserError("pruning.start needs pruning.size; add for example pruning=n2")
    if pruning.after is not None:
        if not other and pruning.keep is None:
            raise UserError(
                "pruning.after is a student to cut further, and nothing is removed; add for example pruning=n2"
            )
        if pruning.ratio is not None or config.repair.method != "none":
            key = "pruning.ratio" if pruning.ratio is not None else f"repair={config.repair.method}"
            raise UserError(f"{key} is for the first cut, and pruning.after removes blocks only; leave it out")
    _check_loss(plain(config.finetune))
    _check_draw(config.finetune)
    rollouts = list(config.finetune.rollout_tokens)
    if len(rollouts) != 2 or not 1 <= rollouts[0] <= rollouts[1]:
        raise UserError(
            f"finetune.rollout_tokens={rollouts} must be two numbers of tokens, each at least 1 and the second no "
            "smaller, such as [16,96]"
        )
    adapter = config.adapter
    if adapter.quantisation not in (None, "nf4"):
        raise UserError(f"adapter.quantisation={adapter.quantisation} is unknown; choose nf4, or null for none")
    if adapter.method != "lora" and (adapter.quantisation is not None or adapter.scope != "all"):
        key = "scope" if adapter.quantisation is None else "quantisation"
        raise UserError(f"adapter.{key}={adapter[key]} goes with LoRA; leave it out, or choose adapter.method=lora")
    if adapter.method == "lora" and adapter.dropout > 0 and config.trainer.micro_batch_tokens == "auto":
        raise UserError(
            f"trainer.micro_batch_tokens=auto: with adapter.dropout={adapter.dropout:g} draws follow the passes, whose "
            "size is then a part of the result; give a number"
        )
    _check_trainer(config)
    engine = config.engine
    if engine.get("tries", 1) > 1 and not engine.get("temperature"):
        raise UserError("engine.tries > 1 needs sampling; set engine.temperature above 0")
    if config.finetune.choice != "first" and engine.get("tries", 1) < 2:
        choice = f"finetune.choice={config.finetune.choice}"
        raise UserError(f"{choice} chooses among several rewrites; add engine.tries=4 engine.temperature=0.7")
    if config.finetune.choice == "judge" and not config.judge.model:
        raise UserError("finetune.choice=judge needs the name that the server gives the judge; add judge.model=NAME")
    if lacking := [place for place in ("{prompt}", "{answers}") if place not in (config.judge.template or place)]:
        raise UserError(f"judge.template lacks {lacking[0]}; it shows the task, and the answers by their numbers")
    if config.finetune.same_rows and config.finetune.cached is not None:
        raise UserError(
            "finetune.same_rows=true may put references where finetune.cached keeps what the teacher says of targets; "
            "leave one of them out"
        )
    _check_backend(config.evaluation)
    _check_rollouts(config.rollouts, adapter)
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
    _check_values(values, "")


def _at(values: Any, key: str) -> Any:
    """The plain value at a dotted key; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _check_values(value: Any, where: str) -> None:
    """Every value is one that libraries take: a number is finite, and a whole one of 32 bits; a text is Unicode."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_values(key, f"{where}: a key")
            _check_values(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_values(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value} is no finite number")
    elif isinstance(value, str) and not value.isascii() and _is_cut(value):
        raise UserError(f"{where} has half a character (a lone surrogate such as \\ud800), which is no text")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{where}={str(value)[:40]} must be an integer of at most {LARGEST:,}")


def _is_cut(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _check_loss(finetune: dict[str, Any]) -> None:
    """`loss` is a known name or positive weights by name, and what it needs is there."""
    loss, mode = finetune["loss"], finetune["mode"]
    if loss is None:
        weights = dict(MODES[mode].loss or {}) if mode in MODES else {}
    elif isinstance(loss, str):
        weights = {loss: 1.0}
    elif isinstance(loss, dict) and loss:
        weights = loss
    else:
        raise UserError(f"finetune.loss={loss} must be the name of a loss, or weights by name: {{jsd: 0.5, ...}}")
    for name, weight in weights.items():
        if name not in LOSSES:
            raise UserError(f"finetune.loss={name} is unknown; choose one of {', '.join(LOSSES)}")
        if not (_is_number(weight) and 0 < weight <= MOST_WEIGHT):
            raise UserError(f"finetune.loss.{name}={weight} must be above 0 and at most {MOST_WEIGHT:g}")
    if (cached := finetune["cached"]) not in (None, "top_k", "sampled"):
        raise UserError(f"finetune.cached={cached} is unknown; choose top_k or sampled, or null for none")
    if finetune["cached_bits"] not in (8, 16, 32):
        raise UserError(f"finetune.cached_bits={finetune['cached_bits']} is unknown; choose 8, 16 or 32")
    if cached:
        if mode in MODES and MODES[mode].rollouts and finetune["student_share"] > 0:
            raise UserError(
                f"finetune.cached={cached} keeps what the teacher says of targets, and finetune={mode} learns on the "
                "student's own words; leave finetune.cached out"
            )
        _check_cached(cached, weights, finetune["temperature"])
    if loss is not None and finetune["ce_share"]:
        raise UserError(
            f"finetune.ce_share={finetune['ce_share']:g} goes with a mode's own loss; give finetune.loss the weight: "
            "{cross_entropy: 0.5, ...}"
        )
    if mode not in MODES:
        return
    untaught = next((name for name in weights if not LOSSES[name].needs_teacher), None)
    if MODES[mode].rollouts and finetune["student_share"] and (untaught or finetune["ce_share"]):
        raise UserError(
            f"finetune={mode}: on the student's own answers {untaught or 'cross_entropy'} would teach it what it says "
            "already; choose a loss with a teacher, such as finetune.loss=reverse_kl"
        )
    if "redi" not in weights:
        return
    if MODES[mode].targets != "rewrites":
        raise UserError(
            f"finetune.loss=redi learns from rejected rewrites, which finetune={mode} has none of; choose finetune=redi"
        )
    if not finetune["select"]:
        raise UserError("finetune.loss=redi learns from rejected rewrites; finetune.select=false rejects none")


def _check_trainer(config: DictConfig) -> None:
    """A model is spread by a known map; shards are of a student that several devices train together."""
    trainer, finetune = config.trainer, config.finetune
    if trainer.device_map not in (None, *MAPS):
        raise UserError(
            f"trainer.device_map={trainer.device_map} is unknown; choose one of {', '.join(MAPS)}, or null for none"
        )
    memory = trainer.max_memory
    amounts = {} if memory is None else plain(memory) if isinstance(memory, DictConfig) else {"": memory}
    if not all(DEVICE.fullmatch(device) and AMOUNT.fullmatch(str(amount)) for device, amount in amounts.items()):
        raise UserError(f"trainer.max_memory={memory} must be amounts by device, such as {{gpu0: 70GiB, cpu: 100GiB}}")
    if amounts and trainer.device_map is None:
        raise UserError("trainer.max_memory is for a model that is spread; add trainer.device_map=auto")
    if trainer.num_nodes > 1 and (by_memory := [key for key in AUTO if OmegaConf.select(config, key) == "auto"]):
        raise UserError(f"{by_memory[0]}=auto is what one machine has room for; with trainer.num_nodes choose a number")
    if trainer.strategy != "fsdp":
        return
    if trainer.devices * trainer.num_nodes < 2:
        raise UserError("trainer.strategy=fsdp splits the student over devices; add trainer.devices=2, or leave it out")
    if config.adapter.quantisation is not None:
        raise UserError(
            f"adapter.quantisation={config.adapter.quantisation} keeps weights that trainer.strategy=fsdp cannot "
            "split; leave one of them out"
        )
    if finetune.mode in MODES and MODES[finetune.mode].rollouts and finetune.student_share > 0:
        raise UserError(
            f"finetune={finetune.mode} has each device write answers of its own, and with trainer.strategy=fsdp none "
            "has the whole student; choose trainer.strategy=ddp"
        )


def _check_draw(finetune: Any) -> None:
    """Which rows are trained on, and what each counts."""
    for key in ("weights", "domains"):
        if finetune[key] not in (None, "damage"):
            raise UserError(f"finetune.{key}={finetune[key]} is unknown; choose damage, or null for none")
    rows, tokens = finetune.num_rows, finetune.num_tokens
    if rows is not None and tokens is not None:
        raise UserError(
            f"finetune.num_rows={rows} and finetune.num_tokens={tokens} both say how much is trained on; keep one (set "
            "the other to null)"
        )
    for key in ("choose", "domains"):
        if finetune[key] == "damage" and rows is None and tokens is None:
            raise UserError(
                f"finetune.{key}=damage chooses nothing where all rows are taken; add finetune.num_tokens or num_rows"
            )
    own_loss = finetune.mode in MODES and MODES[finetune.mode].loss is not None
    if finetune.weights is not None and (own_loss or finetune.loss is not None):
        raise UserError(
            f"finetune.weights=damage weighs cross-entropy, and finetune={finetune.mode} has another loss; leave it "
            "out, or choose finetune=sft or self_distill without finetune.loss"
        )


def _check_rollouts(rollouts: Any, adapter: Any) -> None:
    if rollouts.backend == "hf":
        if rollouts.base_url is not None:
            raise UserError("rollouts.base_url belongs to a server; add rollouts.backend=transformers, or leave it out")
        return
    backend = f"rollouts.backend={rollouts.backend}"
    if adapter.quantisation is not None:
        raise UserError(
            f"{backend} would serve another student than learns: adapter.quantisation={adapter.quantisation} keeps its "
            "base in 4 bits here; leave one of them out"
        )
    if rollouts.backend == "vllm" and adapter.method != "lora":
        raise UserError(f"{backend} has the server load an adapter; choose adapter=lora, or rollouts.backend=hf")


def _check_backend(evaluation: Any) -> None:
    if evaluation.backend == "server":
        if not evaluation.model:
            raise UserError(
                "evaluation.backend=server needs the name that the server gives the model; add evaluation.model=NAME"
            )
        return
    for key in ("base_url", "model"):
        if evaluation[key] is not None:
            raise UserError(f"evaluation.{key} belongs to evaluation.backend=server; add that, or leave it out")
    if not evaluation.prompt_ids:
        raise UserError("evaluation.prompt_ids=false belongs to evaluation.backend=server; add that, or leave it out")


def _check_cached(cached: str, weights: dict[str, float], temperature: float) -> None:
    """What is kept of the teacher's logits serves the losses."""
    for name in weights:
        if LOSSES[name].needs == "teacher states":
            raise UserError(
                f"finetune.cached={cached} keeps the teacher's probabilities, and finetune.loss={name} needs its "
                "states; leave finetune.cached out"
            )
        if LOSSES[name].needs == "teacher logits" and cached == "sampled" and name != "forward_kl":
            raise UserError(
                f"finetune.cached=sampled serves forward_kl alone; with finetune.loss={name} choose "
                "finetune.cached=top_k"
            )
        if name == "total_variation" and temperature != 1 and len(weights) > 1:
            raise UserError(
                f"finetune.cached={cached} keeps probabilities at one temperature, and total_variation knows none; "
                "set finetune.temperature=1"
            )


def _check_merge(merge: Any) -> None:
    method, number = merge.method, len(merge.students)
    if method == "none":
        return
    if number > MOST_STUDENTS:
        raise UserError(f"merge.students has {number:,} students; choose at most {MOST_STUDENTS}")
    if number < 2 or (method == "slerp" and number > 2):
        needs = "exactly two students" if method == "slerp" else "at least two students"
        instead = "; choose merge=linear for more" if number > 2 else ""
        raise UserError(
            f"merge={method} needs {needs}, merge.students has {number}{instead}; write them as "
            "merge.students=[[dataset=tiny_math],[dataset=tiny_instruct]]"
        )
    settings = MERGE_SETTINGS[method]
    for key in ("t", "space", "weights", "density"):
        if merge[key] is not None and key not in settings:
            raise UserError(f"merge.{key} does not belong to merge.method={method}; leave it out, or choose the option")
        if merge[key] is None and key in settings and key != "weights":
            raise UserError(f"merge.method={method} needs merge.{key}; choose the option merge={method}")
    if "t" in settings:
        _check_share(plain(merge)["t"], "merge.t")
    if merge.space not in (None, "weights", "task_vectors"):
        raise UserError(f"merge.space={merge.space} is unknown; choose one of weights, task_vectors")
    if merge.weights is not None:
        weights = list(merge.weights)
        if len(weights) != number or not all(map(math.isfinite, weights)):
            raise UserError(f"merge.weights={weights} must have one number for each of the {number} students")
        if method != "task_arithmetic" and min(weights) <= 0:
            raise UserError(f"merge.weights={weights} must be positive for merge={method}")


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
    names = {item.name for item in fields(kind)} if is_dataclass(kind) else set(node)
    if gone := sorted(names - set(node)):
        raise UserError(f"{where}{gone[0]} was taken out, which no setting can be; leave it as it is")
    for key in node:
        if key not in names:
            raise UserError(f"{where}{key} is not a setting; choose from {', '.join(sorted(names))}")
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
    cut = f"pruning.size={size}" if blocks is None else f"pruning.blocks={list(blocks)}"
    if size >= num_blocks:
        verb = "removes all" if size == num_blocks else "is more than the"
        raise UserError(f"{cut} {verb} {num_blocks} blocks; choose at most {num_blocks - 1}")
    if pruning.start is not None and not 0 <= pruning.start <= num_blocks - size:
        raise UserError(
            f"pruning.start={pruning.start} with pruning.size={size} leaves the model; choose 0 to {num_blocks - size}"
        )
