"""What recovering a student took, in FLOPs, by the formulas of `sdd.planning.price` and the counts that artifacts hold.

A student pays for its training, for the unpruned model's passes beside it, for what it wrote itself, and for its own
rows' share of what others use too: rewrites, how likely they are where that decides, drafts, kept logits. Where damage
tells which rows count, it pays for all rows, since all of them are looked at. References are free; so are tries of a
rewrite that were not kept, which nobody recorded.

Lengths of prompts and of texts are means over a sample of rows, in the tokens of the student's own tokenizer.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from sdd.data.mixture import part_of
from sdd.errors import UserError
from sdd.models.chats import answer_ids, chat_prompt_ids, rewrite_prompt
from sdd.models.checkpoints import Checkpoint
from sdd.models.lengths import lengths_of
from sdd.planning.cost_model import Shape, shape_of
from sdd.planning.estimates import adapter_parameters
from sdd.planning.price import Price, Recovery, Rewritten, Trained, beside, sample
from sdd.report.library import Artifact, Library
from sdd.store.files import AGAIN, check_file, shown_json, shown_rows
from sdd.untrusted import ANY, check_shape, read_text

TUNED: dict[str, Any] = {
    "adapter": {"method?": str, "rank?": int, "targets?": [str], "scope?": str, "blocks?": int},
    "finetune": {"epochs": int},
    "distillation?": ({"teacher?": str, "loss?": {str: float}, "rollouts?": ANY}, None),
    "system_prompt": (str, None),
}
REWRITES: dict[str, Any] = {"teacher": str, "template": (str, {str: str}), "system_prompt": (str, None)}
ROWS = {"trained": int, "target_tokens": int, "ids": [(str, int)]}
CUT = {"kept_blocks": [int], "removed_blocks": ([int], None), "parameters_before": int, "ratio?": (float, None)}
TURNS: dict[str, Any] = {"prompt": str, "before?": [{str: str}]}
TARGET = TURNS | {"rejected?": (str, None)}
REWRITE = TURNS | {"id": (str, int), "reference": str, "rewrite": str, "others?": [{"rewrite": str}]}
ANSWER = {"id": (str, int), "text": str, "tokens": [int]}


Counters = tuple[Callable[..., int], Callable[[str], int]]
"""Tokens of a prompt in its chat (prompt, system prompt, turns before), and of an answer with what ends it."""


class UnknownError(LookupError):
    """Something that the price depends on is not recorded, or not here."""


class Prices:
    """Prices of a library's students; what many of them share is counted once."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.counters: dict[str, Counters] = {}
        self.prompts: dict[str, tuple[float, float, float]] = {}
        self.rewritten: dict[str, Rewritten] = {}

    def of(self, evaluated: Artifact) -> Price | None:
        """Of all recoveries on the way to what was evaluated; None where there is none, or one is not known."""
        tuned = [artifact for artifact in self.library.upstream(evaluated) if artifact.stage == "tuned"]
        paid: set[tuple[str, Any]] = set()
        try:
            return sum((_Recovery(one, self).price(paid) for one in tuned), Price()) if tuned else None
        except (UnknownError, UserError, OSError):
            return None


