"""Two processes on a CPU (gloo): what one process comes to, the same run after a kill, one reason for an end."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launching import PATIENCE, REPOSITORY, Running, artifacts_of, files_of, run, spawn
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from sdd.analysis.shift import token_nll
from sdd.errors import UserError
from sdd.evaluation import likelihoods
from sdd.evaluation.backends import in_process
from sdd.evaluation.harness import Harness
from sdd.evaluation.tiny import suite_tasks
from sdd.finetuning.adapters import adapted, causal_lm
from sdd.finetuning.module import (
    Optimisation,
    StudentModule,
    TrainingRow,
    loss_sum,
    micro_batches,
    target_tokens,
)
from sdd.finetuning.sharded import Shards, whole
from sdd.forward import parts, ranks
from sdd.forward.batches import show_texts, tokenize_texts
from sdd.forward.bypass import Row
from sdd.forward.nodes import free_port
from sdd.importance.channels import SDM, ActivationWidth, TaylorWidth
from sdd.importance.removal import Perplexity, iterative
from sdd.importance.states import Angular, BlockInfluence
from sdd.models.checkpoints import Checkpoint
from sdd.rewriting import engines
from sdd.rewriting.engines import HFEngine, Request

ADAPTER = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}
ON_CPU = ["trainer.accelerator=cpu"]
"""With `trainer=ddp` or `fsdp`, so that passes are those of `trainer=cpu`."""
STEPS = ["trainer.threads=1", "trainer.micro_batch_tokens=256", "trainer.checkpoint_every=2"]
"""Passes of which a step, and the validation, has two."""
MOMENT = 60.0
"""Seconds in which a command ends whose part on another node is gone, on a machine with much else to do."""


def _rows() -> list[TrainingRow]:
    generator = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in torch.randint(8, 30, (11,), generator=generator)]
    return [TrainingRow(torch.randint(5, 60, (n,), generator=generator).tolist(), 3) for n in lengths]


def _student(folder: Path, adapter: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    student = adapted(Checkpoint(folder).model("float32", "cpu"), adapter, None)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return student


def _gradients(folder: Path, out: Path) -> None:
    """Of one step, as the module takes it; the first rank writes them."""
    student = _student(folder, ADAPTER)
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


def _sharded_gradients(folder: Path, out: Path) -> None:
    """The same, of LoRA and of all parameters, where each rank has its part of every tensor; and who passed what."""
    gradients, rows = {}, _rows()
    if ranks.is_rank():
        torch.distributed.init_process_group("gloo", rank=ranks.rank(), world_size=ranks.number())
    for adapter in (ADAPTER, {"method": "full"}):
        student = _student(folder, adapter)
        shards = Shards(student) if ranks.is_rank() else None
        if shards is not None:
            shards.split(init_device_mesh("cpu", (ranks.number(),)))
            assert all(isinstance(one, DTensor) for one in student.parameters())
        module = StudentModule(student, rows, [], [], Optimisation(0, 0, 0, 1, 0, 1, 1), 64, shards=shards)
        module.manual_backward = torch.Tensor.backward  # type: ignore[assignment, method-assign]
        assert module._summed_gradients(rows, range(len(rows)), target_tokens(rows)) is not None
        passes = module._own_passes(rows)
        gradients |= {f"{adapter} {name}": whole(one.grad) for name, one in module.trained().items()}
    passed = ranks.merged({ranks.rank(): [[[rows[at].ids for at in micro], counts] for micro, counts in passes]})
    if ranks.rank() == 0:
        torch.save({"gradients": gradients, "passed": passed}, out)


@pytest.mark.peer
def test_gradients_in_shards_are_those_of_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    _sharded_gradients(tiny_llama, tmp_path / "one.pt")
    ranks.launch(_sharded_gradients, (tiny_llama, tmp_path / "two.pt"), 2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-6, atol=1e-6)
    first, second = two["passed"].values()
    assert [counts for _, counts in first] == [True] * len(first) and second[-1] == [first[0][0], False]
    counted = [ids for passes in (first, second) for micro, counts in passes if counts for ids in micro]
    assert len(first) == len(second) and sorted(counted) == sorted(row.ids for row in _rows()), "each row once"


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
    """Byte by byte where a step has two micro-batches, whose order is all that differs.

    A sweep that begins meanwhile says so and waits, and goes on where the other was killed.
    """
    words = [*small, "finetune=sft", *STEPS]
    alone = run("train", *words, cwd=tmp_path / "alone")
    both = [*words, "trainer=ddp", *ON_CPU, "trainer.devices=2"]
    killed = spawn("train", *both, cwd=tmp_path / "killed")
    scratch = tmp_path / "killed" / "artifacts" / ".partial" / "tuned"
    killed.until(lambda: bool(list(scratch.glob("*/scratch/step=*.ckpt"))))
    trainers = _ranks_of(killed)
    assert len(trainers) == 2
    sweep = ["-m", *both, "seed=0", "hydra.sweep.dir=sweep"]
    told = f"tuned/{alone.path.name} is being built by another process; waiting for it"
    with _suspended(trainers[-1]):
        waiting = spawn("train", *sweep, cwd=tmp_path / "killed", name="waiting")
        waiting.until(lambda: told in waiting.stream("stderr") or "building" in waiting.stream("stderr"))
        assert "building" not in waiting.stream("stderr")
        with _suspended(psutil.Process(waiting.process.pid)):
            trainers[-1].kill()
            outcome = killed.outcome()
            assert outcome.code == 2, outcome.stderr
            assert "of trainer.devices=2 ended (SIGKILL)" in outcome.errors[0]
            assert not psutil.pid_exists(trainers[0].pid)
            assert list(scratch.glob("*/scratch/step=*.ckpt"))
    again = waiting.outcome()
    assert (again.code, again.lines[0].rsplit("/", 1)[1]) == (0, alone.path.name), again.stderr
    assert again.built == [f"tuned/{alone.path.name}"]
    made = files_of(tmp_path / "alone" / "artifacts")
    assert made and made == files_of(tmp_path / "killed" / "artifacts")


@contextlib.contextmanager
def _suspended(process: psutil.Process) -> Iterator[None]:
    """Stopped, if it lives that long."""
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _ranks_of(command: Running) -> list[psutil.Process]:
    servers = [one for one in psutil.Process(command.process.pid).children() if "forkserver" in " ".join(one.cmdline())]
    return [rank for server in servers for rank in server.children()]


FULL = ["adapter=full", "finetune=sft", "finetune.learning_rate=1e-3"]
TAUGHT = ["finetune=logit_distill", "trainer.gradient_checkpointing=true", "finetune.keep=best"]


@pytest.mark.peer
@pytest.mark.parametrize("asked", [FULL, TAUGHT], ids=["full", "lora_with_a_teacher"])
def test_two_processes_train_in_shards_what_one_does_whole(small: list[str], tmp_path: Path, asked: list[str]) -> None:
    """To 1e-5, in files that stock code opens, also after a kill; one process goes on from what two have left."""
    words = [*small, *asked, *STEPS]
    alone = run("train", *words, cwd=tmp_path / "alone")
    both = [*words, "trainer=fsdp", *ON_CPU, "trainer.devices=2"]
    killed = spawn("train", *both, cwd=tmp_path / "killed")
    scratch = tmp_path / "killed" / "artifacts" / ".partial" / "tuned"
    killed.until(lambda: bool(list(scratch.glob("*/scratch/step=*.ckpt"))))
    killed.kill()
    shutil.copytree(tmp_path / "killed" / "artifacts", tmp_path / "narrower" / "artifacts")
    weights = [_weights(alone.path)]
    for cwd, again in (("killed", both), ("narrower", words)):
        outcome = run("train", *again, cwd=tmp_path / cwd)
        assert outcome.path.name == alone.path.name, outcome.stderr
        weights.append(_weights(outcome.path))
        history = [(path / "history.csv").read_text().splitlines() for path in (alone.path, outcome.path)]
        assert len(history[0]) == len(history[1]) == 7
    one, *others = map(load_file, weights)
    for other in others:
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-5)
    if asked is FULL:
        model = AutoModelForCausalLM.from_pretrained(weights[1].parent, use_safetensors=True)
        assert type(model).__name__ == "LlamaForCausalLM" and model.config.architectures == ["LlamaForCausalLM"]
        assert (weights[1].parent / "config.json").read_text() == (weights[0].parent / "config.json").read_text()


def _weights(artifact: Path) -> Path:
    (path,) = [*artifact.glob("checkpoint/model.safetensors"), *artifact.glob("adapter/adapter_model.safetensors")]
    return path


def _on_nodes(script: str, *words: str, cwd: Path) -> list[Running]:
    """The same command twice, as two machines would run it that share a folder; a device each."""
    commands, port = [], free_port()
    for node in range(2):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": node}.items():
                patch.setenv(name, str(value))
            commands.append(spawn(script, *words, "trainer.num_nodes=2", cwd=cwd, name=f"node{node}"))
    return commands


def _both(commands: list[Running]) -> Path:
    """The artifact that both say they have."""
    first, second = (command.outcome() for command in commands)
    assert first.path == second.path, second.stderr
    assert not second.built, "one holds the locks"
    return first.path


@pytest.mark.peer
def test_two_nodes_build_what_one_process_does(small: list[str], tmp_path: Path) -> None:
    """Byte by byte, also after a rank was killed, of which both commands tell; each has one device."""
    words = [*small, "metric=perplexity", "finetune=sft", *STEPS]
    cwd, scratch = tmp_path / "nodes", tmp_path / "nodes" / "artifacts" / ".partial" / "tuned"
    assert run("evaluate", *words, cwd=tmp_path / "alone").code == 0
    assert run("generate", *small, cwd=tmp_path / "alone").code == 0
    commands = _on_nodes("evaluate", *words, cwd=cwd)
    commands[0].until(lambda: bool(list(scratch.glob("*/scratch/step=*.ckpt"))))
    (trainer,) = _ranks_of(commands[1])
    trainer.kill()
    began = time.monotonic()
    first, second = (command.outcome() for command in commands)
    assert time.monotonic() - began < MOMENT
    assert (first.code, second.code, first.errors) == (2, 2, second.errors)
    assert "process 0 of trainer.devices=1 on node 1 ended (SIGKILL)" in first.errors[0]
    _both(_on_nodes("evaluate", *words, cwd=cwd))
    _both(_on_nodes("generate", *small, cwd=cwd))
    made = files_of(tmp_path / "alone" / "artifacts")
    assert {name.split("/")[0] for name in made} >= {"scores", "rewrites", "tuned", "evaluated"}
    assert files_of(cwd / "artifacts") == made


@pytest.mark.peer
@pytest.mark.parametrize("gone", [0, 1])
def test_two_nodes_train_in_shards_and_one_ends_with_the_other(small: list[str], tmp_path: Path, gone: int) -> None:
    """A command that SIGKILL ends closes nothing itself; the other says in one line that it is gone."""
    words = [*small, *FULL, *STEPS]
    shards = [*words, "trainer.strategy=fsdp"]
    scratch = tmp_path / "nodes" / "artifacts" / ".partial" / "tuned"
    commands = _on_nodes("train", *shards, cwd=tmp_path / "nodes")
    commands[0].until(lambda: bool(list(scratch.glob("*/scratch/step=*.ckpt"))))
    trainers = [rank for command in commands for rank in _ranks_of(command)]
    commands[gone].process.kill()
    began, other = time.monotonic(), commands[1 - gone].outcome()
    assert time.monotonic() - began < MOMENT
    assert (other.code, len(other.errors), other.stdout) == (2, 1, "")
    assert f"the command on node {gone} of trainer.num_nodes=2 is gone" in other.errors[0]
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in trainers)
    if gone == 0:
        return
    made = _both(_on_nodes("train", *shards, cwd=tmp_path / "nodes"))
    alone = run("train", *words, cwd=tmp_path / "alone").path
    assert made.name == alone.name
    one, two = (load_file(_weights(path)) for path in (alone, made))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)


# ---- without gradients ------------------------------------------------------------------------------------------


def _passes(folder: Path, texts: list[str], out: Path) -> None:
    """What every kind of pass comes to, as each rank has it; what can be gone on from is in files beside `out`."""
    parts.EVERY = 0.0
    checkpoint = Checkpoint(folder)
    model, tokenizer = checkpoint.model("float32"), checkpoint.tokenizer()
    rows = tokenize_texts(tokenizer, texts, 48)
    found: dict[str, Any] = {}
    for criterion in (Angular(), BlockInfluence()):
        criterion.start(4)
        show_texts(model, criterion, rows, 2)
        found[criterion.name] = criterion.scores()
    for removal in (Perplexity(), iterative("angular", depth=3), iterative("perplexity", depth=2)):
        removal.start(4)
        removal.measure(model, [Row(ids) for ids in rows], 2)
        found[f"removal {removal.name}"] = removal.scores()
    first = TaylorWidth().measure(model, rows, 100)
    second = SDM(0.1, alpha=0.4, temperature=0.5).measure(model, rows, 100, first)
    channels = {"taylor": first, "sdm": second, "activation": ActivationWidth().measure(model, rows, 100)}
    found |= {name: [block.tolist() for block in importance] for name, importance in channels.items()}
    pairs, kept = [(ids[:5], ids[5:]) for ids in rows], out.with_name(f"{out.name}-surprisals")
    found["surprisals"] = token_nll(model, pairs, 2, kept=kept)
    for keeps_all in (True, False):
        engine = HFEngine(max_new_tokens=6, temperature=0.7, batch_size=2)
        engine.take(model, tokenizer, None, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "keeps_all", lambda _, keeps_all=keeps_all: keeps_all)
            completions = list(engine.complete([Request(f"r{n}", text) for n, text in enumerate(texts)]))
        found[f"answers {keeps_all}"] = sorted((one.id, one.text, one.finish) for one in completions)
    harness = Harness(in_process(model, tokenizer, 2), tokenizer, max_new_tokens=6)
    for name, task in suite_tasks("tiny", ["arithmetic", "fact_choice", "nll"], "dev", 0, 9).items():
        harness.kept = out.with_name(f"{out.name}-{name}")
        found[name] = harness.run(task)
    out.with_suffix(f".{ranks.rank()}").write_text(json.dumps(found))


def test_shared_passes_come_to_what_one_process_has(
    tiny_llama: Path, conversations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit, in both ranks: a batch is what it was, and only who passes it differs. They go on from the
    likelihoods that one process has left, and each writes down its own."""
    monkeypatch.setattr(likelihoods, "SUBTREES", 1)
    monkeypatch.setattr(parts, "EVERY", 0.0)
    _passes(tiny_llama, conversations, tmp_path / "one")
    for name in ("surprisals", "fact_choice", "nll"):
        lines = (tmp_path / f"one-{name}.0.parts").read_text().split("\n")
        (tmp_path / f"two-{name}.0.parts").write_text("\n".join(lines[:2]))
        assert len(lines) > 3
    ranks.launch(_passes, (tiny_llama, conversations, tmp_path / "two"), 2)
    one, *two = ((tmp_path / name).read_text() for name in ("one.0", "two.0", "two.1"))
    assert two == [one, one]
    assert [len(list(tmp_path.glob(f"two-*.{rank}.parts"))) for rank in (0, 1)] == [4, 3], "answers are the first's"
    found = json.loads(one)
    assert len(found["fact_choice"]) == 9 and len({str(found[name]) for name in ("taylor", "sdm", "activation")}) == 3


