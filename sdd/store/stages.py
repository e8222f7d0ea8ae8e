"""The stages: names, versions, and what the store, the report and the command line have to know of each.

What a stage is - its key, how it is built, what that takes - is in `sdd/stages/<name>.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """`version` is raised when the way a stage computes changes its content; `script` asks for it.

    `resumable`: building goes on from what a killed one left. `is_result`: asked for in itself, other artifacts are
    kept for it. `is_model`: holds a student that can be evaluated, merged or exported. `analysis`: what a config
    calls it that asks for it in place of an evaluation.
    """

    name: str
    script: str
    version: int = 1
    resumable: bool = False
    is_result: bool = False
    is_model: bool = False
    analysis: str | None = None


STAGES = {
    stage.name: stage
    for stage in (
        Stage("scores", "prune", resumable=True),
        Stage("pruned", "prune", is_model=True),
        Stage("rewrites", "generate", resumable=True),
        Stage("targets", "generate", resumable=True),
        Stage("surprisals", "evaluate", resumable=True),
        Stage("damaged", "train", resumable=True),
        Stage("taught", "train", resumable=True),
        Stage("tuned", "train", resumable=True, is_model=True),
        Stage("merged", "train", is_model=True),
        Stage("evaluated", "evaluate", resumable=True, is_result=True),
        Stage("answered", "evaluate", resumable=True),
        Stage("drafted", "evaluate", is_result=True, analysis="speculative"),
        Stage("shifted", "evaluate", is_result=True, analysis="shift"),
        Stage("measured", "evaluate", is_result=True, analysis="cost"),
    )
}
"""In the order of the pipeline."""
ANALYSES = {stage.analysis: name for name, stage in STAGES.items() if stage.analysis}
"""By what a config calls it, the stage of an analysis."""