class _Recovery:
    """One tuned artifact and what it was made from."""

    def __init__(self, tuned: Artifact, prices: Prices) -> None:
        check_shape(tuned.spec, TUNED, f"{tuned.path}")
        self.tuned, self.spec, self.prices = tuned, tuned.spec, prices
        pruned, self.targets = self._input(tuned, "pruned"), self._input(tuned, "targets")
        self.rows = shown_json(tuned.path / "rows.json", ROWS)
        self.all_rows = shown_json(self.targets.path / "summary.json", {"rows": int})["rows"]
        checkpoint = Checkpoint(pruned.path)
        self.model, self.shape = pruned.spec.get("model"), shape_of(checkpoint.config)
        self.whole = _unpruned(self.shape, shown_json(pruned.path / "pruning.json", CUT))
        if pruned.address not in prices.counters:
            prices.counters[pruned.address] = _counters(checkpoint)
        self.asked, self.answered = prices.counters[pruned.address]
        if self.targets.address not in prices.prompts:
            prices.prompts[self.targets.address] = self._lengths()
        self.prompt, self.refused, self.rejected = prices.prompts[self.targets.address]

    def price(self, paid: set[tuple[str, Any]]) -> Price:
        """Nothing for what is `paid`: shared artifacts, each with the id of a row; what comes new is added there."""
        epochs, (own, own_tokens) = self.spec["finetune"]["epochs"], self._written()
        recovery = Recovery(
            self.shape,
            self.whole,
            self.whole,
            self._trained(),
            rows=epochs * self.rows["trained"],
            prompt=self.prompt,
            target=self.rows["target_tokens"] / max(1, self.rows["trained"]),
            own=own,
            own_tokens=own_tokens,
            refused=self.refused,
            rejected=self.rejected,
            beside=self._beside(),
            damaged=self.all_rows if "damaged" in self.tuned.inputs else 0,
        )
        return self._with_shared(recovery, paid).price()

    def _input(self, artifact: Artifact, name: str) -> Artifact:
        found = self.prices.library.get(artifact.inputs.get(name, ""))
        if found is None:
            raise UnknownError(f"{artifact.address} lacks its {name}")
        return found

    def _check_teacher(self, digest: Any) -> None:
        """The unpruned model's shape is known, that of another teacher is not."""
        if digest != self.model:
            raise UnknownError("another teacher")

    def _lengths(self) -> tuple[float, float, float]:
        """Tokens on average of a prompt, the share of rows with a rejected answer, and the tokens of one."""
        rows = _drawn(self.targets.path / "train.jsonl", self.all_rows, TARGET)
        system_prompt = self.spec["system_prompt"]
        prompts = [self.asked(row["prompt"], system_prompt, row.get("before", ())) for row in rows]
        rejected = [self.answered(row["rejected"]) for row in rows if row.get("rejected")]
        return fmean(prompts), len(rejected) / len(rows), fmean(rejected or [0])

    # ---- training, and what runs beside it

    def _trained(self) -> Trained:
        adapter = self.spec["adapter"]
        if "method" in adapter:
            return Trained(adapter["method"])
        scope = adapter.get("scope", "all")
        if scope == "beside_cut":
            raise UnknownError("which blocks are beside the cut")
        reach = adapter["blocks"] if scope == "last" else self.shape.blocks
        weights = adapter_parameters(self.shape, reach, adapter["rank"], adapter["targets"])
        return Trained(weights=weights, reach=reach)

    def _beside(self) -> Literal["logits", "states"] | None:
        """What the teacher makes beside the student."""
        distillation = self.spec.get("distillation") or {}
        if "teacher" not in distillation:
            return None
        self._check_teacher(distillation["teacher"])
        return beside(distillation.get("loss", {"forward_kl": 1.0}))

    def _written(self) -> tuple[float, float]:
        """How many answers the student wrote, and their tokens on average."""
        if not (self.spec.get("distillation") or {}).get("rollouts"):
            return 0.0, 0.0
        steps = list(_history(self.tuned.path / "history.csv"))
        rows = sum(count for count, _ in steps)
        return rows, sum(count * tokens for count, tokens in steps) / max(1.0, rows)

    # ---- what others use too

    def _used(self, shared: Artifact, paid: set[tuple[str, Any]]) -> int:
        """The rows of this recovery that nobody has paid for yet."""
        own = {(shared.address, id) for id in self.rows["ids"]}
        used = self.all_rows if "damaged" in self.tuned.inputs else len(own - paid)
        paid |= own
        return used

    def _with_shared(self, recovery: Recovery, paid: set[tuple[str, Any]]) -> Recovery:
        if "taught" in self.tuned.inputs:
            taught = self._input(self.tuned, "taught")
            self._check_teacher(taught.spec.get("model"))
            recovery = replace(recovery, taught=self._used(taught, paid))
        if "rewrites" not in self.targets.inputs:
            return recovery
        made = self._input(self.targets, "rewrites")
        if made.address not in self.prices.rewritten:
            self.prices.rewritten[made.address] = self._rewritten(made)
        self._check_teacher(made.spec["teacher"])
        recovery = replace(recovery, weighed=self.targets.spec.get("choice") == "most_likely")
        return replace(recovery, used=self._used(made, paid), rewritten=self.prices.rewritten[made.address])

    def _rewritten(self, made: Artifact) -> Rewritten:
        check_shape(made.spec, REWRITES, f"{made.path}")
        system_prompt, template = made.spec["system_prompt"], made.spec["template"]
        drafts: dict[Any, dict[str, Any]] = {}
        if "answers" in made.inputs:
            path = self._input(made, "answers").path / "answers.jsonl"
            drafts = {row["id"]: row for row in _drawn(path, self.all_rows, ANSWER)}
        asked: list[int] = []
        new: list[int] = []
        rows = _drawn(made.path / "rewrites.jsonl", self.all_rows, REWRITE)
        for row in rows:
            words = template if isinstance(template, str) else template.get(part_of(str(row["id"])), "")
            shown = drafts[row["id"]]["text"] if row["id"] in drafts else row["reference"]
            prompt = rewrite_prompt(words, row["prompt"], shown)
            length = self.asked(prompt, system_prompt, row.get("before", ()))
            tries = [row["rewrite"], *(other["rewrite"] for other in row.get("others", ()))]
            asked += [length] * len(tries)
            new += map(self.answered, tries)
        drafted = fmean(len(draft["tokens"]) for draft in drafts.values()) if drafts else 0.0
        return Rewritten(len(new) / len(rows), fmean(asked), fmean(new), drafted)


