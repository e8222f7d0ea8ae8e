"""Stages at the sizes of 8 billion parameters, two blocks of them, on a GPU that is not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import shapes
from benchmarks.fake_gpu import on_fake_gpu

PAGE = Path(__file__).resolve().parents[2] / "docs" / "shapes.md"
LLAMA = shapes.Case("llama3.1_8b_instruct", 2)


def observing(work: Callable[[Any], None]) -> Any:
    """A criterion that does something to the model at every block's states, which a stage might by mistake."""
    from sdd.importance.states import Angular

    class Observing(Angular):
        def observe(self, block: int, entering: Any, leaving: Any, mask: Any) -> None:
            work(leaving)
            super().observe(block, entering, leaving, mask)

    return Observing()


def test_scores_hold_the_weights_once_and_take_what_the_formula_says() -> None:
    trace, estimate = shapes.traced("scores, angular", LLAMA), shapes.FORMULAS["scores, angular"](LLAMA.cost_model)
    weights = 2 * (2 * 218_112_000 + 2 * 128_256 * 4096 + 4096)
    assert trace.peak["weights"] == pytest.approx(weights, rel=1e-6)
    assert trace.peak["activations"] == pytest.approx(estimate.memory - weights, rel=0.2)
    assert trace.flops == pytest.approx(estimate.seconds, rel=0.05)
    assert not trace.widened
    assert not trace.on_cpu


def test_fine_tuning_widens_no_weight_and_takes_what_the_formula_says() -> None:
    """LoRA of rank 16: 1,310,720 weights a block, in float32 with two moments."""
    trace, estimate = shapes.traced("tuned, LoRA", LLAMA), shapes.FORMULAS["tuned, LoRA"](LLAMA.cost_model)
    assert trace.peak["trained"] == 4 * 2 * 1_310_720
    assert trace.peak["optimiser"] == pytest.approx(8 * 2 * 1_310_720, rel=1e-3)
    assert not trace.widened
    assert not trace.on_cpu
    weights = trace.peak["weights"]
    assert trace.peak_bytes - weights == pytest.approx(estimate.memory - weights, rel=0.2)


def test_formulas_are_within_a_fifth_of_what_the_page_says_was_traced() -> None:
    """docs/shapes.md, the columns "traced, GB" and "TFLOP", of whole models."""
    page = PAGE.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    traced = {(row[0], row[1]): (float(row[2]), row[5]) for row in rows if row[0] in shapes.MODELS}
    wanted = {(name, stage) for name in shapes.MODELS for stage in shapes.STAGES}
    assert set(traced) == wanted - {(name, stage) for stage, name in shapes.LEFT_OUT}
    for (name, stage), (gigabytes, operations) in traced.items():
        formula = shapes.FORMULAS[stage](shapes.Case(name).cost_model)
        assert formula.memory / 1e9 == pytest.approx(gigabytes, rel=0.2), (name, stage)
        if operations:
            assert formula.seconds / 1e12 == pytest.approx(float(operations), rel=0.2), (name, stage)


@pytest.mark.peer
def test_the_page_is_what_is_traced_now() -> None:
    """Every row of docs/shapes.md, from traces of all models, and what it says of exceptions: three minutes."""
    page = PAGE.read_text()
    traced = [
        (name, stage) for name in shapes.MODELS for stage in shapes.STAGES if (stage, name) not in shapes.LEFT_OUT
    ]
    cases = ((name, stage, blocks) for name, stage in traced for blocks in (2, 3))
    records = {
        f"{name}|{stage}|{blocks}": shapes.record(stage, shapes.Case(name, blocks)) for name, stage, blocks in cases
    }
    lines = shapes.table(records)
    assert len(lines) == 2 + len(traced)
    assert "\n".join(lines) in page
    assert shapes.exceptions_told(records) in page


def test_what_is_not_meant_is_no_page() -> None:
    """SDM may widen an MLP's matrices and an export a block's, a merge may compute with as much as two of an MLP's;
    nothing else may do either."""
    none: dict[str, Any] = {"widened": {}, "on_cpu": {}}
    widened, on_cpu = {"widened": {"(14336, 4096)": 16}}, {"on_cpu": {"aten::mm": 2 * 4 * 14336 * 4096}}
    name = LLAMA.name
    meant = {
        f"{name}|scores, angular|2": none,
        f"{name}|scores, SDM|2": none | widened,
        f"{name}|merged, SLERP|2": none | on_cpu,
        f"{name}|exported, LoRA|2": none | {"widened": {"(1024, 4096)": 4}},
    }
    reasons = [shapes.WIDENED["scores, SDM"], shapes.ON_CPU["merged, SLERP"], shapes.WIDENED["exported, LoRA"]]
    assert shapes.exceptions(meant) == reasons
    for stage, record in (
        ("scores, angular", none | widened),
        ("scores, SDM", {"widened": {"(128256, 4096)": 1}, "on_cpu": {}}),
        ("scores, SDM", {"widened": {"(1024, 4096)": 4}, "on_cpu": {}}),
        ("exported, LoRA", {"widened": {"(128256, 4096)": 1}, "on_cpu": {}}),
        ("tuned, LoRA", none | on_cpu),
        ("merged, SLERP", {"widened": {}, "on_cpu": {"aten::mm": 16 * 2 * 14336 * 4096 + 4}}),
    ):
        with pytest.raises(SystemExit, match=f"{stage}.2: "):
            shapes.exceptions(meant | {f"{name}|{stage}|2": record})


def test_a_weight_that_is_widened_is_noted() -> None:
    with on_fake_gpu() as trace:
        model = LLAMA.model(trace)
        states = torch.zeros(1, 8, 4096, dtype=torch.bfloat16, device="cuda")
        states.float()  # no weight
        assert not trace.widened
        model.model.layers[0].mlp.up_proj.weight.float()
    assert trace.widened == {"(14336, 4096)": 1}


def test_a_tensor_of_the_cpu_is_no_input_and_arithmetic_there_is_noted() -> None:
    mixed = observing(lambda states: states + torch.zeros(states.shape))
    moved = observing(lambda states: states.cpu())
    with on_fake_gpu() as trace, pytest.raises(RuntimeError, match="same device"):
        shapes.scores(LLAMA, trace, mixed)
    with on_fake_gpu() as trace:
        shapes.scores(LLAMA, trace, moved)
    assert trace.on_cpu


def test_what_follows_from_values_goes_as_on_a_gpu() -> None:
    with on_fake_gpu() as trace:
        mask = torch.arange(6, device="cuda") >= 2
        states = torch.zeros(6, 5, device="cuda")
        assert states[mask].shape == (4, 5)
        assert torch.tensor([3, 1], device="cuda").tolist() == [3, 1]
        trace.restart()
        held = torch.empty(1 << 20, device="cuda")
        grown = held * 2
        del held, grown
        assert trace.peak_bytes >= 2 * 4 << 20 > trace.total["cuda"]
