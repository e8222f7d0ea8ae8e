"""Targets that the teacher writes without a reference: unaided, or over what the pruned model said first."""

import json
from pathlib import Path

import pytest
from launching import artifacts_of, run

from sdd.finetuning.modes import REQUESTS
from sdd.models.chats import rewrite_prompt
from sdd.models.checkpoints import Checkpoint
from sdd.rewriting.engines import HFEngine, Place, Request
from sdd.store.files import read_jsonl


def test_what_the_teacher_is_asked(small: list[str], copied: Path, checkpoint: Path) -> None:
    """The prompts alone, or with the answers of the pruned model to all of them; references only where that fails."""
    artifacts, before = copied / "artifacts", artifacts_of(copied / "artifacts")
    (pruned,) = [made["address"] for made in before.values() if made["stage"] == "pruned"]
    teacher = HFEngine(max_new_tokens=4)
    teacher.open(Checkpoint(checkpoint), "float32", None, Place())
    said: dict[str, dict[str, str]] = {"teacher_answers": {}}
    for mode, asked_for in (("teacher_answers", "alone"), ("corrected", "draft")):
        outcome = run("generate", *small, f"finetune={mode}", cwd=copied)
        assert outcome.code == 0, outcome.stderr
        targets = json.loads((outcome.path / "manifest.json").read_text())
        folder = artifacts / "rewrites" / targets["inputs"]["rewrites"]
        rewrites = json.loads((folder / "manifest.json").read_text())
        assert ("answers" in rewrites["inputs"]) is (mode == "corrected")
        drafts: dict[str, str] = {}
        if mode == "corrected":
            answers = artifacts / "answered" / rewrites["inputs"]["answers"]
            assert json.loads((answers / "manifest.json").read_text())["inputs"] == {"model": pruned}
            drafts = {row["id"]: row["text"] for row in read_jsonl(answers / "answers.jsonl")}
            assert len(drafts) == 140
        rows, request = list(read_jsonl(folder / "rewrites.jsonl")), REQUESTS[asked_for]
        assert request is not None
        asked = [Request(r["id"], rewrite_prompt(request.template, r["prompt"], drafts.get(r["id"], ""))) for r in rows]
        expected = {answer.id: answer.text for answer in teacher.complete(asked)}
        said[mode] = {row["id"]: row["rewrite"] for row in rows}
        assert said[mode] == expected
        references = {row["id"]: row["reference"] for row in read_jsonl(outcome.path / "train.jsonl")}
        assert {row["id"]: row["reference"] for row in rows} == references
        assert all(
            row["target"] == (row["rewrite"] if row["source"] == "rewrite" else row["reference"])
            for row in (made | {"rewrite": said[mode][made["id"]]} for made in read_jsonl(outcome.path / "train.jsonl"))
        )
        assert (targets["spec"]["rule"], targets["spec"]["leak_phrases"]) == ("none", list(request.leak_phrases))
    assert said["teacher_answers"] != said["corrected"]


@pytest.mark.parametrize("mode", ["teacher_answers", "corrected"])
def test_a_run_on_them_is_planned(mode: str, small: list[str], tmp_path: Path) -> None:
    """With no row held out too, which only analyses need."""
    words = [f"finetune={mode}", "finetune.validation_rows=0", "dry_run=true"]
    outcome = run("train", *small, *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    stages = [line.split()[3].split("/")[0] for line in outcome.lines]
    answered = ["answered"] if mode == "corrected" else []
    assert sorted(stages) == [*answered, "pruned", "rewrites", "scores", "targets", "tuned"]


def test_unaided_answers_are_one_work_with_a_template_of_the_prompt_alone(small: list[str], tmp_path: Path) -> None:
    words = [["finetune=teacher_answers"], ["finetune=self_distill", "dataset.template='{prompt}'"]]
    made = [run("generate", *small, *one, "dry_run=true", cwd=tmp_path).lines for one in words]
    (one,), (other,) = ([line.split()[3] for line in lines if " rewrites/" in line.split("<-")[0]] for lines in made)
    assert one == other
