"""What recovering takes, against the FLOPs that torch counts while a step of it runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdd.finetuning.adapters import adapted, causal_lm
from sdd.finetuning.losses.weighted import built
from sdd.finetuning.module import TrainingRow, loss_sum
from sdd.models.checkpoints import Checkpoint
from sdd.planning import price
from sdd.planning.cost_model import Shape, shape_of
from sdd.planning.estimates import adapter_parameters
from sdd.planning.price import Passed, Recovery, Trained
from sdd.pruning.depth import prune_checkpoint
from sdd.rewriting.engines import HFEngine

PROMPT, TARGET, BLOCKS = 20, 12, 2
ROW = TrainingRow([*range(5, 5 + PROMPT + TARGET)], PROMPT)
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}


class Square(Passed):
    """These kernels compute the whole square of attention, each token as if it saw all of a row."""

    @property
    def seen(self) -> float:
        return self.tokens


PASSED = Square(1, PROMPT + TARGET, TARGET)


def flops_of(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The unpruned model, and two of its four blocks."""
    cut = tmp_path_factory.mktemp("cut")
    prune_checkpoint(Checkpoint(tiny_llama), cut, [1, 2])
    return tiny_llama, cut


@pytest.fixture(scope="module")
def shape(folders: tuple[Path, Path]) -> Shape:
    return shape_of(Checkpoint(folders[1]).config)


def opened(folder: Path) -> Any:
    return Checkpoint(folder).model("float32", attention="eager").requires_grad_(False)


def stepped(student: Any, loss: Callable[..., Any], *rows: TrainingRow) -> int:
    """FLOPs of a pass forward and back over the rows, by default the one."""
    return flops_of(lambda: loss(causal_lm(student).train(), rows or [ROW])[0].backward())


@pytest.mark.parametrize("reach", [BLOCKS, 1])
def test_lora_on_the_references(folders: tuple[Path, Path], shape: Shape, reach: int) -> None:
    student = adapted(opened(folders[1]), LORA, None if reach == BLOCKS else [BLOCKS - 1])
    weights = adapter_parameters(shape, reach, 4, ["all-linear"])
    lowest = 2 * 3 * 4 * 32  # what LoRA's matrices of the lowest queries, keys and values pass back to no one
    expected = price.trained(shape, BLOCKS, PASSED, weights, reach) - PASSED.tokens * lowest
    assert stepped(student, loss_sum) == expected


def test_every_weight_and_head_and_norms(folders: tuple[Path, Path], shape: Shape) -> None:
    assert stepped(adapted(opened(folders[1]), {"method": "full"}, None), loss_sum) == price.trained_whole(
        shape, BLOCKS, PASSED
    )
    head = adapted(opened(folders[1]), {"method": "head_and_norms"}, None)
    assert stepped(head, loss_sum) == price.trained_head(shape, BLOCKS, PASSED)


@pytest.mark.parametrize("loss", ["forward_kl", "hidden_states"])
def test_a_teacher_beside_the_student(folders: tuple[Path, Path], loss: str) -> None:
    """It makes logits of the targets where a loss is on logits, once more on the way back, which is left out; of
    states, nothing but the pass is added."""
    on_logits = loss == "forward_kl"
    alone = stepped(adapted(opened(folders[1]), LORA, None), built({"cross_entropy": 1.0}, {}))
    losses = {loss: 1.0} | ({} if on_logits else {"cross_entropy": 1.0})
    both = stepped(adapted(opened(folders[1]), LORA, None), built(losses, {}, opened(folders[0]), [0, 3]))
    whole = shape_of(Checkpoint(folders[0]).config)
    again = TARGET * whole.head_flops if on_logits else 0.0
    assert both - alone == price.forward(whole, whole.blocks, PASSED, head=on_logits) + again


def test_a_rejected_answer_is_a_pass_of_its_own_for_the_rows_that_have_one(
    folders: tuple[Path, Path], shape: Shape
) -> None:
    """One row of two; logits are made once more on the way back, which is left out."""
    refused, loss = 7, built({"redi": 1.0}, {})
    one = replace(ROW, rejected=[*range(5, 5 + PROMPT + refused)])
    counted = [stepped(adapted(opened(folders[1]), LORA, None), loss, row, ROW) for row in (ROW, one)]
    weights = adapter_parameters(shape, BLOCKS, 4, ["all-linear"])
    recovery = Recovery(shape, shape, shape, Trained(weights=weights), 2, PROMPT, TARGET)
    costs = replace(recovery, refused=0.5, rejected=refused).price().student - recovery.price().student
    lowest, square = 2 * 3 * 4 * 32, 3 * 4 * shape.heads * shape.head_dim * BLOCKS
    tokens = PROMPT + refused
    beyond = square * tokens * (tokens - 1) / 2 + refused * shape.head_flops - tokens * lowest
    assert counted[1] - counted[0] == costs + beyond


def test_an_answer_that_a_model_writes(folders: tuple[Path, Path], shape: Shape, tokenizer: Any) -> None:
    """Rollouts and rewrites: the prompt once, and every token but the last after the keys and values before it."""
    engine = HFEngine(max_new_tokens=TARGET, temperature=1.0, seed=3)
    engine.take(opened(folders[1]), tokenizer, None, 1)
    written: list[int] = []

    def write() -> None:
        with torch.no_grad():
            for _, tokens in engine.continued([ROW.ids[:PROMPT]], ["a"], lambda tokens, fresh: None):
                written.extend(tokens)

    counted = flops_of(write)
    first = PROMPT - 1  # tokens that are passed at once, as a square
    square = 4 * shape.heads * shape.head_dim * BLOCKS * first * (first - 1) / 2
    assert len(written) > 2
    assert counted == price.written(shape, BLOCKS, 1, PROMPT, len(written)) + square
