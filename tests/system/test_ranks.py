"""Fine-tuning by two processes on a CPU (gloo): the same gradient, the same run after a kill, one reason for an end."""

import os
from pathlib import Path

import psutil
import pytest
import torch
from launching import files_of, run, spawn

from sdd.errors import UserError
from sdd.finetuning import ranks
from sdd.finetuning.adapters import adapted, causal_lm
from sdd.finetuning.module import TrainingRow, loss_sum, micro_batches, target_tokens
from sdd.models.checkpoints import Checkpoint

ADAPTER = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}
STEPS = ["trainer.threads=1", "trainer.micro_batch_tokens=256", "trainer.checkpoint_every=2"]
"""Passes of which a step, and the validation, has two."""


def _rows() -> list[TrainingRow]:
    generator = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in torch.randint(8, 30, (11,), generator=generator)]
    return [TrainingRow(torch.randint(5, 60, (n,), generator=generator).tolist(), 3) for n in lengths]


def _gradients(folder: Path, out: Path) -> None:
    """Of one step, as the module takes it; the first rank writes them."""
    torch.manual_seed(0)
    student = adapted(Checkpoint(folder).model("float32", "cpu"), ADAPTER, None)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    rows, number = _rows(), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks.is_rank():
        torch.distributed.init_process_group("gloo", rank=ranks.rank(), world_size=number)
    for micro in micro_batches(rows, 64)[ranks.rank() :: number]:
        (loss_sum(causal_lm(student), micro)[0] / target_tokens(rows)).backward()
    trained = {name: one for name, one in student.named_parameters() if one.requires_grad}
    if ranks.is_rank():
        ranks.sum_gradients(trained.values())
    if ranks.rank() == 0:
        torch.save({name: one.grad for name, one in trained.items()}, out)
    if ranks.is_rank():
        torch.distributed.barrier()
    if ranks.rank() == 1:
        raise UserError("no room")


def test_gradients_are_those_of_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    _gradients(tiny_llama, tmp_path / "one.pt")
    with pytest.raises(UserError, match=r"^no room$"):  # a mistake that one rank finds is told as it is
        ranks.launch(_gradients, (tiny_llama, tmp_path / "two.pt"), 2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(two[name], gradient, rtol=1e-6, atol=1e-6)
    assert len(micro_batches(_rows(), 64)) > 3


@pytest.mark.peer
def test_two_processes_train_what_one_does_and_go_on_after_a_kill(small: list[str], tmp_path: Path) -> None:
    """Byte by byte where a step has two micro-batches, whose order is all that differs; the second time in a sweep."""
    words = [*small, "finetune=sft", *STEPS]
    alone = run("train", *words, cwd=tmp_path / "alone")
    both = [*words, "trainer.devices=2"]
    killed = spawn("train", *both, cwd=tmp_path / "killed")
    scratch = tmp_path / "killed" / "artifacts" / ".partial" / "tuned"
    killed.until(lambda: bool(list(scratch.glob("*/scratch/step=*.ckpt"))))
    servers = [one for one in psutil.Process(killed.process.pid).children() if "forkserver" in " ".join(one.cmdline())]
    trainers = [rank for server in servers for rank in server.children()]
    assert len(trainers) == 2
    trainers[-1].kill()
    outcome = killed.outcome()
    assert outcome.code == 2, outcome.stderr
    assert "of trainer.devices=2 ended (SIGKILL)" in outcome.errors[0]
    assert not psutil.pid_exists(trainers[0].pid)
    assert list(scratch.glob("*/scratch/step=*.ckpt"))

    again = run("train", "-m", *both, "seed=0", "hydra.sweep.dir=sweep", cwd=tmp_path / "killed")
    assert (again.code, again.lines[0].rsplit("/", 1)[1]) == (0, alone.path.name), again.stderr
    made = files_of(tmp_path / "alone" / "artifacts")
    assert made and made == files_of(tmp_path / "killed" / "artifacts")
