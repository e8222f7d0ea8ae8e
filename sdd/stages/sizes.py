"""The counts behind the estimates of a dry run, read from the composed config: sizes of model and cut, rows, tokens.

Builds and fetches nothing: what is not here yet counts as what is typical of it.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from math import inf
from operator import mul
from statistics import fmean
from typing import Any, Self

from omegaconf import OmegaConf

from sdd.architectures.configs import stated_dtype
from sdd.config import Groups
from sdd.models.chats import task_text
from sdd.models.checkpoints import Checkpoint
from sdd.models.lengths import END, Lengths, lengths_of
from sdd.models.rendering import RefusalError
from sdd.planning import estimates
from sdd.planning.cost_model import BYTES, DEVICES, CostModel, Device, Shape, shape_of
from sdd.planning.estimates import CHARACTERS_PER_TOKEN, Estimate
from sdd.planning.price import sample
from sdd.pruning.width import Share
from sdd.study import Study

TYPICAL_ROWS = {
    "gsm8k": (7473, 235, 287),
    "dolly": (15011, 425, 358),
    "alpaca": (52002, 82, 273),
    "openmathinstruct": (1_800_000, 164, 417),
    "openmathinstruct2": (14_000_000, 258, 1112),
}
"""By dataset: rows, characters of a prompt, characters of a reference answer; used before the rows are here."""

OTHER_ROWS = (10_000, 300, 300)
TEMPLATE_TOKENS = 30
"""Of the chat template around a prompt, before the tokenizer is here."""


def _lengths_of(checkpoint: Checkpoint) -> Lengths | None:
    return lengths_of(checkpoint.folder, checkpoint.config["vocab_size"])


class Sizes:
    """Sizes of the model and of its cut, rows and their lengths in tokens; of `start` blocks `kept` are left.

    `prompt`: tokens of a task in its chat, `answer` of a reference, `written` of an answer in the teacher's own words:
    as long as the dataset's gold ones, or where it has none, as the references. Where rows and tokenizer are here they
    are counted on a sample. `longest`: of the longest row with its reference, infinite before the rows are here.
    """

    def __init__(self, study: Study) -> None:
        self.config, self.live = Groups(study.config), study.config
        self.texts, self.num_texts, self.sources = study.texts, study.calibration.num_texts, study.sources
        self.sizes = study.models.sizes
        self.shape = shape_of(self.sizes)
        self.start, self.kept = study.num_blocks, study.blocks_left
        self.cut = self._narrowed()
        self.lengths = study.models.known(lambda: _lengths_of(study.models.checkpoint), None)
        self.rows, self.prompt, self.answer, self.written = self._row_counts(study)
        texts = (task_text(row.prompt, row.before) + row.reference for row in study.rows.examples or ())
        self.longest = self._around() + self.tokens(longest) if (longest := max(texts, key=len, default="")) else inf
        self.put: Mapping[str, Any] = {}

    def tokens(self, text: str) -> float:
        """Tokens of a text; counted where the tokenizer is here."""
        return len(text) / CHARACTERS_PER_TOKEN if self.lengths is None else self.lengths.of(text)

    def _around(self) -> float:
        """Tokens that the chat template puts around a task."""
        try:
            system_prompt = self.config.dataset.system_prompt
            return TEMPLATE_TOKENS if self.lengths is None else self.lengths.around(system_prompt)
        except RefusalError:
            return TEMPLATE_TOKENS

    def setting(self, key: str) -> Any:
        """What the config says now, or what was put in its place; for those that a job may change (`fitting`)."""
        return self.put[key] if key in self.put else OmegaConf.select(self.live, key)

    def given(self, settings: Mapping[str, Any]) -> Self:
        """The same work with other settings, by their keys."""
        other = copy(self)
        other.put = settings
        return other

    @property
    def device(self) -> Device:
        return DEVICES[self.config.trainer.accelerator]

    def _narrowed(self) -> Shape:
        """The shape after the width cut, if there is one."""
        pruning = self.config.pruning
        if pruning.ratio is None:
            return self.shape
        share = Share(pruning.ratio, pruning.ratio_of, pruning.multiple)
        channel = self.kept * self.shape.mlp_matrices * self.shape.hidden
        width = share.width(self.shape.intermediate, self.shape.parameters(self.kept), channel)
        return replace(self.shape, intermediate=width)

    def _row_counts(self, study: Study) -> tuple[int, float, float, float]:
        """(rows, tokens of a prompt, of a reference answer, and of one in the teacher's own words)."""
        dataset = self.config.dataset
        if examples := study.rows.examples:
            some = [examples[place] for place in sample(len(examples))]
            prompt = fmean(self.tokens(task_text(row.prompt, row.before)) for row in some)
            answer = fmean(self.tokens(row.reference) for row in some)
            written = fmean(self.tokens(row.reference if row.gold is None else row.gold) for row in some)
            return len(examples), self._around() + prompt, answer + END, written + END
        if dataset.parts:
            rows, parts = dataset.num_rows, list(dataset.parts.values())
            shares = [part.weight / sum(part.weight for part in parts) for part in parts]
            lengths = [TYPICAL_ROWS.get(part.name, OTHER_ROWS)[1:] for part in parts]
            prompt, answer = (sum(map(mul, shares, column)) for column in zip(*lengths, strict=True))
        else:
            available, prompt, answer = TYPICAL_ROWS.get(
                dataset.name, (dataset.num_rows or OTHER_ROWS[0], *OTHER_ROWS[1:])
            )
            rows = min(available, dataset.num_rows or available)
        prompt, answer = prompt / CHARACTERS_PER_TOKEN, answer / CHARACTERS_PER_TOKEN
        return rows, prompt + TEMPLATE_TOKENS, answer, answer

    @property
    def stored(self) -> str:
        """The dtype that the weights are stored in."""
        dtype = stated_dtype(self.sizes)
        return dtype if dtype in BYTES else str(self.config.model.dtype)

    def shape_of(self, digest: str) -> Shape:
        """That of a teacher; one that is not here yet counts as the model itself."""
        folder = self.sources.get(digest)
        return self.shape if folder is None else shape_of(Checkpoint(folder).config)

    def cost_model(self, blocks: int, dtype: str) -> CostModel:
        return CostModel(self.shape, blocks, BYTES[dtype], self.device)

    def student(self, dtype: str) -> CostModel:
        """Work on the pruned model, or on the unpruned one where nothing goes."""
        return CostModel(self.cut, self.kept, BYTES[dtype], self.device)

    def text_tokens(self, digest: str) -> float:
        """Tokens of a calibration text; of the longest allowed, before the texts are here."""
        longest = self.config.calibration.max_length
        texts = self.texts.get(digest)
        if not texts:
            return float(longest)
        some = sample(len(texts))
        return fmean(min(self.tokens(texts[place]), longest) for place in some)

    def shown(self, dtype: str, rows: int, length: float, student: CostModel | None = None) -> Estimate:
        """Passes of the unpruned model, or of a student, over given answers, without gradients."""
        cost_model = student or self.cost_model(self.shape.blocks, dtype)
        return estimates.given(cost_model, rows, length, self.setting("trainer.inference_batch_size"))
