"""What a plot shows and calls its arms, where a study has more than it can hold."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.markers import MarkerStyle

from sdd.finetuning.modes import SOLID
from sdd.report.arms import build_arms
from sdd.report.collect import collect
from sdd.report.library import Library, find_evaluated
from sdd.report.page.marks import DARK_GROUND
from sdd.report.plots import read_history
from sdd.report.selection import MOST, MOST_PER_MODE, labels, pick
from sdd.report.style import LINES, MODES, OTHER, WHITE, looks


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


def inside(marker) -> np.ndarray:
    """Which points of a grid a marker covers, at one size."""
    style = MarkerStyle(marker)
    path = style.get_path().transformed(style.get_transform())
    box = path.get_extents()
    x, y = np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 60))
    points = np.column_stack([x.ravel(), y.ravel()]) * max(box.width, box.height) / 2 + (box.p0 + box.p1) / 2
    return path.contains_points(points)


def test_modes_differ_without_colour():
    every = [*MODES.values(), OTHER]
    for name in ("marker", "symbol", "glyph"):
        assert len({getattr(mode, name) for mode in every}) == len(every)
    known = FT2Font(findfont("DejaVu Sans")).get_charmap()
    assert [mode.glyph for mode in every if ord(mode.glyph[0]) not in known] == [], "a font that most have lacks it"
    for one, other in combinations([inside(mode.marker) for mode in every], 2):
        assert (one ^ other).sum() >= 0.1 * min(one.sum(), other.sum())
    assert len({mode.hatch for mode in every if mode.hatch}) == len(every) - 2, "but for the models before fine-tuning"
    dashed = [MODES[name].line for name in ("logit_distill", "slerp", "linear", "task_arithmetic", "ties")]
    assert len({*dashed, *LINES, SOLID}) == len(dashed) + len(LINES) + 1


SEEN_BY = {  # Machado, Oliveira and Fernandes 2009, doi 10.1109/TVCG.2009.113, severity 1, on linear RGB
    "all": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopes": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
TO_CONES += [[0.0883024619, 0.2817188376, 0.6299787005]]
TO_LAB = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099]]
TO_LAB += [[0.0259040371, 0.7827717662, -0.808675766]]


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(colour: str, ground: str) -> float:
    low, high = sorted(float(linear(each) @ [0.2126, 0.7152, 0.0722]) + 0.05 for each in (colour, ground))
    return high / low


@pytest.mark.parametrize("who", SEEN_BY)
@pytest.mark.parametrize(("name", "ground", "least"), [("colour", WHITE, 2.2), ("on_dark", DARK_GROUND, 3)])
def test_colours_of_modes_are_told_apart(who, name, ground, least):
    """By at least 0.07 in Oklab, where black and white are 1 apart; each stands out from its ground."""
    found = {}
    for mode, own in {**MODES, "other": OTHER}.items():
        colour = getattr(own, name)
        cones = TO_CONES @ np.clip(SEEN_BY[who] @ linear(colour), 0, 1)
        found[mode] = TO_LAB @ np.cbrt(cones)
        assert contrast(colour, ground) > least, mode
    near = {(a, b): np.linalg.norm(found[a] - found[b]) for a, b in combinations(found, 2)}
    assert min(near.values()) > 0.07, min(near, key=near.__getitem__)


def test_merged_students_look_like_their_method(artifacts):
    pruned = artifacts.pruned(4)
    students = [artifacts.tuned(pruned, artifacts.targets(mode), 0) for mode in ("sft", "self_distill")]
    for number, method in enumerate(("slerp", "ties")):
        artifacts.merged(method, students, number)
    arms = build_arms(collect(find_evaluated(artifacts.root), Library([artifacts.root]))[0])
    assert {(arm.name, arm.mode, arm.look) for arm in arms} == {
        ("merged slerp", "merged", "slerp"),
        ("merged ties", "merged", "ties"),
    }
    markers = {look.marker for look in looks([arm.look for arm in arms])}
    assert markers == {MODES["slerp"].marker, MODES["ties"].marker}


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