def _counters(checkpoint: Checkpoint) -> Counters:
    """By the tokenizer's own file; by opening the tokenizer, which takes seconds, only where it has none."""
    if lengths := lengths_of(checkpoint.folder, checkpoint.config["vocab_size"]):
        return lengths.asked, lengths.answered
    tokenizer = checkpoint.tokenizer()
    return (lambda *words: len(chat_prompt_ids(tokenizer, *words))), (lambda text: len(answer_ids(tokenizer, text)))


def _unpruned(student: Shape, cut: dict[str, Any]) -> Shape:
    """The shape before the cut: all its blocks, and where channels went, MLPs as wide as its parameters say."""
    whole = replace(student, blocks=len(cut["kept_blocks"]) + len(cut["removed_blocks"] or []))
    if cut.get("ratio"):
        channel = whole.blocks * whole.mlp_matrices * whole.hidden * whole.experts
        missing = cut["parameters_before"] - whole.parameters()
        whole = replace(whole, intermediate=whole.intermediate + round(missing / channel))
    return whole


def _drawn(path: Path, rows: int, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """A sample of the rows of a file that has so many; the same each time, and of files of as many rows."""
    places = set(sample(rows))
    chosen = [row for place, row in enumerate(shown_rows(path, path.parent)) if place in places]
    for row in chosen:
        check_shape(row, shape, f"{path} has a broken row; {AGAIN}: row")
    if not chosen:
        raise UnknownError(f"{path} is empty")
    return chosen


def _history(path: Path) -> Iterator[tuple[float, float]]:
    """(answers that the student wrote, their tokens on average) of every step."""
    check_file(path, path.parent)
    try:
        for row in csv.DictReader(read_text(path, f"{path}").splitlines()):
            yield float(row["rollouts"]), float(row["rollout_tokens"] or 0)
    except (KeyError, TypeError, ValueError, csv.Error):
        raise UserError(f"{path} has a broken row; {AGAIN}") from None
