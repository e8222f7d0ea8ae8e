"""Puts the arms of a study side by side: a table, paired contrasts and plots, from evaluated artifacts on disk.

    python -m sdd.report FOLDER [FOLDER ...] --out DIR

Reads artifacts and writes a report; builds nothing, and knows nothing of torch or Hydra, nor of models, except that a
tokenizer counts the tokens of answers. The work is in
`library` and `collect` (artifacts to runs), `arms` and `pairing` (runs to arms, and which of them are contrasted),
`intervals` (the statistics), `measures` and `contrasts` (arms to numbers), `health` and `examined` (what averages
hide), `analyses` (what was measured besides), `findings`, `next_steps`, `tables`, `latex`, `plots` and `page` (numbers
to sentences and files). Imports are deferred, so that `--help` answers at once.
"""

from collections.abc import Sequence
from pathlib import Path


def write_report(folders: list[Path], artifacts: Path, out: Path, baselines: Sequence[str] = ()) -> Path | None:
    """Write the report of the evaluated ones among the artifact folders into `out`; None if there are none.

    Each artifact is read together with the root that holds it (`<root>/<stage>/<address>`), in which analyses of its
    students are found too; `artifacts` is one more root to look for the unpruned model's scores and for inputs.
    `baselines` (`metric=magnitude`) ask for contrasts besides those that are always made.
    `out/table.md` is what a person wants to see printed.
    """
    from sdd.report.analyses import analyse, write_analyses
    from sdd.report.arms import build_arms
    from sdd.report.collect import collect
    from sdd.report.contrasts import compare
    from sdd.report.findings import findings
    from sdd.report.health_table import write_health
    from sdd.report.latex import write_latex
    from sdd.report.library import Library
    from sdd.report.next_steps import next_steps
    from sdd.report.page import write_page
    from sdd.report.plots import write_plots
    from sdd.report.tables import write_tables

    evaluated = [path for path in folders if path.parent.name == "evaluated"]
    if not evaluated:
        return None
    library = Library([*(path.parent.parent for path in folders), artifacts])
    runs, notes = collect(evaluated, library)
    if not runs:
        return None
    study = compare(build_arms(runs), notes, baselines)
    out.mkdir(parents=True, exist_ok=True)
    write_tables(study, findings(study), next_steps(study), out)
    write_health(study, out)
    write_latex(study, out)
    analyses = analyse(study, library)
    write_analyses(analyses, out)
    write_plots(study, out)
    write_page(study, library, analyses, out)
    return out


__all__ = ["write_report"]
