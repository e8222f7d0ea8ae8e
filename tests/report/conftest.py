"""A study on disk with scores of known odds: manifests, results, samples and training curves, no model involved."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TASKS = ("add", "sort", "lookup", "add_choice")
TRAINED = {"add": 300, "lookup": 200}
MACHINE = {"device": "a processor", "threads": 2, "dtype": "float32", "torch": "2.13"}
EDGES = [-1.0, 0.0, 0.5, 1.0]


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "repeats": 3}


class Artifacts:
    """Writes artifacts under one root; addresses are hashes of the recipe, as in the store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tasks: tuple[str, ...] = TASKS

    def put(self, stage: str, spec: dict[str, Any], inputs: dict[str, str], **files: Any) -> str:
        labels = files.pop("labels", {})
        address = hashlib.sha256(json.dumps([stage, spec, inputs], sort_keys=True).encode()).hexdigest()[:20]
        folder = self.root / stage / address
        for name, content in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {"stage": stage, "address": address, "version": 1, "spec": spec, "inputs": inputs, "labels": labels}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return address

    def pruned(self, size: int = 4, metric: str | None = "angular", blocks: list[int] | None = None) -> str:
        removed = blocks or list(range(2, 2 + size))
        info = {"kind": "blocks", "metric": metric, "size": len(removed), "start": removed[0], "score": 0.1}
        info |= {"removed_blocks": removed, "kept_blocks": [block for block in range(12) if block not in removed]}
        info |= {"parameters_before": 1200, "parameters_after": 1200 - 80 * len(removed)}
        info |= {"flops_saved": 80 * len(removed) / 1200}
        inputs = {}
        spec: dict[str, Any] = {"model": "m" * 20, "blocks": removed}
        if metric:
            scores = {"metric": metric, "model": "m" * 20, "texts": "c0ffee" * 4}
            spans = {str(n): [0.1 * n + 0.01 * abs(first - 2) for first in range(13 - n)] for n in range(1, 12)}
            content = {"metric": metric, "num_blocks": 12, "num_texts": 8, "distance": spans}
            inputs = {"scores": self.put("scores", scores, {}, **{"scores.json": content})}
            spec = {"model": "m" * 20, "size": size}
        return self.put("pruned", spec, inputs, **{"pruning.json": info})

    def pruned_one_by_one(self) -> str:
        """Two of four blocks, each chosen by scores of what was left."""
        steps = [{"removed": 3, "scores": [0.2, 0.3, 0.4, 0.1]}, {"removed": 1, "scores": [0.5, 0.2, 0.3, None]}]
        content = {"metric": "greedy", "num_blocks": 4, "num_texts": 8, "order": [3, 1], "steps": steps}
        content["distance"] = {"1": [0.2, 0.3, 0.4, 0.1]}
        scores = self.put("scores", {"metric": "greedy"}, {}, **{"scores.json": content})
        facts = {"kind": "depth", "metric": "greedy", "removed_blocks": [1, 3], "flops_saved": 0.2}
        facts |= {"parameters_before": 1200, "parameters_after": 900}
        return self.put("pruned", {"model": "m" * 20, "size": 2}, {"scores": scores}, **{"pruning.json": facts})

    def targets(self, mode: str, dataset: str = "tiny_math", num_rows: int = 500) -> str:
        data = {"dataset": hashlib.sha256(dataset.encode()).hexdigest(), "num_rows": num_rows}
        summary = {"rows": num_rows, "reasons": {"ok": num_rows}, "groups": TRAINED}
        spec, inputs = {"mode": mode, **data}, {}
        rows: list[dict[str, Any]] = [
            {"id": f"row-{n}", "prompt": f"row {n}?", "reference": f"{n}.", "target": f"{n}."} for n in range(40)
        ]
        rows = [{**row, "source": "reference", "reason": mode} for row in rows]
        if mode == "self_distill":
            written = as_lines([{**row, "rewrite": f"rewritten {row['id']}"} for row in rows])
            rewrites = {"teacher": "m" * 20, **data, "temperature": 0.0}
            inputs = {"rewrites": self.put("rewrites", rewrites, {}, **{"rewrites.jsonl": written})}
            for number, row in enumerate(rows):
                leaked = {"source": "reference", "reason": "leak", "target": row["reference"]}
                kept = {"source": "rewrite", "reason": "ok", "target": f"rewritten {row['id']}"}
                row |= kept if number % 4 else leaked
            summary["reasons"] = {"ok": num_rows - num_rows // 4, "leak": num_rows // 4}
            spec = {"mode": mode, "rule": "final", "selection": True}
        files = {"summary.json": summary, "train.jsonl": as_lines(rows)}
        return self.put("targets", spec, inputs, labels={"dataset": dataset}, **files)

    def tuned(self, pruned: str | None, targets: str, seed: int, rate: float = 3e-4, rank: int = 8, **more: Any) -> str:
        spec = {"adapter": {"rank": rank, "alpha": 16}, "precision": "32", "seed": seed, **more}
        spec["finetune"] = {"learning_rate": rate, "epochs": 2, "batch_size": 16}
        inputs = {"targets": targets} | ({"pruned": pruned} if pruned else {})
        if not pruned:
            spec["model"] = "m" * 20
        rng = np.random.default_rng([seed, int(targets[:6], 16), int((pruned or "0")[:6], 16)])
        floor = 1.0 + rng.uniform(0, 0.4)
        lines = ["step,epoch,loss,learning_rate,validation_loss"]
        for step in range(1, 61):
            validation = f"{floor + 1.5 * np.exp(-step / 20) + rng.normal(0, 0.03):.4f}" if step % 10 == 0 else ""
            lines.append(f"{step},{step // 30},{1.1 + 2 * np.exp(-step / 15):.4f},{rate},{validation}")
        return self.put("tuned", spec, inputs, **{"history.csv": "\n".join(lines) + "\n"})

    def evaluated(
        self,
        model: str | None,
        scores: dict[str, Any],
        split: str = "test",
        nll: float | None = 1.5,
        free: bool = True,
        said: str = "It is",
    ) -> Path:
        """`scores`: 0/1 values per task, in the order of the items; `said` opens every response."""
        spec: dict[str, Any] = {"tasks": {task: f"{task}-{split}" for task in scores}, "split": split}
        if model is None:
            spec["model"] = "m" * 20
        results: dict[str, Any] = {"model": {}, "tasks": {}}
        files = {}
        for task, values in scores.items():
            value = float(np.mean(values))
            results["tasks"][task] = {"metric": "exact_match", "value": value, "stderr": 0.01, "n": len(values)}
            if free and not task.endswith("_choice"):
                results["tasks"][task] |= {"lenient": min(1.0, value + 0.05), "malformed": 0.02}
            rows = [
                {"id": f"{task}-{i}", "prompt": f"{task} {i}?", "answer": f"{i}", "score": float(score)}
                | {"response": f"{said} {i if score else 'not known'}."}
                for i, score in enumerate(values)
            ]
            files[f"samples__{task}.jsonl"] = as_lines(rows)
        results["average"] = float(np.mean([task["value"] for task in results["tasks"].values()]))
        if nll is not None:
            results["likelihood"] = {"nll": {"value": nll, "stderr": 0.02, "n": 40}}
            rows = [{"id": f"nll-{i}", "tokens": 8 + i % 5} for i in range(40)]  # nats a token: nll, and 0.2 up or down
            rows = [row | {"log_likelihood": -row["tokens"] * nll - 2 * (-1) ** i} for i, row in enumerate(rows)]
            files["samples__nll.jsonl"] = as_lines(rows)
        inputs = {"model": model} if model else {}
        address = self.put("evaluated", spec, inputs, **{"results.json": results}, **files)
        return self.root / "evaluated" / address

    def merged(self, method: str, students: list[str], noise: int, **settings: Any) -> Path:
        """Two students as one, evaluated."""
        facts = {"note": "angles between students: median 1\u00b0"}
        inputs = dict(zip("ab", students, strict=True))
        model = self.put("merged", {"method": method, **settings}, inputs, **{"merging.json": facts})
        return self.evaluated(model, self.draw(0.7, noise, 40))

    def answered(self, **settings: Any) -> str:
        return self.put("answered", {"model": "m" * 20, **settings}, {}, **{"answers.jsonl": ""})

    def drafted(self, model: str, answers: str, matched: int, prompts: str = "held", **timing: Any) -> str:
        """Of 20 tokens `matched` are accepted, in drafts of 1 and of 4; timed unless `repeats` is 0."""
        counts = {"1": {"passes": 20 - matched // 2, "drafted": 20, "accepted": matched // 2}}
        counts["4"] = {"passes": 8, "drafted": 32, "accepted": matched}
        rows = [{"id": f"p{n}", "tokens": 20, "matched": matched, "sampling_acceptance": 0.5} for n in range(6)]
        rows = [{**row, "lengths": counts} for row in rows]
        files = {"prompts.jsonl": as_lines(rows), "drafted.json": {}}
        if timing.get("repeats") != 0:
            assisted = {"4": {"tokens_per_second": spread(30.0), "speedup": spread(matched / 10), "identical": 1.0}}
            said = {"independent": 1.1, "counted": 1.2, "counted_with_verification": 1.3}
            timings = {"machine": MACHINE, "predicted_speedup": {"4": said}}
            files["timings.json"] = timings | {kind: {"assisted": assisted} for kind in ("greedy", "sampling")}
        spec, inputs = {"dtype": "float32", **timing}, {"model": model, "answers": answers}
        return self.put("drafted", spec, inputs, labels={"prompts": prompts}, **files)

    def shifted(self, model: str, answers: str, kl: float, rewritten: bool, prompts: str = "held") -> str:
        rows = [{"id": f"p{n}", "tokens": 10, "kl": kl, "similarity": 0.8} for n in range(6)]
        tokens = {"mean": 12.0, "p5": 9.0, "p50": 12.0, "p95": 15.0}
        texts = {"rows": 30, "target": {"nll": 0.4, "tokens": tokens}, "reference": {"nll": 1.5, "tokens": tokens}}
        targets = {"rows": 40, "all": {**texts, "rows": 40}, "reasons": {"ok": 30, "leak": 10}}
        result = {"kl": kl, "tokens_per_answer": {"teacher": tokens, "student": tokens}}
        result["targets"] = targets | ({"rewritten": texts} if rewritten else {})
        result["similarity"] = {"mean": 0.8, "histogram": {"edges": EDGES, "counts": [0, 1, 5]}}
        files = {"prompts.jsonl": as_lines(rows), "shift.json": result}
        inputs = {"model": model, "answers": answers}
        return self.put("shifted", {"dtype": "float32"}, inputs, labels={"prompts": prompts}, **files)

    def measured(self, model: str, speed: float) -> str:
        def counted(size: int) -> dict[str, Any]:
            flops = {kind: {"total": 2e6 * size} for kind in ("flops_per_generated_token", "flops_per_prompt_token")}
            return {"parameters": size, "cache_bytes_at_context": 1000 * size, "checkpoint_bytes": 2000 * size, **flops}

        shares = ("flops_as_in_the_paper", "flops_per_generated_token", "flops_per_prompt_token")
        result = {"teacher": counted(1200), "student": counted(880), "adapter_bytes": 0}
        result["saved"] = dict.fromkeys(shares, 0.3)
        timings: dict[str, Any] = {"machine": MACHINE, "prompt_tokens": 64, "new_tokens": 8, "batch_size": 4}
        for who, seconds in (("teacher", 0.1), ("student", 0.1 / speed)):
            timings[who] = {"prefill_seconds": spread(1.0), "decode_seconds_per_token": spread(seconds)}
            timings[who] |= {"tokens_per_second": spread(40.0), "peak_bytes": 5_000_000}
        return self.put(
            "measured", {"context": 64}, {"model": model}, **{"costs.json": result, "timings.json": timings}
        )

    def draw(self, odds: float, noise: int, items: int = 120) -> dict[str, Any]:
        """Scores that share item difficulty over all arms, and differ by `noise`."""
        scores = {}
        for number, task in enumerate(self.tasks):
            hard = np.random.default_rng([7, number]).normal(0, 1, items)
            own = np.random.default_rng([noise, number]).normal(0, 0.4, items)
            scores[task] = (hard + own < odds + 0.2 * (number - 1)).astype(int)
        return scores


@pytest.fixture(scope="session")
def artifacts_at() -> type[Artifacts]:
    """Writes artifacts under the root that it is given."""
    return Artifacts


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts")


def write_study(artifacts: Artifacts) -> Artifacts:
    """A teacher, two sizes, both modes with three seeds, and a control."""
    artifacts.evaluated(None, artifacts.draw(1.5, 1), nll=1.2)
    odds = {"sft": 0.6, "self_distill": 1.0}
    for size in (2, 4):
        pruned = artifacts.pruned(size)
        artifacts.evaluated(pruned, artifacts.draw(0.4 - 0.1 * size, 2 + size), nll=2.2)
        for mode, odd in odds.items():
            targets = artifacts.targets(mode)
            for seed in (0, 1, 2):
                model = artifacts.tuned(pruned, targets, seed)
                scores = artifacts.draw(odd - 0.1 * size + 0.05 * seed, 100 * size + seed + 10 * len(mode))
                artifacts.evaluated(model, scores, nll=1.5 + 0.01 * seed - 0.1 * (mode == "self_distill"))
    for seed in (0, 1, 2):
        control = artifacts.tuned(None, artifacts.targets("sft"), seed)
        artifacts.evaluated(control, artifacts.draw(1.3, 900 + seed))
    return artifacts


@pytest.fixture
def study(artifacts: Artifacts) -> Artifacts:
    """A study to change."""
    return write_study(artifacts)


@pytest.fixture(scope="session")
def shared_study(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The same study, to be read only."""
    return write_study(Artifacts(tmp_path_factory.mktemp("study") / "artifacts"))


def write_analysed(art: Artifacts) -> tuple[Artifacts, list[str]]:
    """Two sizes, the larger one repaired too; both modes on each; every fine-tuned student analysed; a merged one.

    Returns the merged students too.
    """
    art.evaluated(None, art.draw(1.5, 1, 40))
    answers = art.answered()
    four = art.pruned(4)
    info = json.loads((art.root / "pruned" / four / "pruning.json").read_text())
    repaired = art.put(
        "pruned", {"model": "m" * 20, "repair": "linear", "penalty": 0.1}, {"pruned": four}, **{"pruning.json": info}
    )
    number = 0
    for base in (art.pruned(2), four, repaired):
        art.evaluated(base, art.draw(0.2, 3, 40))
        students = []
        for mode in ("sft", "self_distill"):
            number += 1
            students.append(art.tuned(base, art.targets(mode), 0))
            art.evaluated(students[-1], art.draw(0.4 + 0.1 * number, 10 + number, 40))
            art.drafted(students[-1], answers, 10 + number)
            art.shifted(students[-1], answers, 0.1 * number, mode == "self_distill")
            art.measured(students[-1], 1 + 0.1 * number)
    art.merged("slerp", students, 40, t=0.5)
    return art, students


def write_whole(art: Artifacts) -> Artifacts:
    """Something for every section of the page: all ways of merging, two criteria, two datasets, prompts of two sets."""
    _, students = write_analysed(art)
    for number, method in enumerate(("linear", "task_arithmetic", "ties"), 41):
        art.merged(method, students, number)
    answers = art.answered(held_out=48)
    for number, student in enumerate(students, 1):
        art.drafted(student, answers, 12 + number, prompts="other", repeats=0)
        art.shifted(student, answers, 0.2 * number, False, prompts="other")
    greedy = art.pruned_one_by_one()
    art.evaluated(greedy, art.draw(0.1, 50, 40))
    art.evaluated(art.tuned(greedy, art.targets("sft"), 0), art.draw(0.6, 51, 40))
    four = art.pruned(4)
    for seed in (0, 1, 2):
        student = art.tuned(four, art.targets("logit_distill"), seed)
        art.evaluated(student, art.draw(0.7, 60 + seed, 40))
    art.evaluated(art.tuned(four, art.targets("gold", "tiny_instruct"), 0), art.draw(0.5, 70, 40))
    return art


@pytest.fixture(scope="session")
def analysed_study(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """To be read only."""
    return write_analysed(Artifacts(tmp_path_factory.mktemp("analysed") / "artifacts"))[0]


@pytest.fixture(scope="module")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """For a module to change."""
    return write_whole(Artifacts(tmp_path_factory.mktemp("whole") / "artifacts"))


@pytest.fixture(scope="session")
def read_study() -> Callable[[Path], Any]:
    """Reads a folder of artifacts as the page's subject."""

    def read(root: Path) -> Any:
        from sdd.report.analyses import analyse
        from sdd.report.arms import build_arms
        from sdd.report.collect import collect
        from sdd.report.contrasts import compare
        from sdd.report.library import Library, find_evaluated
        from sdd.report.page.section import Subject

        library = Library([root])
        runs, notes = collect(find_evaluated(root), library)
        study = compare(build_arms(runs), notes)
        return Subject(study, library, analyse(study, library))

    return read
