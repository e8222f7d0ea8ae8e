"""What a plot shows and calls its arms, where a study has more than it can hold."""

import pytest

from sdd.report.arms import build_arms
from sdd.report.collect import collect
from sdd.report.library import Library, find_evaluated
from sdd.report.plots import read_history
from sdd.report.selection import MOST, MOST_PER_MODE, labels, pick
from sdd.report.style import MODES, looks


@pytest.fixture
def crowd(artifacts):
    """Two arms of pruning alone, six of each mode."""
    for size in (2, 4):
        pruned = artifacts.pruned(size)
        artifacts.evaluated(pruned, {"add": [1, 0]})
        for rate in (1e-4, 3e-4, 1e-3):
            for mode in ("sft", "self_distill"):
                model = artifacts.tuned(pruned, artifacts.targets(mode), 0, rate)
                artifacts.evaluated(model, {"add": [1, 0]})
    return build_arms(collect(find_evaluated(artifacts.root), Library([artifacts.root]))[0])


def test_every_mode_is_shown(crowd):
    shown = pick(crowd)
    assert len(crowd) == 14
    assert len(shown) == MOST
    assert [arm.mode for arm in shown].count("pruned") == 2
    assert [arm.mode for arm in shown].count("sft") == [arm.mode for arm in shown].count("self_distill") == 3
    assert [arm.name for arm in shown] == [arm.name for arm in crowd if arm in shown]


def test_one_mode_has_no_more_arms_than_looks(crowd):
    only = [arm for arm in crowd if arm.mode == "sft"]
    assert len(pick(only)) == MOST_PER_MODE
    assert len(set(looks(["sft"] * MOST_PER_MODE))) == MOST_PER_MODE


def test_modes_differ_without_colour():
    assert len({(marker, hatch) for _, marker, hatch in MODES.values()}) == len(MODES)
    assert len({marker for _, marker, _ in MODES.values()}) == len(MODES)


def test_shared_words_leave_the_legend(crowd):
    arms = [arm for arm in crowd if arm.run.pruning == "n4" and "lr=0.001" in arm.words]
    assert labels(arms) == (["sft", "self_distill"], "n4, lr=0.001")
    assert labels(arms, without_pruning=True) == (["sft", "self_distill"], "lr=0.001")
    assert labels(arms[:1]) == (["sft n4 lr=0.001"], "")


def test_history_keeps_only_measured_steps(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("step,epoch,loss,learning_rate,validation_loss\n1,0,2.5,0.1,\n2,0,2.4,0.1,2.0\n3,0,2.3,0.1,nan\n")
    assert read_history(path) == [(2.0, 2.0)]
    assert read_history(tmp_path / "none.csv") == []
