"""Two processes on a CPU (gloo): what one process comes to, the same run after a kill, one reason for an end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launching import PATIENCE, REPOSITORY, files_of, run, spawn

from sdd.analysis.shift import token_nll
from sdd.errors import UserError
from sdd.evaluation import likelihoods
from sdd.evaluation.backends import in_process
from sdd.evaluation.harness import Harness
from sdd.evaluation.tiny import suite_tasks
from sdd.finetuning.adapters import adapted, causal_lm
from sdd.finetuning.module import TrainingRow, loss_sum, micro_batches, target_tokens
from sdd.forward import ranks
from sdd.forward.batches import show_texts, tokenize_texts
from sdd.forward.bypass import Row
from sdd.importance.channels import TaylorWidth
from sdd.importance.removal import Perplexity
from sdd.importance.states import Angular, BlockInfluence
from sdd.models.checkpoints import Checkpoint
from sdd.rewriting import engines
from sdd.rewriting.engines import HFEngine, Request

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
    for micro in micro_batches(_lengths(), 64)[ranks.rank() :: number]:
        (loss_sum(causal_lm(student), [rows[at] for at in micro])[0] / target_tokens(rows)).backward()
    trained = {name: one for name, one in student.named_parameters() if one.requires_grad}
    if ranks.is_rank():
        ranks.sum_gradients(trained.values())
    if ranks.rank() == 0:
        torch.save({name: one.grad for name, one in trained.items()}, out)
    if ranks.is_rank():
        torch.distributed.barrier()
    if ranks.rank() == 1:
        raise UserError("no room")


def _lengths() -> list[int]:
    return [row.longest for row in _rows()]


def test_gradients_are_those_of_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    _gradients(tiny_llama, tmp_path / "one.pt")
    with pytest.raises(UserError, match=r"^no room$"):  # a mistake that one rank finds is told as it is
        ranks.launch(_gradients, (tiny_llama, tmp_path / "two.pt"), 2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(two[name], gradient, rtol=1e-6, atol=1e-6)
    assert len(micro_batches(_lengths(), 64)) > 3


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


# ---- without gradients ------------------------------------------------------------------------------------------


def _passes(folder: Path, texts: list[str], out: Path) -> None:
    """What every kind of pass comes to, as each rank has it."""
    checkpoint = Checkpoint(folder)
    model, tokenizer = checkpoint.model("float32"), checkpoint.tokenizer()
    rows = tokenize_texts(tokenizer, texts, 48)
    found: dict[str, Any] = {}
    for criterion in (Angular(), BlockInfluence()):
        criterion.start(4)
        show_texts(model, criterion, rows, 2)
        found[criterion.name] = criterion.scores()
    perplexity = Perplexity()
    perplexity.start(4)
    perplexity.measure(model, [Row(ids) for ids in rows], 2)
    found["perplexity"] = perplexity.scores()
    found["taylor"] = [block.tolist() for block in TaylorWidth().measure(model, rows, 100)]
    found["surprisals"] = token_nll(model, [(ids[:5], ids[5:]) for ids in rows], 2)
    for keeps_all in (True, False):
        engine = HFEngine(max_new_tokens=6, temperature=0.7, batch_size=2)
        engine.take(model, tokenizer, None, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "keeps_all", lambda _, keeps_all=keeps_all: keeps_all)
            completions = list(engine.complete([Request(f"r{n}", text) for n, text in enumerate(texts)]))
        found[f"answers {keeps_all}"] = sorted((one.id, one.text, one.finish) for one in completions)
    harness = Harness(in_process(model, tokenizer, 2), tokenizer, max_new_tokens=6)
    for name, task in suite_tasks("tiny", ["arithmetic", "fact_choice", "nll"], "dev", 0, 9).items():
        found[name] = harness.run(task)
    out.with_suffix(f".{ranks.rank()}").write_text(json.dumps(found))


def test_shared_passes_come_to_what_one_process_has(
    tiny_llama: Path, conversations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit, in both ranks: a batch is what it was, and only who passes it differs."""
    monkeypatch.setattr(likelihoods, "SUBTREES", 1)
    _passes(tiny_llama, conversations, tmp_path / "one")
    ranks.launch(_passes, (tiny_llama, conversations, tmp_path / "two"), 2)
    one, *two = ((tmp_path / name).read_text() for name in ("one.0", "two.0", "two.1"))
    assert two == [one, one]
    assert len(json.loads(one)["fact_choice"]) == 9


@pytest.mark.peer
def test_two_processes_build_what_one_does(small: list[str], tmp_path: Path) -> None:
    """Scores, rewrites, evaluations and analyses, byte by byte."""
    stages = set()
    for devices in (1, 2):
        cwd, shared = tmp_path / str(devices), [*small, "finetune=none", f"trainer.devices={devices}"]
        for words in (
            ["metric=perplexity"],
            ["metric=taylor_width", "pruning=mlp20"],
            ["analysis=shift", "analysis.embedder=null"],
        ):
            assert run("evaluate", *shared, *words, cwd=cwd).code == 0
        assert run("generate", *small, f"trainer.devices={devices}", cwd=cwd).code == 0
        stages |= {name.split("/")[0] for name in files_of(cwd / "artifacts")}
    assert stages == {"scores", "pruned", "evaluated", "answered", "shifted", "rewrites", "targets"}
    assert files_of(tmp_path / "1" / "artifacts") == files_of(tmp_path / "2" / "artifacts")


def _fails(out: Path) -> None:
    ranks.told(b"")
    if ranks.rank() == 1:
        raise UserError("no room")
    ranks.told(b"")


def test_a_rank_that_waits_for_another_leaves_the_reason_to_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no room$"):
        ranks.launch(_fails, (tmp_path,), 2)


LAUNCHER = """
import multiprocessing, os, pathlib, time
from sdd.forward import ranks

def waits():
    ranks.end_with_launcher()
    pathlib.Path("waits").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    waiting = multiprocessing.get_context("forkserver").Process(target=waits)
    waiting.start()
    waiting.join()
"""


def test_a_rank_ends_with_the_process_that_began_it(tmp_path: Path) -> None:
    """Killed by SIGKILL, that sends no signal on; a rank that waits for another would stay for half an hour."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    path = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    launcher = subprocess.Popen([sys.executable, "launcher.py"], cwd=tmp_path, env=path)
    deadline, begun = time.monotonic() + PATIENCE, tmp_path / "waits"
    while not (begun.exists() and begun.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    waiting = psutil.Process(int(begun.read_text()))
    launcher.kill()
    launcher.wait()
    waiting.wait(60)
