"""A study on disk with scores of known odds: manifests, results, samples and training curves, no model involved."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TASKS = ("add", "sort", "lookup", "add_choice")
TRAINED = {"add": 300, "lookup": 200}


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


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
            results["likelihood"] = {"nll": {"value": nll, "stderr": 0.02, "n": 400}}
        inputs = {"model": model} if model else {}
        address = self.put("evaluated", spec, inputs, **{"results.json": results}, **files)
        return self.root / "evaluated" / address

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
