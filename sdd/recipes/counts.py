"""The counts behind the estimates of a dry run, read from the composed config: sizes of model and cut, rows, tokens.

Builds and fetches nothing: what is not here yet counts as what is typical of it.
"""

from dataclasses import replace
from operator import mul

from omegaconf import DictConfig

from sdd.config.allowed import build
from sdd.evaluation.benchmark import Benchmark
from sdd.finetuning.adapters import beside_cut
from sdd.importance.channels import ChannelCriterion
from sdd.importance.states import ModelCriterion
from sdd.models import checkpoints
from sdd.models.chats import rewrite_prompt
from sdd.planning import estimates
from sdd.planning.estimates import CHARACTERS_PER_TOKEN, Estimate, Training
from sdd.planning.work import BYTES, DEVICES, Device, Shape, Work, shape_of
from sdd.pruning.width import Share
from sdd.recipes import Recipes
from sdd.store import Recipe

TYPICAL_ROWS = {
    "gsm8k": (7473, 235, 287),
    "dolly": (15011, 425, 358),
    "alpaca": (52002, 82, 273),
    "openmathinstruct": (1_800_000, 164, 417),
    "openmathinstruct2": (14_000_000, 258, 1112),
}
"""By dataset: rows, characters of a prompt, characters of a reference answer; used before the rows are here."""

OTHER_ROWS = (10_000, 300, 300)
GRADIENTS = {"sdd.channels.TaylorWidth": 1, "sdd.channels.SDM": 2}
"""Criteria measured by passes back as well, and what they cost: the second has the teacher's passes beside."""

TEMPLATE_TOKENS = 30
"""Of the chat template around a prompt."""


