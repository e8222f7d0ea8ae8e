"""The arm that is taught logits, from the command line to its evaluation, and noise in the rewrites."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import artifacts_of, run
from omegaconf import DictConfig

from sdd.models.checkpoints import Checkpoint
from sdd.report.library import Library, read_artifact
from sdd.report.price import Prices
from sdd.stages import tuned
from sdd.stages.__main__ import main as stages
from sdd.stages.priced import expected
from sdd.stages.sizes import Sizes
from sdd.store.files import read_jsonl
from sdd.study import Study

QUICK = ["metric=last", "pruning=n1", "finetune.epochs=1", "finetune=logit_distill"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workplace")


@pytest.mark.parametrize("words", [["finetune.ce_share=0.2"], ["adapter=full", "finetune.learning_rate=1e-4"]])
def test_taught_made_again_and_told(
    words: list[str], small: list[str], workplace: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run("train", *small, *QUICK, *words, cwd=workplace)
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    distillation = manifest["spec"]["distillation"]
    assert (distillation["dtype"], distillation["temperature"]) == ("float32", 1.0)
    assert distillation["ce_share"] == (0.2 if words[0] == "finetune.ce_share=0.2" else 0.0)
    targets = workplace / "artifacts" / "targets" / manifest["inputs"]["targets"]
    rows = list(read_jsonl(targets / "train.jsonl"))
    assert {(row["source"], row["reason"]) for row in rows} == {("reference", "logit_distill")}
    assert all(row["target"] == row["reference"] for row in rows)
    assert "rewrites" not in {made["stage"] for made in artifacts_of(workplace / "artifacts").values()}
    capsys.readouterr()
    source = ["--source", f"{distillation['teacher']}={checkpoint}", "--artifacts", str(workplace / "artifacts")]
    assert stages(["rerun", outcome.path.name, *source]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == "identical\n"


def test_one_pass_of_the_teacher_serves_every_cut(
    small: list[str],
    workplace: Path,
    checkpoint: Path,
    composed: Callable[..., DictConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Made again it is the same; with every token of the vocabulary the student is the one taught by the teacher. What
    a dry run tells of its price is off by how far its 12 rows are from the average of all."""
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    cached = ["finetune.cached=top_k", f"finetune.cached_k={vocabulary}", "finetune.cached_bits=32"]
    beside = run("train", *small, *QUICK, cwd=workplace)
    kept, other = (run("train", *small, *QUICK, *cached, *more, cwd=workplace) for more in ([], ["pruning=n2"]))
    manifests = [json.loads((outcome.path / "manifest.json").read_text()) for outcome in (kept, other)]
    assert manifests[0]["inputs"]["taught"] == manifests[1]["inputs"]["taught"]
    assert "teacher" not in manifests[0]["spec"]["distillation"]
    histories = [
        [float(line.split(",")[2]) for line in (outcome.path / "history.csv").read_text().splitlines()[1:]]
        for outcome in (beside, kept)
    ]
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)
    library = Library([workplace / "artifacts"])
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "tokenizer", None)  # opening it takes seconds, which no price needs
        paid = [Prices(library).of(read_artifact(outcome.path)) for outcome in (beside, kept, other)]
    assert paid[0] == paid[1] is not None
    study = Study(composed(*QUICK), workplace)
    price = expected(Sizes(study), tuned.recipe(study), {})
    assert (price.student, price.teacher) == pytest.approx((paid[0].student, paid[0].teacher), rel=0.2)
    assert paid[2] is not None and (paid[2].teacher, paid[2].student < paid[1].student) == (paid[1].teacher, True)
    teacher = json.loads((beside.path / "manifest.json").read_text())["spec"]["distillation"]["teacher"]
    words = ["--source", f"{teacher}={checkpoint}", "--artifacts", str(workplace / "artifacts")]
    assert stages(["rerun", manifests[0]["inputs"]["taught"], *words]) == 0


def test_the_same_rows_as_sft(small: list[str], workplace: Path) -> None:
    taught, tuned = (
        run("train", *small, *QUICK, f"finetune={mode}", cwd=workplace) for mode in ("logit_distill", "sft")
    )
    ids = [json.loads((outcome.path / "rows.json").read_text())["ids"] for outcome in (taught, tuned)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 12


@pytest.mark.parametrize("what", ["size", "tokens"])
def test_a_teacher_of_another_vocabulary_is_refused_before_any_work(
    what: str, small: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    if what == "size":
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    else:
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        (first, a), (second, b) = list(vocabulary.items())[-2:]
        vocabulary |= {first: b, second: a}
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = run("train", *small, *QUICK, f"teacher.path={other}", cwd=tmp_path)
    assert outcome.code == 2
    (error,) = outcome.errors
    assert error.startswith(f"error: teacher.path={other}: its vocabulary has ")
    assert ("tokens and the model's" in error) is (what == "size")
    assert not list((tmp_path / "artifacts").glob("[a-z]*/*/manifest.json"))


def test_noise_reaches_the_targets(small: list[str], copied: Path) -> None:
    """Without selection every rewrite of the random model is kept that has text; a third of them changes hands."""
    words = ["finetune.select=false", "finetune.noise_share=0.3"]
    clean, noisy = (
        list(read_jsonl(run("generate", *small, *more, cwd=copied).path / "train.jsonl")) for more in (words[:1], words)
    )
    changed = [(before, after) for before, after in zip(clean, noisy, strict=True) if before != after]
    assert 20 < len(changed) < 65
    for before, after in changed:
        assert (after["reason"], after["source"]) == ("noise", "rewrite")
        assert after["target"] != before["target"]
        assert after["target"] in {row["target"] for row in clean}
