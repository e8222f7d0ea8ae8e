"""The map of the house: a composed config becomes a graph of recipes.

teacher -> scores -> pruned; dataset -> rewrites -> targets; pruned + targets -> tuned; tuned ones -> merged; any of
them -> evaluated, or analysed: answered (by teacher and student) -> drafted, shifted; targets -> surprisals -> shifted;
measured. What is in a key and what is not is decided here and nowhere else. Knows nothing of how anything is computed;
reads only configs, digests and row counts.
"""

import dataclasses
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from sdd import models
from sdd.allowed import build
from sdd.channels import SDM, ChannelCriterion, TaylorWidth
from sdd.config import CHOICES, MERGE_SETTINGS, check_pruning
from sdd.data import Example
from sdd.errors import NotFetched, UserError
from sdd.hub import checkpoint_folder
from sdd.prompts import PLAIN_TEMPLATE
from sdd.pruning import check_names, count_parameters, matrices, tensor_names
from sdd.repair import check_repairable, cuts_of
from sdd.shift import embedder_digest, embedder_folder
from sdd.store import Recipe, canonical, digest_of
from sdd.width import Share, sizes_of

log = logging.getLogger(__name__)

T = TypeVar("T")

VERSIONS = {"scores": 1, "pruned": 1, "rewrites": 1, "targets": 1, "tuned": 1, "merged": 1, "evaluated": 1}
VERSIONS |= {"answered": 1, "surprisals": 1, "drafted": 1, "shifted": 1, "measured": 1}
"""Raised when the way a stage computes changes its content."""

STAND_IN = "not fetched: "
"""How a dry run's digest of what is not on this machine begins."""

FROM_DATASET = "sdd.data.texts.DatasetTexts"
"""The calibration texts that are made of the fine-tuning rows."""
LOCAL_TEXTS = "sdd.data.texts.LocalTexts"


def is_provisional(recipe: Recipe) -> bool:
    """Whether the recipe's address is another one once all it names has been fetched."""
    return any(STAND_IN in canonical(upstream.spec) for upstream in recipe.walk())