class Counts:
    """Sizes of the model and of its cut, rows and their lengths in tokens; and an estimate for every recipe."""

    def __init__(self, recipes: Recipes) -> None:
        self.config: DictConfig = recipes.config
        self.texts, self.num_texts, self.sources = recipes.texts, recipes.num_texts, recipes.sources
        self.sizes = recipes.sizes
        self.shape = shape_of(self.sizes)
        self.kept = self.shape.blocks - recipes.blocks_removed
        self.cut = self._narrowed(recipes)
        self.rows, self.prompt, self.answer = self._row_counts(recipes)

    @property
    def device(self) -> Device:
        return DEVICES[self.config.trainer.accelerator]

    def _narrowed(self, recipes: Recipes) -> Shape:
        """The shape after the width cut, if there is one."""
        pruning = self.config.pruning
        if pruning.ratio is None:
            return self.shape
        share = Share(pruning.ratio, pruning.ratio_of, pruning.multiple)
        channel = self.kept * self.shape.mlp_matrices * self.shape.hidden
        width = share.width(self.shape.intermediate, self.shape.parameters(self.kept), channel)
        return replace(self.shape, intermediate=width)

    def _row_counts(self, recipes: Recipes) -> tuple[int, float, float]:
        """(rows, tokens of a bare prompt, tokens of a reference answer)."""
        dataset = self.config.dataset
        if recipes.rows:
            rows = len(recipes.rows)
            prompt = sum(len(row.prompt) for row in recipes.rows) / rows
            answer = sum(len(row.reference) for row in recipes.rows) / rows
        elif dataset.parts:
            rows, parts = dataset.num_rows, list(dataset.parts.values())
            shares = [part.weight / sum(part.weight for part in parts) for part in parts]
            lengths = [TYPICAL_ROWS.get(part.name, OTHER_ROWS)[1:] for part in parts]
            prompt, answer = (sum(map(mul, shares, column)) for column in zip(*lengths, strict=True))
        else:
            available, prompt, answer = TYPICAL_ROWS.get(
                dataset.name, (dataset.num_rows or OTHER_ROWS[0], *OTHER_ROWS[1:])
            )
            rows = min(available, dataset.num_rows or available)
        return rows, prompt / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS, answer / CHARACTERS_PER_TOKEN

    @property
    def stored(self) -> str:
        """The dtype that the weights are stored in."""
        dtype = self.sizes.get("dtype") or self.sizes.get("torch_dtype")
        return dtype if dtype in BYTES else str(self.config.model.dtype)

    def _work(self, blocks: int, dtype: str) -> Work:
        return Work(self.shape, blocks, BYTES[dtype], self.device)

    def _student(self, dtype: str) -> Work:
        """Work on the pruned model, or on the unpruned one where nothing goes."""
        return Work(self.cut, self.kept, BYTES[dtype], self.device)

    def estimate(self, recipe: Recipe) -> Estimate:
        """What building this one artifact takes, its inputs being there."""
        found: Estimate = getattr(self, f"_{recipe.stage}")(recipe)
        return found

    def _scores(self, recipe: Recipe) -> Estimate:
        if "model" not in recipe.spec:
            return Estimate(1.0, 1e8, 1e5)
        kind = recipe.spec["metric"]["_target_"]
        criterion = build(recipe.spec["metric"])
        if isinstance(criterion, ChannelCriterion):
            return self._channel_scores(recipe, criterion, kind)
        if criterion.needs == "weights":
            return estimates.weights_read(self._work(self.shape.blocks, self.stored))
        work = self._work(self.shape.blocks, self.config.model.dtype)
        if criterion.needs == "rows":
            texts, length = min(self.num_texts, self.rows), self.prompt + self.answer
        else:
            texts, length = self.num_texts, self._text_tokens(recipe.spec["texts"])
        runs = criterion.runs(self.shape.blocks) if isinstance(criterion, ModelCriterion) else ()
        return estimates.scores(work, texts, length, self.config.trainer.inference_batch_size, *runs)

    def _channel_scores(self, recipe: Recipe, criterion: ChannelCriterion, kind: str) -> Estimate:
        """Channels are scored after the blocks are gone."""
        blocks = self.kept if "pruned" in recipe.inputs else self.shape.blocks
        if criterion.needs != "texts":
            return estimates.weights_read(self._work(blocks, self.stored))
        work, length = self._work(blocks, self.config.model.dtype), self._text_tokens(recipe.spec["texts"])
        texts, trainer = self.config.calibration.num_texts, self.config.trainer
        if kind in GRADIENTS:
            return estimates.gradient_scores(work, texts, length, trainer.micro_batch_tokens, GRADIENTS[kind])
        return estimates.scores(work, texts, length, trainer.inference_batch_size)

    def _text_tokens(self, digest: str) -> float:
        """Tokens of a calibration text; of the longest allowed, before the texts are here."""
        longest = self.config.calibration.max_length
        texts = self.texts.get(digest)
        if not texts:
            return float(longest)
        tokens = sum(min(len(text) / CHARACTERS_PER_TOKEN, longest) for text in texts)
        return float(tokens / len(texts))

    def _pruned(self, recipe: Recipe) -> Estimate:
        if "repair" in recipe.spec:
            calibration, batch = self.config.calibration, self.config.trainer.inference_batch_size
            whole = self._work(self.shape.blocks, self.config.model.dtype)
            length = self._text_tokens(recipe.spec["texts"])
            copied = self._work(self.kept, self.stored)
            return estimates.repaired(whole, copied, calibration.num_texts, length, batch)
        between = recipe.spec.get("ratio") is None
        return estimates.pruned(self._work(self.kept, self.stored) if between else self._student(self.stored))

    def _rewrites(self, recipe: Recipe) -> Estimate:
        engine, template = self.config.engine, self.config.dataset.template
        prompt = self.prompt + len(rewrite_prompt(template, "", "")) / CHARACTERS_PER_TOKEN + self.answer
        batch = engine.get("batch_size") or self.config.trainer.inference_batch_size
        new = min(2 * self.answer, engine.get("max_new_tokens") or 2 * self.answer)  # as long as the longest of a batch
        work = self._work(self.shape.blocks, self.config.model.dtype)
        found = estimates.rewrites(work, self.rows, prompt, new, batch)
        tries = engine.get("tries") or 1
        return Estimate(found.seconds * tries, found.memory, found.disk)

    def _targets(self, recipe: Recipe) -> Estimate:
        return estimates.targets(self.rows, self.prompt + 2 * self.answer)

    def _tuned(self, recipe: Recipe) -> Estimate:
        finetune = self.config.finetune
        left = max(1, self.rows - finetune.validation_rows)
        rows = finetune.epochs * min(finetune.num_rows or left, left)
        length = min(self.prompt + self.answer, finetune.max_length)
        work = self._student({"32": "float32", "bf16": "bfloat16"}[finetune.precision])
        micro = self.config.trainer.micro_batch_tokens
        teacher = self._teacher(recipe)
        return estimates.tuned(work, self.training, rows, length, finetune.batch_size, micro, teacher)

    def _teacher(self, recipe: Recipe) -> Work | None:
        """Work on the teacher beside a student; one that is not here yet counts as the model itself."""
        settings = recipe.spec.get("distillation")
        if settings is None:
            return None
        folder = self.sources.get(settings["teacher"])
        shape = self.shape if folder is None else shape_of(checkpoints.read_config(folder))
        return Work(shape, shape.blocks, BYTES[settings["dtype"]], self.device)

    @property
    def training(self) -> Training:
        """What the adapter trains of the student."""
        adapter, recomputed = self.config.adapter, self.config.trainer.gradient_checkpointing
        if adapter.method == "full":
            return Training(self.cut.parameters(self.kept), whole=True, recomputed=recomputed)
        if adapter.method == "head_and_norms":
            return Training(estimates.head_and_norms_parameters(self.cut, self.kept), recomputed=recomputed)
        blocks, reach = self._adapted_blocks()
        trained = estimates.adapter_parameters(self.cut, blocks, adapter.rank, list(adapter.targets))
        return Training(trained, reach, four_bit=adapter.quantisation is not None, recomputed=recomputed)

    def _adapted_blocks(self) -> tuple[int, int]:
        """(blocks with LoRA, blocks from the last down to the first of them).

        Where the cut is not known before it is made, it counts as one gap above the first blocks: the most that it
        can take.
        """
        adapter, pruning = self.config.adapter, self.config.pruning
        if adapter.scope == "all":
            return self.kept, self.kept
        if adapter.scope == "last":
            return adapter.blocks, adapter.blocks
        removed = pruning.blocks
        if removed is None and pruning.start is not None:
            removed = range(pruning.start, pruning.start + pruning.size)
        if removed is None:
            return min(2 * adapter.blocks, self.kept), self.kept
        kept = [block for block in range(self.shape.blocks) if block not in removed]
        places = beside_cut(kept, list(removed), adapter.blocks)
        return len(places), self.kept - places[0]

    def _merged(self, recipe: Recipe) -> Estimate:
        work = self._work(self.kept, self.stored)
        return estimates.merged(work, len(recipe.inputs), self.config.adapter.method == "full")

    def _evaluated(self, recipe: Recipe) -> Estimate:
        settings = self.config.evaluation
        student = recipe.inputs.get("model")
        dtype = recipe.spec["dtype"]
        work = self._student(dtype) if student else self._work(self.shape.blocks, dtype)
        if settings.suite == "tiny":
            tasks = [estimates.EMBEDDED_TASK] * len(recipe.spec["tasks"])
        else:
            names = None if settings.tasks is None else list(settings.tasks)
            tasks = estimates.tasks_of(Benchmark(settings.suite, names, settings.num_fewshot).sizes())
        return estimates.evaluated(work, tasks, settings.limit, settings.batch_size, settings.max_new_tokens)

    def _answered(self, recipe: Recipe) -> Estimate:
        work = self._work(self.kept if recipe.inputs else self.shape.blocks, recipe.spec["dtype"])
        new, batch = recipe.spec["max_new_tokens"], self.config.trainer.inference_batch_size
        return estimates.rewrites(work, recipe.spec["held_out"], self.prompt, new, batch)

    def _surprisals(self, recipe: Recipe) -> Estimate:
        return self._shown(recipe, 2 * self.rows, self.prompt + self.answer)

    def _drafted(self, recipe: Recipe) -> Estimate:
        settings, answered = self.config.analysis, recipe.inputs["answers"].spec
        shown = self._shown(recipe, 3 * answered["held_out"], self.prompt + answered["max_new_tokens"])
        work = self._work(self.shape.blocks, recipe.spec["dtype"])
        rounds = settings.repeats * settings.timed_prompts * 2 * (1 + len(settings.timed_lengths))
        seconds, _ = work.generation(rounds, self.prompt, settings.max_new_tokens, 1) if rounds else (0.0, 0.0)
        return Estimate(shown.seconds + seconds, 2 * shown.memory, shown.disk)

    def _shifted(self, recipe: Recipe) -> Estimate:
        answered = recipe.inputs["answers"].spec
        shown = self._shown(recipe, 2 * answered["held_out"], self.prompt + answered["max_new_tokens"])
        return Estimate(shown.seconds, 2 * shown.memory, shown.disk)

    def _measured(self, recipe: Recipe) -> Estimate:
        settings, work = self.config.analysis, self._work(self.shape.blocks, recipe.spec["dtype"])
        sizes = settings.prompt_tokens, settings.new_tokens
        spent = [work.generation(batch, *sizes, batch) for batch in (1, settings.batch_size)]
        seconds = 2 * (settings.repeats + 1) * sum(each for each, _ in spent)
        return Estimate(2 * work.opening + seconds, 2 * work.weights + 2 * max(held for _, held in spent), 1e4)

    def _shown(self, recipe: Recipe, rows: int, length: float) -> Estimate:
        """Passes of the unpruned model over given answers, without gradients."""
        work, batch = self._work(self.shape.blocks, recipe.spec["dtype"]), self.config.trainer.inference_batch_size
        held = work.weights + work.activations(batch * length) + work.logits(512)
        return Estimate(work.opening + work.passes(rows * length, length, -(-rows // batch)), held, 100.0 * rows)
