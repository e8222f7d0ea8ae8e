"""What a job says at its end, from artifacts made by hand."""

import json
from pathlib import Path

import pytest

from sdd.cli.endings import cut_lines, evaluation_lines, targets_lines, training_lines
from sdd.cli.words import command
from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint


def write(folder: Path, name: str, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def results(**values: float) -> dict[str, object]:
    tasks = {name: {"value": value, "stderr": 0.02, "n": 100} for name, value in values.items()}
    return {"tasks": tasks, "likelihood": {"nll": {"value": 0.5}}}


def test_an_evaluation_beside_the_unpruned_models(tmp_path):
    student = write(tmp_path / "student", "results.json", results(add=0.45, sorting=0.9))
    teacher = write(tmp_path / "teacher", "results.json", results(add=0.9, sorting=1.0))
    assert evaluation_lines(student, teacher) == [
        "average 67.5 percent over 2 tasks, 71.1% of the unpruned model's 95.0; 0.500 nats a token",
        "task     percent  std. error  unpruned  kept",
        "add         45.0         2.0      90.0   50%",
        "sorting     90.0         2.0     100.0   90%",
    ]
    assert evaluation_lines(teacher, None)[1:] == [
        "task     percent  std. error",
        "add         90.0         2.0",
        "sorting    100.0         2.0",
    ]
    nothing = write(tmp_path / "nothing", "results.json", results(add=0.0, sorting=0.0))
    assert evaluation_lines(student, nothing)[0].startswith("average 67.5 percent over 2 tasks; ")


def test_a_cut_of_blocks_and_channels(tmp_path):
    facts = {"metric": "angular", "removed_blocks": [3, 5, 6, 7], "kept_blocks": [0, 1, 2, 4]}
    facts |= {"parameters_before": 2000, "parameters_after": 1500}
    assert cut_lines(write(tmp_path, "pruning.json", facts)) == [
        "removed blocks 3,5-7 of 8 (counted from 0), chosen by angular",
        "saves 25.0% of the parameters, 2,000 -> 1,500, and about as much of a token's work",
    ]
    narrow = {**facts, "removed_blocks": [], "metric": "sdm", "width_before": 40, "width_after": 24}
    lines = cut_lines(write(tmp_path, "pruning.json", narrow))
    assert lines[0] == "removed 16 of 40 channels of every MLP, chosen by sdm"


def test_training_and_rewriting_in_a_line(tmp_path):
    history = "step,epoch,loss,validation_loss\n1,0,2.5,1.75\n2,0,2.25,\n3,0,1.5,1.25\n"
    line = "3 steps: loss 2.500 -> 1.500, on validation rows 1.750 -> 1.250"
    assert training_lines(write(tmp_path, "history.csv", history)) == [line]
    summary = {"rows": 1200, "reasons": {"ok": 1100, "wrong_answer": 100}}
    line = "1,100 of 1,200 rewrites kept; the reference stayed in the others: wrong answer 100"
    assert targets_lines(write(tmp_path, "summary.json", summary), True) == [line]
    nothing = {"rows": 9, "reasons": {"leak": 9}}
    (line,) = targets_lines(write(tmp_path, "summary.json", nothing), True)
    assert line == "0 of 9 rewrites kept; the reference stayed in the others: leak 9"
    judged = nothing | {"judged": {"asked": 1200, "unread": 3}}
    assert targets_lines(write(tmp_path, "summary.json", judged), True)[1:] == [
        "a judge was asked to choose in 1,200 rows; 3 answers were no choice, and the first try stands"
    ]
    assert targets_lines(write(tmp_path, "summary.json", nothing), False) == ["9 rows, as they are"]


@pytest.mark.parametrize(
    ("program", "expected"),
    [("/opt/bin/sdd-prune", "sdd train pruning=n2"), ("prune.py", "python train.py pruning=n2")],
)
def test_a_command_is_told_as_it_is_typed_here(program: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [program])
    assert command("train", ["pruning=n2"]) == expected


def test_a_checkpoint_one_folder_below_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine" / "hf").mkdir(parents=True)
    (tmp_path / "mine" / "hf" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config.json; hf, in it, has one"):
        _ = Checkpoint(tmp_path / "mine").config