def _hub(node: DictConfig) -> dict[str, Any] | None:
    """A config's `hub` node as plain values; None where it names no repository."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()} if values["repository"] else None


def _given(**values: Any) -> dict[str, Any]:
    """The values that are set: a part whose constructor does not know a setting refuses it only if it was given."""
    return {key: value for key, value in values.items() if value is not None}


def _floats(value: Any) -> Any:
    """The value with integers as floats, containers included, so that 1 and 1.0 are one setting."""
    if isinstance(value, dict):
        return {str(key): _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int) else value


class Recipes:
    """The recipes that one config stands for.

    `sources` maps the digests that they name to paths on this machine, `texts` to calibration texts. In a dry run
    nothing is fetched: what is not here has a stand-in for its digest. `students` are the recipes of those to merge.
    """

    def __init__(self, config: DictConfig, digest_memory: Path, students: "Sequence[Recipes]" = ()) -> None:
        self.config = config
        self.digest_memory = digest_memory
        self.students = list(students)
        self.sources: dict[str, Path] = {}
        self.texts: dict[str, list[str]] = {}
        self._task_files: dict[str, Path] | None = None
        check_pruning(config.pruning, self.num_blocks)

    # ---- models ------------------------------------------------------------------------------------------------

    @cached_property
    def model_folder(self) -> Path:
        model = self.config.model
        return checkpoint_folder(model.path, model.revision, fetch=not self.config.dry_run)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The model's `config.json`, or in a dry run before it is fetched, `model.shape`."""

        def look() -> dict[str, Any]:
            return models.read_config(self.model_folder)

        shape = {str(key): value for key, value in self.config.model.shape.items()}
        return self._known(look, shape) if shape else look()

    @cached_property
    def num_blocks(self) -> int:
        return int(self.sizes["num_hidden_layers"])

    def _known(self, look: Callable[[], T], otherwise: T) -> T:
        """What `look` finds; in a dry run `otherwise`, where it would have to be fetched first."""
        try:
            return look()
        except NotFetched:
            if not self.config.dry_run:
                raise
            return otherwise

    def _digest(self, path: str, revision: str | None) -> str:
        def look() -> str:
            folder = checkpoint_folder(path, revision, fetch=not self.config.dry_run)
            count_parameters(folder)  # reads the header of every file, so that a file cut short is told now
            digest = models.model_digest(folder, self.digest_memory)
            self.sources[digest] = folder
            return digest

        return self._known(look, f"{STAND_IN}{path}@{revision}")

    @cached_property
    def model_digest(self) -> str:
        return self._digest(self.config.model.path, self.config.model.revision)

    @cached_property
    def teacher_digest(self) -> str:
        teacher = self.config.teacher
        if teacher.path is None:
            return self.model_digest
        try:
            return self._digest(teacher.path, teacher.revision)
        except UserError as error:
            message = str(error).replace("model.path=", "teacher.path=", 1)
            raise UserError(message.replace("model.revision", "teacher.revision")) from None

    def _plain_template(self, digest: str) -> dict[str, str]:
        """The plain chat template, for the key of what a model without one of its own has to do with."""
        folder = self.sources.get(digest)
        return {} if folder is None or models.has_chat_template(folder) else {"chat_template": PLAIN_TEMPLATE}

    # ---- the cut -----------------------------------------------------------------------------------------------

    def scores(self) -> Recipe:
        self._check_metric("metric", channels=False)
        metric = OmegaConf.to_container(self.config.metric, resolve=True)
        criterion = build(metric)
        labels = {"metric": criterion.name}
        if criterion.needs == "nothing":
            return self._recipe("scores", {"metric": metric, "num_blocks": self.num_blocks}, {}, labels)
        if criterion.needs == "weights":
            return self._recipe("scores", {"metric": metric, "model": self.model_digest}, {}, labels)
        if criterion.needs == "rows":
            return self._recipe("scores", self._rows_scored(metric), {}, labels)
        spec = {
            "metric": metric,
            "model": self.model_digest,
            "dtype": self.config.model.dtype,
            **self._calibration_spec,
            "max_length": self.config.calibration.max_length,
        }
        return self._recipe("scores", spec, {}, labels | self._calibration_labels)

    def _rows_scored(self, metric: Any) -> dict[str, Any]:
        """The key of a score on the first of the fine-tuning rows, in chats of at most `calibration.max_length`."""
        return {
            "metric": metric,
            "model": self.model_digest,
            "dtype": self.config.model.dtype,
            "dataset": self._dataset_spec,
            "num_rows": self.num_texts,
            "max_length": self.config.calibration.max_length,
            "system_prompt": self.config.dataset.system_prompt,
            **self._plain_template(self.model_digest),
        }

    @property
    def num_texts(self) -> int:
        """How many texts are looked at: all that there are, unless the criterion wants fewer."""
        asked = int(self.config.calibration.num_texts)
        return min(asked, self.config.metric.get("num_texts") or asked)

    @cached_property
    def _calibration(self) -> Any:
        calibration = self.config.calibration
        node = {"_target_": calibration._target_}
        if calibration._target_ == FROM_DATASET:
            return build(node, num_texts=self.num_texts, dataset=self._dataset, dataset_spec=self._dataset_spec)
        drawn = _given(hub=_hub(calibration.hub), seed=calibration.seed)
        return build(node, path=calibration.path, num_texts=self.num_texts, **drawn)

    @cached_property
    def _calibration_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self._calibration.spec()
        return spec

    @property
    def _calibration_labels(self) -> dict[str, str]:
        """With the file of the texts, all that rerunning needs."""
        calibration = self.config.calibration
        if calibration.path is None or calibration._target_ == LOCAL_TEXTS:
            return {}
        return {"calibration": canonical({"_target_": calibration._target_, **_given(seed=calibration.seed)})}

    def pruned(self) -> Recipe | None:
        """None where nothing is pruned: the student then starts from the unpruned model."""
        cut, repair = self._cut(), self.config.repair
        if repair.method == "none":
            return cut
        if self.config.pruning.ratio is not None:
            raise UserError(
                f"repair={repair.method} is for removed blocks only, not for narrower ones; choose repair=none"
            )
        removed = None if cut is None else cut.spec.get("blocks")
        if cut is None or not (removed or cut.spec.get("size")):
            raise UserError(
                f"repair={repair.method} refits what is before removed blocks, and none is removed; add for example "
                "pruning=n2, or choose repair=none"
            )
        if removed:
            cuts_of([block for block in range(self.num_blocks) if block not in removed], removed)
        self._known(lambda: bool(check_repairable(self.model_folder)), True)
        spec = {
            "model": self.model_digest,
            "repair": repair.method,
            "penalty": repair.penalty,
            "dtype": self.config.model.dtype,
            **self._calibration_spec,
            "max_length": self.config.calibration.max_length,
        }
        return self._recipe("pruned", spec, {"pruned": cut}, cut.labels | self._calibration_labels)

    def _cut(self) -> Recipe | None:
        """The pruned model as it comes from the cut, before any repair. Blocks go before channels."""
        pruning = self.config.pruning
        if pruning.ratio is None:
            if self.config.width_metric and (pruning.size or pruning.blocks is not None):
                raise UserError("metric@width_metric scores channels; add pruning.ratio=0.2, or leave it out")
            return self._without_blocks()
        self._check_metric(self._width_metric, channels=True)
        gone = self.blocks_removed
        share = Share(pruning.ratio, pruning.ratio_of, pruning.multiple)
        self._known(lambda: sizes_of(self.model_folder).width(share, gone), None)
        depth = self._without_blocks()
        scores = self.channel_scores(depth)
        spec = {
            "model": self.model_digest,
            "ratio": pruning.ratio,
            "ratio_of": pruning.ratio_of,
            "multiple": pruning.multiple,
        }
        inputs = {"scores": scores} if depth is None else {"scores": scores, "pruned": depth}
        both = "+".join(recipe.labels["metric"] for recipe in (depth, scores) if recipe and "metric" in recipe.labels)
        return self._recipe("pruned", spec, inputs, {"metric": both})

    @property
    def blocks_removed(self) -> int:
        pruning = self.config.pruning
        return int(pruning.size if pruning.blocks is None else len(pruning.blocks))

    @property
    def _width_metric(self) -> str:
        """The node that names the criterion of a width cut."""
        pruning = self.config.pruning
        alone = not pruning.size or pruning.start is not None or pruning.blocks is not None
        return "metric" if alone and not self.config.width_metric else "width_metric"

    def _check_metric(self, node: str, channels: bool) -> None:
        """Refuse a criterion of blocks for a cut of channels, and the reverse."""
        pruning, given = self.config.pruning, self.config[node]
        if not given:
            raise UserError(
                f"pruning.size={pruning.size} and pruning.ratio={pruning.ratio:g} need a criterion each; add for "
                "example metric=angular metric@width_metric=sdm"
            )
        criterion = build(given)
        if isinstance(criterion, ChannelCriterion) == channels:
            return
        name = f"{'metric@' if node != 'metric' else ''}{node}={criterion.name}"
        if channels:
            raise UserError(
                f"{name} scores blocks, but pruning.ratio={pruning.ratio:g} removes MLP channels; choose one of "
                "sdm, taylor_width, activation_width, magnitude_width, random_width, or prune blocks (pruning=n2)"
            )
        raise UserError(
            f"{name} scores MLP channels, but pruning.size={pruning.size} removes blocks; choose a criterion of blocks "
            "such as metric=angular (for channels beside it metric@width_metric=sdm), or pruning=mlp20"
        )

    def channel_scores(self, depth: Recipe | None) -> Recipe:
        """Scores of MLP channels, of the unpruned model or of the one without blocks."""
        pruning = self.config.pruning
        node = OmegaConf.to_container(self.config[self._width_metric], resolve=True)
        assert isinstance(node, dict)
        criterion = build(node)
        labels, inputs = {"metric": criterion.name}, {} if depth is None else {"pruned": depth}
        if criterion.needs == "nothing":
            spec = {"num_blocks": self.num_blocks - self.blocks_removed}
            spec["intermediate_size"] = int(self.sizes["intermediate_size"])
            return self._recipe("scores", {"metric": node, **spec}, {}, labels)
        if isinstance(criterion, SDM | TaylorWidth) and self.config.model.dtype == "float16":
            raise UserError(
                f"metric={criterion.name} takes gradients, which float16 rounds to zero; set model.dtype=bfloat16"
            )
        measured = {}
        if criterion.needs == "texts":
            shown = {**self._calibration_spec, "max_length": self.config.calibration.max_length}
            measured, labels = {"dtype": self.config.model.dtype, **shown}, labels | self._calibration_labels
        model = {"model": self.model_digest}
        if not isinstance(criterion, SDM):
            return self._recipe("scores", {"metric": node, **measured} | ({} if depth else model), inputs, labels)
        node |= criterion.resolved(pruning.ratio, pruning.ratio_of)
        first = {"metric": {"_target_": "sdd.channels.TaylorWidth"}, **measured} | ({} if depth else model)
        stage1 = self._recipe("scores", first, inputs, labels | {"metric": TaylorWidth.name})
        return self._recipe("scores", {"metric": node, **measured, **model}, inputs | {"first": stage1}, labels)

    def _without_blocks(self) -> Recipe | None:
        """The model without the blocks that go; None where none does."""
        pruning = self.config.pruning
        if pruning.size or pruning.blocks is not None:
            self._known(lambda: check_names(self.model_folder), None)
        blocks = None if pruning.blocks is None else sorted(pruning.blocks)
        if pruning.start is not None:
            blocks = list(range(pruning.start, pruning.start + pruning.size))
        if blocks is not None:
            return self._recipe("pruned", {"model": self.model_digest, "blocks": blocks}, {}, {})
        if pruning.size == 0:
            return None
        depth = self.config.metric.get("depth") or pruning.size
        if pruning.size > depth:
            raise UserError(
                f"pruning.size={pruning.size}, but metric.depth={depth} removals are measured; raise metric.depth"
            )
        scores = self.scores()
        spec = {"model": self.model_digest, "size": pruning.size, "rule": "lowest"}
        return self._recipe("pruned", spec, {"scores": scores}, scores.labels)

    # ---- the data ----------------------------------------------------------------------------------------------

    @cached_property
    def _dataset(self) -> Any:
        return self._source(self.config.dataset)

    def _source(self, dataset: DictConfig) -> Any:
        if not dataset.parts:
            return self._rows(dataset, dataset.seed, dataset.num_rows)
        return build(
            {"_target_": dataset._target_},
            parts={name: partial(self._rows, part, dataset.seed) for name, part in dataset.parts.items()},
            weights={name: part.weight for name, part in dataset.parts.items()},
            num_rows=dataset.num_rows,
        )

    def _rows(self, rows: DictConfig, seed: int, num_rows: int | None) -> Any:
        """A source of rows as the config describes it."""
        return build(
            {"_target_": rows._target_},
            path=rows.path,
            num_rows=num_rows,
            seed=seed,
            families=None if rows.families is None else list(rows.families),
            **_given(hub=_hub(rows.hub), fields=None if rows.fields is None else dict(rows.fields)),
        )

    @cached_property
    def _dataset_spec(self) -> dict[str, Any]:
        spec = {"_target_": self.config.dataset._target_, **self._dataset.spec()}
        self.sources |= self._dataset.sources()
        return spec

    @property
    def rows(self) -> list[Example] | None:
        """The dataset's rows; None where they would have to be asked of the hub."""
        parts = list(self.config.dataset.parts.values()) or [self.config.dataset]
        if any(part.path is None and part.hub.repository is not None for part in parts):
            return None
        found: list[Example] = self._dataset.examples()
        return found

    def read_data(self, missing: Iterable[Recipe]) -> None:
        """Read what building the recipes needs, so that what is wrong with it is said before any work.

        Recipes name what lies on the hub without asking it; this is where it is asked.
        """
        missing = list(missing)
        for student in self.students:
            own = {recipe.address for recipe in student.tuned().walk()}
            student.read_data(recipe for recipe in missing if recipe.address in own)
            self.texts |= student.texts
        stages = {recipe.stage for recipe in missing}
        if "answered" in stages:
            self._check_held_out(len(self._prompts.examples()))
        if stages & {"rewrites", "targets"} and not self.students:
            examples = self._dataset.examples()
            if "tuned" in stages:
                self._check_rows(len(examples))
                self._check_lengths(examples)
        if any("distillation" in recipe.spec for recipe in missing):
            self._check_vocabulary()
        if any("texts" in recipe.spec for recipe in missing) and not self.students:
            self.texts[self._calibration_spec["texts"]] = self._calibration.texts()
        if "evaluated" in stages and stages != {"evaluated"} and self.config.evaluation.suite != "tiny":
            self._benchmark.check(self._task_files)

    @property
    def _labels(self) -> dict[str, str]:
        return {"dataset": self.config.dataset.name}

    def rewrites(self) -> Recipe:
        dataset = self.config.dataset
        engine = build(self.config.engine)
        spec = {
            "teacher": self.teacher_digest,
            "dtype": self.config.model.dtype,
            "dataset": self._dataset_spec,
            "template": self._of_rows("template"),
            "system_prompt": dataset.system_prompt,
            "engine": engine.spec(),
            **self._plain_template(self.teacher_digest),
        }
        if engine.tries > 1:
            spec["selection"] = self._selection()
        return self._recipe("rewrites", spec, {}, self._labels)

    def _of_rows(self, key: str) -> Any:
        """A setting of the dataset; in a mixture, of each part by name."""
        dataset = OmegaConf.to_container(self.config.dataset, resolve=True)
        assert isinstance(dataset, dict)
        return {name: part[key] for name, part in dataset["parts"].items()} if dataset["parts"] else dataset[key]

    def _selection(self) -> dict[str, Any]:
        return {"rule": self._of_rows("answer_rule"), "leak_phrases": self._of_rows("leak_phrases")}

    def targets(self) -> Recipe:
        finetune = self.config.finetune
        if finetune.mode == "none":
            raise UserError("finetune=none has no targets; choose finetune=sft or finetune=self_distill")
        if finetune.mode == "gold" and not self._dataset.has_gold:
            raise UserError("finetune=gold needs answers in the teacher's own register; this dataset has none")
        if finetune.mode in ("sft", "gold", "logit_distill"):
            spec = {"mode": finetune.mode, "dataset": self._dataset_spec}
            return self._recipe("targets", spec, {}, self._labels)
        spec = {
            "mode": finetune.mode,
            **self._selection(),
            "select": finetune.select,
            "gold_share": finetune.gold_share,
            **({"noise_share": finetune.noise_share} if finetune.noise_share else {}),
        }
        return self._recipe("targets", spec, {"rewrites": self.rewrites()}, self._labels)

    # ---- the student -------------------------------------------------------------------------------------------

    def tuned(self) -> Recipe:
        finetune = self.config.finetune
        if (rows := self._dataset.known_rows()) is not None:
            self._check_rows(rows)
        self._check_adapter()
        settings = OmegaConf.to_container(finetune, resolve=True)
        assert isinstance(settings, dict)
        for key in ("mode", "select", "gold_share", "noise_share", "ce_share", "temperature", "precision"):
            settings.pop(key)
        spec = {
            "adapter": self._adapter_spec(),
            "base_quantisation": self.config.adapter.quantisation,
            "precision": finetune.precision,
            "finetune": settings,
            "system_prompt": self.config.dataset.system_prompt,
            "seed": self.config.seed,
            **self._plain_template(self.model_digest),
        }
        if finetune.mode == "logit_distill":
            spec["distillation"] = {
                "teacher": self.teacher_digest,
                "dtype": self.config.model.dtype,
                "temperature": finetune.temperature,
                "ce_share": finetune.ce_share,
            }
        if spec["adapter"].get("dropout", 0) > 0:
            spec["micro_batch_tokens"] = self.config.trainer.micro_batch_tokens  # dropout's draws follow the passes
        inputs = {"targets": self.targets()}
        pruned = self.pruned()
        if pruned is None:
            spec["model"] = self.model_digest
        else:
            inputs["pruned"] = pruned
        return self._recipe("tuned", spec, inputs, self._labels)

    def _adapter_spec(self) -> dict[str, Any]:
        """What of the adapter's settings counts; LoRA on all blocks is named by its own four."""
        adapter = self.config.adapter
        if adapter.method != "lora":
            return {"method": adapter.method}
        spec = {key: adapter[key] for key in ("rank", "alpha", "dropout")} | {"targets": list(adapter.targets)}
        return spec if adapter.scope == "all" else spec | {"scope": adapter.scope, "blocks": adapter.blocks}

    def _check_rows(self, num_examples: int) -> None:
        """Refuse a split that the dataset is too small for."""
        finetune = self.config.finetune
        rows = num_examples - finetune.validation_rows
        if rows < 1:
            raise UserError(
                f"finetune.validation_rows={finetune.validation_rows} leaves no row to train on; "
                f"the dataset has {num_examples} rows"
            )
        if finetune.num_rows is not None and finetune.num_rows > rows:
            raise UserError(
                f"finetune.num_rows={finetune.num_rows}, but {rows} rows are left beside "
                f"{finetune.validation_rows} for validation; raise dataset.num_rows"
            )

    def _check_lengths(self, examples: list[Example]) -> None:
        """Refuse a limit that is below every row; of rows that wait for a rewrite, below every prompt."""
        from sdd.prompts import training_ids

        finetune, system_prompt = self.config.finetune, self.config.dataset.system_prompt
        tokenizer = models.load_tokenizer(self.model_folder)
        shortest = None
        for example in examples:
            target = {"self_distill": "", "gold": example.gold}.get(finetune.mode, example.reference) or ""
            length = len(training_ids(tokenizer, example.prompt, target, system_prompt)[0])
            if length <= finetune.max_length:
                return
            shortest = length if shortest is None else min(shortest, length)
        raise UserError(
            f"finetune.max_length={finetune.max_length} is shorter than every row of the dataset; the shortest has "
            f"{shortest} tokens{' without its answer' if finetune.mode == 'self_distill' else ''}, raise it"
        )

    def _check_vocabulary(self) -> None:
        """Refuse a teacher whose probabilities are not over the student's own tokens."""
        if self.teacher_digest == self.model_digest:
            return
        model, teacher = self.model_folder, self.sources[self.teacher_digest]
        sizes = [models.read_config(folder)["vocab_size"] for folder in (teacher, model)]
        same = sizes[0] == sizes[1]
        if not same or models.load_tokenizer(teacher).get_vocab() != models.load_tokenizer(model).get_vocab():
            what = f"{sizes[0]} tokens and the model's {sizes[1]}" if not same else "other tokens than the model's"
            raise UserError(
                f"teacher.path={self.config.teacher.path}: its vocabulary has {what}, and logit distillation compares "
                "token by token; choose a teacher of the same family, or finetune=self_distill"
            )

    def _check_adapter(self) -> None:
        adapter, pruning = self.config.adapter, self.config.pruning
        if adapter.method != "lora":
            return
        removed = self.blocks_removed
        if adapter.scope == "beside_cut" and not removed and pruning.ratio is not None:
            raise UserError(
                f"adapter.scope=beside_cut needs removed blocks, but pruning.ratio={pruning.ratio:g} narrows every "
                "block alike; choose adapter=lora, or remove blocks too: pruning.size=2"
            )
        if adapter.scope == "beside_cut" and not removed:
            raise UserError(
                "adapter.scope=beside_cut needs a cut; choose another adapter, or add for example pruning=n2"
            )
        if adapter.scope == "last" and adapter.blocks > self.num_blocks - removed:
            raise UserError(
                f"adapter.blocks={adapter.blocks} is more than the student's {self.num_blocks - removed} blocks"
            )
        targets = list(adapter.targets)
        if targets == ["all-linear"]:
            return
        names: set[str] = self._known(lambda: matrices(self.model_folder), set())
        for target in targets:
            if names and not any(name == target or name.endswith(f".{target}") for name in names):
                known = sorted({name.rsplit(".", 1)[1] for name in names if ".layers." in name})
                raise UserError(
                    f"adapter.targets: no linear layer {target}; choose [all-linear] or from {', '.join(known)}"
                )

    def merged(self) -> Recipe:
        merge = OmegaConf.to_container(self.config.merge, resolve=True)
        assert isinstance(merge, dict)
        inputs = {}
        for number, student in enumerate(self.students):
            inputs[f"student{number}"] = self._of_student(number, student)
            self.sources |= student.sources
        self._check_students(inputs)
        spec: dict[str, Any] = {"method": merge["method"]}
        for key in MERGE_SETTINGS[merge["method"]]:
            spec[key] = _floats(merge[key]) if key != "weights" else _floats(merge[key] or [1] * len(inputs))
        if "t" in spec:
            self._check_kinds(spec["t"])
        datasets = dict.fromkeys(recipe.labels["dataset"] for recipe in inputs.values())
        return self._recipe("merged", spec, inputs, {"dataset": "+".join(datasets), "merge": merge["method"]})

    def _of_student(self, number: int, student: "Recipes") -> Recipe:
        try:
            if student.config.finetune.mode == "none":
                raise UserError("finetune=none tunes nothing; choose finetune=sft or finetune=self_distill")
            if student.model_digest != self.model_digest:
                raise UserError("it has another model; choose the model for the whole command")
            return student.tuned()
        except UserError as error:
            raise UserError(f"merge.students[{number}]: {error}") from None

    def _check_students(self, inputs: dict[str, Recipe]) -> None:
        """Refuse students of different bases, and one student twice."""
        seen: dict[str, str] = {}
        first = inputs["student0"].inputs.get("pruned")
        for name, recipe in inputs.items():
            number, base = name.removeprefix("student"), recipe.inputs.get("pruned")
            if base != first:
                stands = [f"pruned/{one.address}" if one else "the unpruned model" for one in (first, base)]
                raise UserError(
                    f"merge.students[{number}] stands on {stands[1]}, [0] on {stands[0]}; merge students of one base"
                )
            if recipe.address in seen:
                raise UserError(
                    f"merge.students[{number}] is the same student as [{seen[recipe.address]}] "
                    f"(tuned/{recipe.address}); choose another, for example by its seed"
                )
            seen[recipe.address] = number

    def _check_kinds(self, t: Any) -> None:
        names: set[str] = self._known(lambda: tensor_names(self.model_folder), set())
        parts = {part for name in names for part in name.split(".")}
        for kind in t if isinstance(t, dict) and parts else ():
            if kind != "default" and kind not in parts:
                known = ", ".join(sorted(part for part in parts - {"weight"} if not part.isdigit()))
                raise UserError(f"merge.t: no kind of tensor {kind}; choose default or from {known}")

    def student(self) -> Recipe | None:
        """What is evaluated: merged, tuned or pruned; None for the unpruned model itself."""
        if self.config.merge.method != "none":
            return self.merged()
        return self.pruned() if self.config.finetune.mode == "none" else self.tuned()

    def evaluated(self) -> Recipe:
        settings = self.config.evaluation
        spec = {
            "suite": settings.suite,
            **(self._embedded_tasks() if settings.suite == "tiny" else self._stock_tasks()),
            "limit": settings.limit,
            "chat_template": settings.chat_template,
            "system_prompt": settings.system_prompt,
            "dtype": self._evaluation_dtype(),
            "max_new_tokens": settings.max_new_tokens,
            "lm_eval": importlib.metadata.version("lm-eval"),
            **(self._plain_template(self.model_digest) if settings.chat_template else {}),
        }
        student = self.student()
        if student is None:
            return self._recipe("evaluated", spec | {"model": self.model_digest}, {}, {})
        return self._recipe("evaluated", spec, {"model": student}, student.labels)

    def _evaluation_dtype(self) -> str:
        return self._dtype("evaluation")

    def _dtype(self, node: str) -> str:
        """The dtype that a node of the config names, or the checkpoint's own."""
        if self.config[node].dtype != "auto":
            return str(self.config[node].dtype)
        dtype = str(self.sizes.get("dtype") or self.sizes.get("torch_dtype") or "float32")
        if dtype not in CHOICES["model.dtype"]:
            raise UserError(f"{node}.dtype=auto, but the checkpoint is in {dtype}; set {node}.dtype")
        return dtype

    def _embedded_tasks(self) -> dict[str, Any]:
        from sdd.evaluation.tiny import suite_tasks

        settings = self.config.evaluation
        for key in ("data_dir", "num_fewshot"):
            if settings[key] is not None:
                raise UserError(f"evaluation.{key} belongs to lm-eval's tasks; leave it out with evaluation=tiny")
        if settings.max_new_tokens is None:
            raise UserError("evaluation.max_new_tokens=null, but the embedded tasks set no limit; give a number")
        names = None if settings.tasks is None else list(settings.tasks)
        tasks = suite_tasks(settings.suite, names, settings.split, settings.seed, settings.limit)
        digests = {name: digest_of(dataclasses.asdict(task)) for name, task in tasks.items()}
        return {"tasks": digests, "split": settings.split, "seed": settings.seed}

    @cached_property
    def _benchmark(self) -> Any:
        from sdd.evaluation.benchmark import Benchmark

        settings = self.config.evaluation
        names = None if settings.tasks is None else list(settings.tasks)
        return Benchmark(settings.suite, names, settings.num_fewshot)

    def _stock_tasks(self) -> dict[str, Any]:
        from sdd.evaluation.suites import SUITES

        settings = self.config.evaluation
        if settings.suite not in SUITES:
            raise UserError(f"evaluation.suite={settings.suite} is unknown; choose one of tiny, {', '.join(SUITES)}")
        if settings.split is not None:
            what = f"evaluation.split={settings.split}"
            raise UserError(f"{what}, but lm-eval's tasks name their own split; set evaluation.split=null")
        data, files = self._benchmark.data(settings.data_dir, self.digest_memory)
        self.sources |= files
        self._task_files = {name: files[digest] for name, digest in data["files"].items()} if files else None
        shown = {"asked": self._benchmark.names, "num_fewshot": settings.num_fewshot}
        return {"tasks": self._benchmark.digests(), "data": data, **shown}

    # ---- what is measured besides ------------------------------------------------------------------------------

    @cached_property
    def _prompts(self) -> Any:
        """The source of the prompts: the dataset itself, or another one."""
        other = self.config.analysis.prompts
        return self._dataset if other is None else self._source(other)

    @cached_property
    def _prompts_spec(self) -> dict[str, Any]:
        if self.config.analysis.prompts is None:
            return self._dataset_spec
        self.sources |= self._prompts.sources()
        return {"_target_": self.config.analysis.prompts._target_, **self._prompts.spec()}

    @property
    def _held_out(self) -> int:
        """How many prompts: those that no student is trained on, or as many as are asked for."""
        asked = self.config.analysis.num_prompts
        return int(self.config.finetune.validation_rows if asked is None else asked)

    def _check_held_out(self, num_examples: int) -> None:
        """Refuse prompts that are not there, or not held out."""
        held_out, validation = self._held_out, self.config.finetune.validation_rows
        if held_out < 1:
            raise UserError("finetune.validation_rows=0 holds no prompt out; raise it, or set analysis.prompts")
        if held_out > num_examples:
            raise UserError(f"analysis.num_prompts={held_out}, but the dataset has {num_examples} rows; ask for fewer")
        if self.config.analysis.prompts is None and held_out > validation:
            raise UserError(
                f"analysis.num_prompts={held_out}, but finetune.validation_rows={validation} are held out; "
                "ask for fewer, or hold out more"
            )

    def answered(self, student: Recipe | None) -> Recipe:
        """The greedy answers of a student, or of the unpruned model (None), to the held-out prompts."""
        if (rows := self._prompts.known_rows()) is not None:
            self._check_held_out(rows)
        spec = {
            "dataset": self._prompts_spec,
            "held_out": self._held_out,
            "system_prompt": self.config.dataset.system_prompt,
            "dtype": self._dtype("analysis"),
            "max_new_tokens": self.config.analysis.max_new_tokens,
            "max_prompt_tokens": self.config.engine.get("max_prompt_tokens", 1024),
            **self._plain_template(self.model_digest),
        }
        labels = {"dataset": (self.config.analysis.prompts or self.config.dataset).name}
        if student is None:
            return self._recipe("answered", spec | {"model": self.model_digest}, {}, labels)
        return self._recipe("answered", spec, {"model": student}, labels)

    def surprisals(self) -> Recipe:
        """What the unpruned model makes of the targets, whoever wrote them."""
        spec = {
            "model": self.model_digest,
            "dtype": self._dtype("analysis"),
            "system_prompt": self.config.dataset.system_prompt,
            "max_length": self.config.finetune.max_length,
            **self._plain_template(self.model_digest),
        }
        return self._recipe("surprisals", spec, {"targets": self.targets()}, self._labels)

    def analysed(self) -> Recipe:
        """The artifact of the analysis that the config asks for."""
        settings, student = self.config.analysis, self.student()
        if student is None:
            raise UserError(
                f"analysis={settings.kind} compares a student with the unpruned model; add for example pruning=n2"
            )
        spec: dict[str, Any] = {"dtype": self._dtype("analysis")}
        if settings.kind == "cost":
            spec["model"] = self.model_digest
            spec |= {key: settings[key] for key in ("context", "prompt_tokens", "new_tokens", "batch_size", "repeats")}
            return self._recipe("measured", spec, {"model": student}, student.labels)
        inputs = {"model": student, "answers": self.answered(None)}
        labels = student.labels | {"prompts": inputs["answers"].labels["dataset"]}
        if settings.kind == "speculative":
            spec |= {"draft_lengths": sorted(set(settings.draft_lengths)), "temperature": settings.temperature}
            spec["repeats"] = settings.repeats
            if settings.repeats:
                spec |= {"timed_lengths": list(settings.timed_lengths), "timed_prompts": settings.timed_prompts}
            return self._recipe("drafted", spec, inputs, labels)
        inputs["responses"] = self.answered(student)
        if student.stage == "tuned":
            inputs["surprisals"] = self.surprisals()
        return self._recipe("shifted", spec | self._embedder(), inputs, labels)

    def _embedder(self) -> dict[str, str]:
        """The embedder's digest for the key; nothing where there is none, or nothing to open it with."""
        path, revision = self.config.analysis.embedder, self.config.analysis.embedder_revision
        if path is None:
            return {}
        if importlib.util.find_spec("sentence_transformers") is None:
            log.info("no embedding similarity: it needs sentence-transformers; run: pip install 'sdd[shift]'")
            return {}
        folder = embedder_folder(path, revision, fetch=not self.config.dry_run)
        if folder is None:
            return {"embedder": f"{STAND_IN}{path}@{revision}"}
        digest = embedder_digest(folder, self.digest_memory)
        self.sources[digest] = folder
        return {"embedder": digest}

    # ---- what a script asks for --------------------------------------------------------------------------------

    def wanted(self, script: str) -> Recipe | None:
        """The artifact that a script is asked for; None where that is the unpruned model itself."""
        if script == "train":
            return self.student()
        if script == "evaluate" and self.config.analysis.kind != "none":
            return self.analysed()
        asked = {"prune": self.pruned, "generate": self.targets, "evaluate": self.evaluated}
        return asked[script]()  # type: ignore[operator,no-any-return]

    def _recipe(self, stage: str, spec: dict[str, Any], inputs: dict[str, Recipe], labels: dict[str, str]) -> Recipe:
        return Recipe(stage, VERSIONS[stage], spec, inputs, dict(labels))
