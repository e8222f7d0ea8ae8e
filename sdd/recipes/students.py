"""The student: an adapter tuned on the targets at the cut, or several such students merged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from omegaconf import DictConfig

from sdd.config import MERGE_SETTINGS, plain
from sdd.data import Example
from sdd.errors import UserError
from sdd.models import checkpoints
from sdd.pruning.depth import matrices, tensor_names
from sdd.recipes.cuts import Cuts
from sdd.store import Recipe


def _floats(value: Any) -> Any:
    """The value with integers as floats, containers included, so that 1 and 1.0 are one setting."""
    if isinstance(value, dict):
        return {str(key): _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int) else value


class Students(Cuts):
    """pruned + targets -> tuned; tuned ones -> merged. `students` are the recipes of those to merge."""

    def __init__(self, config: DictConfig, digest_memory: Path, students: Sequence[Self] = ()) -> None:
        super().__init__(config, digest_memory)
        self.students = list(students)

    def tuned(self) -> Recipe:
        finetune = self.config.finetune
        if (rows := self._dataset.known_rows()) is not None:
            self._check_rows(rows)
        self._check_adapter()
        settings = plain(finetune)
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
        from sdd.models.chats import training_ids

        finetune, system_prompt = self.config.finetune, self.config.dataset.system_prompt
        tokenizer = checkpoints.load_tokenizer(self.model_folder)
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
        sizes = [checkpoints.read_config(folder)["vocab_size"] for folder in (teacher, model)]
        same = sizes[0] == sizes[1]
        if not same or checkpoints.load_tokenizer(teacher).get_vocab() != checkpoints.load_tokenizer(model).get_vocab():
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
        merge = plain(self.config.merge)
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

    def _of_student(self, number: int, student: Self) -> Recipe:
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