MADE = {"scores": 3, "pruned": 3, "evaluated": 3, "answered": 2, "shifted": 1, "surprisals": 1, "drafted": 1}
MADE |= {"rewrites": 2, "targets": 3, "tuned": 1}
"""Artifacts of each stage."""


@pytest.mark.peer
def test_two_processes_build_what_one_does(small: list[str], tmp_path: Path) -> None:
    """Scores, rewrites, evaluations and analyses, byte by byte; jobs of a sweep one after another."""
    sweep = ["-m", "hydra.sweep.dir=sweep"]
    for devices in (1, 2):
        cwd, shared = tmp_path / str(devices), [*small, f"trainer.devices={devices}"]
        for script, words in (
            ("evaluate", [*sweep, "finetune=none", "metric=perplexity,angular"]),
            ("evaluate", ["finetune=none", "metric=taylor_width", "pruning=mlp20"]),
            ("evaluate", ["finetune=sft", "analysis=shift", "analysis.embedder=null"]),
            ("evaluate", ["finetune=none", "analysis=speculative", "analysis.repeats=0"]),
            ("generate", [*sweep, "engine.max_new_tokens=4,3"]),
        ):
            outcome = run(script, *shared, *words, cwd=cwd)
            assert (outcome.code, len(outcome.lines)) == (0, 2 if "-m" in words else 1), outcome.stderr
    one, two = (artifacts_of(tmp_path / name / "artifacts") for name in ("1", "2"))
    made = Counter(name.split("/")[0] for name in one)
    assert made == MADE
    assert {name: one[name]["files"] for name in one} == {name: two[name]["files"] for name in two}


def _fails(out: Path) -> None:
    ranks.told(b"")
    if ranks.rank() == 1:
        raise UserError("no room")
    ranks.told(b"")


def test_a_rank_that_waits_for_another_leaves_the_reason_to_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no room$"):
        ranks.launch(_fails, (tmp_path,), 2)


def _is_told_to_end(out: Path) -> None:
    ranks.told(b"")
    if ranks.rank() == 1:
        signal.signal(signal.SIGTERM, lambda *_: ranks.told(b"the end"))  # as Lightning does
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    else:
        ranks.told(b"gradients")


def test_a_rank_that_is_told_to_end_does(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^process 1 of trainer.devices=2 ended \(exit code 143\)"):
        ranks.launch(_is_told_to_end, (tmp_path,), 2)


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
