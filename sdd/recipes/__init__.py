"""The map of the house: a composed config becomes a graph of recipes.

teacher -> scores -> pruned; dataset -> rewrites -> targets; pruned + targets -> tuned; tuned ones -> merged; any of
them -> evaluated, or analysed: answered (by teacher and student) -> drafted, shifted; targets -> surprisals -> shifted;
measured. What is in a key and what is not is decided here and nowhere else. Knows nothing of how anything is computed;
reads only configs, digests and row counts.

Each file here holds a class that adds its stages to the class of the one before it: `models`, `data`, `scores`, `cuts`,
`students`, `evaluations`, `analyses`; the last is `Recipes`, below. `self._...` that a file does not define is in an
earlier one.
"""

from collections.abc import Iterable

from sdd.recipes.analyses import Analyses
from sdd.recipes.models import is_provisional
from sdd.store import Recipe

__all__ = ["Recipes", "is_provisional"]


class Recipes(Analyses):
    """The recipes that one config stands for; `students` are those of the students to merge."""

    def wanted(self, script: str) -> Recipe | None:
        """The artifact that a script is asked for; None where that is the unpruned model itself."""
        if script == "train":
            return self.student()
        if script == "evaluate" and self.config.analysis.kind != "none":
            return self.analysed()
        asked = {"prune": self.pruned, "generate": self.targets, "evaluate": self.evaluated}
        return asked[script]()  # type: ignore[operator,no-any-return]

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
            self._check_stock_rows()
