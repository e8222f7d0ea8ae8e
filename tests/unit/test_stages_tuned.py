"""The stage that tunes: which rows, which tokens, and that a killed run ends where an unbroken one does."""

import csv
import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdd.data.draws import split_rows
from sdd.errors import UserError
from sdd.finetuning import module
from sdd.finetuning.losses import LOSSES
from sdd.finetuning.module import StudentModule, labelled
from sdd.forward import chunks
from sdd.stages.runtime import Runtime
from sdd.stages.tuned import build as build_tuned
from sdd.stages.tuned import tokenized
from sdd.store import SCRATCH, Recipe
from sdd.store.files import read_jsonl, write_jsonl
from sdd.tiny.tasks import instances

# ---- rows -------------------------------------------------------------------------------------------------------


def test_training_rows_of_one_seed_are_nested() -> None:
    rows = [f"r{i}" for i in range(50)]
    samples = {n: split_rows(rows, 10, n, seed=3)[0] for n in (1, 8, 25, 40, None)}
    for n, sample in samples.items():
        assert sample == samples[None][:n]
        assert len(sample) == (40 if n is None else n)
    assert split_rows(rows, 10, 8, seed=3)[0] == samples[8]
    assert split_rows(rows, 10, 8, seed=4)[0] != samples[8]


def test_validation_rows_are_the_same_for_every_seed_and_size() -> None:
    rows = [f"r{i}" for i in range(50)]
    held_out = {tuple(split_rows(rows, 10, n, seed)[1]) for n in (1, 25, None) for seed in range(5)}
    assert len(held_out) == 1
    assert len(set(*held_out)) == 10
    assert set(*held_out) != set(rows[:10]) != set(rows[-10:])


@pytest.mark.parametrize("validation_rows", [0, 1, 10, 49])
def test_training_and_validation_never_overlap(validation_rows: int) -> None:
    rows = [f"r{i}" for i in range(50)]
    for seed in range(5):
        training, validation = split_rows(rows, validation_rows, None, seed)
        assert len(validation) == validation_rows
        assert sorted(training + validation) == sorted(rows)


def test_both_arms_get_the_same_rows() -> None:
    gold = [{"id": f"r{i}", "target": "a"} for i in range(30)]
    rewritten = [row | {"target": "b"} for row in gold]
    for seed in range(3):
        one, other = (split_rows(rows, 5, 12, seed) for rows in (gold, rewritten))
        assert [[row["id"] for row in part] for part in one] == [[row["id"] for row in part] for part in other]


# ---- tokens -----------------------------------------------------------------------------------------------------


def test_the_loss_is_taken_on_the_answer_and_its_end(tokenizer: Any) -> None:
    tasks = list(instances("pool", 4, 8))
    rows = [{"prompt": task.prompt, "target": task.gold} for task in tasks]
    kept, too_long = tokenized(tokenizer, rows, None, 256)
    assert too_long == 0
    ids, mask, labels = labelled(kept)
    for at, task in enumerate(tasks):
        whole = tokenizer.decode(ids[at][mask[at].bool()])
        assert whole == f"<|begin|><|user|>{task.prompt}<|end|><|assistant|>{task.gold}<|end|>"
        targets = labels[at][labels[at] != -100]
        assert tokenizer.decode(targets) == f"{task.gold}<|end|>"
        assert targets[-1] == tokenizer.eos_token_id


def test_training_reads_the_prompt_that_generation_is_asked_with(tokenizer: Any) -> None:
    from sdd.models.chats import chat_prompt_ids

    (row,), _ = tokenized(tokenizer, [{"prompt": "Sort: b a", "target": "a b"}], "Be brief.", 256)
    assert row.ids[: row.prompt_length] == chat_prompt_ids(tokenizer, "Sort: b a", "Be brief.")


def test_rows_over_the_limit_are_left_out_whole_and_counted(tokenizer: Any) -> None:
    rows = [{"prompt": "p", "target": "word " * n} for n in (1, 5, 50)]
    (short, middle, long), _ = tokenized(tokenizer, rows, None, 256)
    limit = len(middle.ids)
    kept, too_long = tokenized(tokenizer, rows, None, limit)
    assert (list(kept), too_long) == ([short, middle], 1)
    assert len(long.ids) > limit
    assert len(tokenized(tokenizer, rows, None, limit - 1)[0]) == 1


def test_arms_with_other_targets_keep_the_same_rows(tokenizer: Any) -> None:
    """A row goes by its reference; where only the target is too long, the reference stands in its place."""

    def arm(*lengths: int) -> list[dict[str, Any]]:
        references = [{"prompt": "p", "reference": "word " * n} for n in (1, 5, 50, 1)]
        return [row | {"target": "word " * n} for row, n in zip(references, lengths, strict=True)]

    references, rewrites = arm(1, 5, 50, 1), arm(5, 1, 1, 50)
    limit = len(tokenized(tokenizer, references, None, 256)[0][1].ids)
    found = [tokenized(tokenizer, rows, None, limit, same_rows=True) for rows in (references, rewrites)]
    assert [len(row.ids) <= limit for kept, _ in found for row in kept] == [True] * 6
    assert [left_out for _, left_out in found] == [1, 1]
    assert found[1][0][2] == found[0][0][2] == found[0][0][0], "the long rewrite gives way"
    assert tokenized(tokenizer, rewrites, None, limit)[1] == 1
    assert len(tokenized(tokenizer, rewrites, None, limit)[0]) == 3, "by targets, another row is left out"


def test_a_row_is_trained_on_after_the_turns_before_it(tokenizer: Any) -> None:
    before = [{"role": "system", "content": "Be brief."}]
    before += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello<|end|>"}]
    (row,), _ = tokenized(tokenizer, [{"prompt": "p", "target": "t", "before": before}], "Be long.", 256)
    whole = tokenizer.decode(row.ids)
    assert whole.endswith("<|user|>Hi<|end|><|assistant|>Hello<|end|><|end|><|user|>p<|end|><|assistant|>t<|end|>")
    assert "Be brief." in whole and "Be long." not in whole
    ending = tokenizer.convert_tokens_to_ids("<|end|>")
    assert row.ids.count(ending) == whole.count("<|end|>") - 1, "words of an earlier answer end no turn"
    assert tokenizer.decode(row.ids[row.prompt_length :]) == "t<|end|>"


# ---- runs -------------------------------------------------------------------------------------------------------

RUNTIME = Runtime(micro_batch_tokens=300, checkpoint_every=2)
FINETUNE = {
    "epochs": 2,
    "learning_rate": 1e-2,
    "batch_size": 4,
    "max_length": 256,
    "num_rows": 10,
    "validation_rows": 3,
    "warmup_share": 0.2,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
}
STEPS = 6
EVERY_LOSS = {name: 0.1 * number for number, name in enumerate(LOSSES, 1)}


def recipe(seed: int = 0, dropout: float = 0.0, **finetune: Any) -> Recipe:
    targets = Recipe("targets", 1, {"mode": "sft"}, {}, {})
    pruned = Recipe("pruned", 1, {"blocks": [1]}, {}, {})
    spec = {
        "adapter": {"rank": 4, "alpha": 8, "dropout": dropout, "targets": ["all-linear"]},
        "base_quantisation": None,
        "precision": "32",
        "finetune": FINETUNE | finetune,
        "system_prompt": None,
        "seed": seed,
    }
    return Recipe("tuned", 1, spec, {"targets": targets, "pruned": pruned}, {})


@pytest.fixture(scope="module")
def inputs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    targets = tmp_path_factory.mktemp("targets")
    rows = [{"id": task.id, "prompt": task.prompt, "target": task.reference} for task in instances("pool", 0, 16)]
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        row["rejected"] = other["target"]
    write_jsonl(targets / "train.jsonl", rows)
    pruned = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("cut") / "pruned")
    blocks = json.loads((pruned / "config.json").read_text())["num_hidden_layers"]
    (pruned / "pruning.json").write_text(json.dumps({"kept_blocks": list(range(blocks)), "removed_blocks": []}))
    return {"targets": targets, "pruned": pruned}


def tune(folder: Path, inputs: dict[str, Path], recipe: Recipe, runtime: Runtime = RUNTIME) -> dict[str, torch.Tensor]:
    (folder / SCRATCH).mkdir(parents=True, exist_ok=True)
    build_tuned(runtime, recipe, inputs, folder)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert set(a) == set(b)
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize(
    ("killed_at", "quantisation", "recompute", "loss", "scope"),
    [
        (3, None, False, {}, {}),
        (5, None, False, {}, {}),
        (5, "nf4", True, {}, {}),
        (5, None, True, {"temperature": 2.0, "ce_share": 0.5}, {}),
        (5, None, False, {"loss": EVERY_LOSS, "temperature": 2.0, "taid_start": 0.4}, {}),
        (5, None, True, {}, {"scope": "last", "blocks": 2}),
    ],
)
def test_a_resumed_run_is_bit_exact(
    killed_at: int,
    quantisation: str | None,
    recompute: bool,
    loss: dict[str, Any],
    scope: dict[str, Any],
    sharded_llama: Path,
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed between two checkpoints: steps are taken again, with dropout, momenta and rate as they were.

    The base in 4 bits is made again from the checkpoint, recomputed blocks draw their dropout again, and states of
    frozen blocks are made again: nothing is left of them, and a file that lies there is not read.
    """
    if quantisation:
        pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    runtime = dataclasses.replace(RUNTIME, gradient_checkpointing=recompute, sources={"teacher's": sharded_llama})
    asked = recipe(dropout=0.2)
    asked = dataclasses.replace(asked, spec=asked.spec | {"base_quantisation": quantisation})
    asked.spec["adapter"] |= scope
    if loss:
        asked.spec["distillation"] = {"teacher": "teacher's", "dtype": "float32", **loss}
    whole = tune(tmp_path / "whole", inputs, asked, runtime)
    taken: list[int] = []
    record = StudentModule._record

    def dying(self: StudentModule, step: int, loss: float, rate: float) -> None:
        if step == killed_at and killed_at not in taken:
            taken.append(step)
            raise KeyboardInterrupt
        taken.append(step)
        record(self, step, loss, rate)

    monkeypatch.setattr(StudentModule, "_record", dying)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        tune(tmp_path / "broken", inputs, asked, runtime)
    assert not (tmp_path / "broken" / "adapter").exists()
    (saved,) = (tmp_path / "broken" / SCRATCH).glob("*.ckpt")
    kept = torch.load(saved, weights_only=False)
    assert kept["state_dict"]
    assert all("lora_" in name for name in kept["state_dict"]), "the base and the teacher are not saved again"
    assert ("loss" in kept) == ("taid_start" in loss), "what a loss remembers is kept"
    assert [path.name for path in (tmp_path / "broken" / SCRATCH).iterdir()] == [saved.name]
    (tmp_path / "broken" / SCRATCH / "frozen").write_bytes(b"damaged")
    resumed = tune(tmp_path / "broken", inputs, asked, runtime)
    assert taken == [*range(1, killed_at + 1), *range(killed_at, STEPS + 1)], "it did not go on from its checkpoint"
    assert same(resumed, whole)
    histories = [(tmp_path / name / "history.csv").read_text() for name in ("whole", "broken")]
    assert histories[0] == histories[1]


def test_what_the_student_wrote_for_steps_to_come_outlives_a_kill(
    sharded_llama: Path,
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed in the second window of three steps, after a checkpoint within it; one with other tokens is none."""
    runtime = dataclasses.replace(RUNTIME, sources={"teacher's": sharded_llama})
    asked = recipe(dropout=0.2)
    rollouts = {"student_share": 0.8, "rollout_tokens": [3, 8], "rollout_steps": 3, "rollout_temperature": 1.0}
    taught = {"teacher": "teacher's", "dtype": "float32", "temperature": 1.0, "ce_share": 0.0}
    asked.spec["distillation"] = taught | {"rollouts": rollouts}
    whole = tune(tmp_path / "whole", inputs, asked, runtime)
    assert re.search(r"loss=\S+, rollout=[1-9]\d*tok/s, training=[1-9]\d*tok/s", capsys.readouterr().err)
    saved = break_off(tmp_path / "broken", inputs, asked, monkeypatch, runtime)
    content = torch.load(saved, weights_only=True)
    written = content["rollouts"]["written"]
    assert {at for at, *_ in written} == {3, 4, 5}
    assert all(type(number) is int for row in written for number in row)
    torch.save(content | {"rollouts": {"written": [[*written[0][:-1], 768], *written[1:]]}}, saved.with_name("a.ckpt"))
    assert same(tune(tmp_path / "broken", inputs, asked, runtime), whole)
    assert "'a.ckpt' in" in caplog.text
    histories = [(tmp_path / name / "history.csv").read_text() for name in ("whole", "broken")]
    assert histories[0] == histories[1]
    rows = list(csv.DictReader(histories[0].splitlines()))
    assert [row["rollout_staleness"] for row in rows] == ["0", "1", "2"] * 2
    assert [row["rollout_limit"] for row in rows] == ["3"] * 3 + ["8"] * 3
    assert all(bool(row["golden_loss"]) == bool(row["validation_loss"]) for row in rows)
    assert rows[-1]["golden_loss"] != rows[-1]["validation_loss"]


def test_the_best_student_is_kept_and_is_the_same_after_a_kill(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate that is too high, the student is worse in the end than it was before; killed after its best."""
    asked, record = recipe(keep="best", learning_rate=0.2, warmup_share=0.9), StudentModule._record
    seen: dict[int, dict[str, torch.Tensor]] = {}
    dies = [5]

    def noting(self: StudentModule, step: int, loss: float, rate: float) -> None:
        if [step] == dies:
            raise KeyboardInterrupt
        record(self, step, loss, rate)
        seen[step] = {name: p.detach().clone() for name, p in self.trained().items()}

    monkeypatch.setattr(StudentModule, "_record", noting)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        tune(tmp_path / "broken", inputs, asked)
    dies.clear()
    resumed, whole = (tune(tmp_path / name, inputs, asked) for name in ("broken", "whole"))
    with (tmp_path / "whole" / "history.csv").open(newline="") as file:
        losses = {int(row["step"]): float(row["validation_loss"]) for row in csv.DictReader(file)}
    best = min(losses, key=lambda step: losses[step])
    assert best < 5 < STEPS, losses
    assert json.loads((tmp_path / "whole" / "rows.json").read_text())["kept_step"] == best
    for name, tensor in seen[best].items():
        assert torch.equal(tensor, whole[name.removeprefix("student.").replace(".default", "")])
    assert not torch.equal(seen[best][name], seen[STEPS][name])
    assert same(resumed, whole)
    for name in ("history.csv", "rows.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("epochs", [1, 2])
def test_states_of_frozen_blocks_are_kept_for_a_second_epoch_and_change_no_bit(
    epochs: int, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row at a time, so that both pass them in the same shapes."""
    runtime = dataclasses.replace(RUNTIME, micro_batch_tokens=1)
    asked = recipe(dropout=0.2, epochs=epochs)
    asked.spec["adapter"] |= {"scope": "last", "blocks": 2}
    kept: list[bool] = []
    original = module.frozen_states

    def noting(*words: Any) -> Any:
        states = original(*words)
        kept.append(states is not None)
        return states

    monkeypatch.setattr(module, "frozen_states", noting)
    one = tune(tmp_path / "kept", inputs, asked, runtime)
    assert kept == [True] * (epochs - 1), "one epoch reads nothing twice"
    monkeypatch.setattr(chunks, "KEPT_STATES", 0)
    assert same(one, tune(tmp_path / "passed", inputs, asked, runtime))
    assert kept == [True, False] * (epochs - 1)
    histories = [(tmp_path / name / "history.csv").read_text() for name in ("kept", "passed")]
    assert histories[0] == histories[1]


def test_the_seed_decides_the_adapter(inputs: dict[str, Path], tmp_path: Path) -> None:
    one, again, other = (
        tune(tmp_path / name, inputs, recipe(seed)) for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert same(one, again)
    assert (tmp_path / "one" / "history.csv").read_text() == (tmp_path / "again" / "history.csv").read_text()
    assert not any(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_micro_batch_is_no_part_of_the_result(inputs: dict[str, Path], tmp_path: Path) -> None:
    adapters = [
        tune(tmp_path / str(tokens), inputs, recipe(), dataclasses.replace(RUNTIME, micro_batch_tokens=tokens))
        for tokens in (1, 4096)
    ]
    losses = []
    for tokens in (1, 4096):
        with (tmp_path / str(tokens) / "history.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], atol=2e-3), name


def test_what_an_artifact_holds(inputs: dict[str, Path], tmp_path: Path) -> None:
    tune(tmp_path, inputs, recipe())
    facts = json.loads((tmp_path / "rows.json").read_text())
    assert len(facts["ids"]) == facts["trained"] == 10
    assert (facts["validation"], facts["validation_over_max_length"]) == (3, 0)
    with (tmp_path / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [int(row["step"]) for row in history] == list(range(1, STEPS + 1))
    assert float(history[-1]["loss"]) < float(history[0]["loss"])
    assert float(history[-1]["epoch"]) == 2.0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"pruned/{inputs['pruned'].name}", "no path of this machine"
    assert (tmp_path / "learning_curve.png").stat().st_size > 0


def test_validation_rows_over_the_limit_are_counted_and_told(
    inputs: dict[str, Path], tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = list(read_jsonl(inputs["targets"] / "train.jsonl"))
    _, held_out = split_rows(rows, 3, 10, seed=0)
    lengths = sorted(len(row.ids) for row in tokenized(tokenizer, held_out, None, 256)[0])
    assert lengths[0] < lengths[-1]
    limit = lengths[-1] - 1
    over = sum(length > limit for length in lengths)
    tune(tmp_path, inputs, recipe(max_length=limit))
    facts = json.loads((tmp_path / "rows.json").read_text())
    assert (facts["validation"], facts["validation_over_max_length"]) == (3 - over, over)
    assert f"{over} of 3 validation rows are over finetune.max_length and left out" in caplog.text


def test_a_limit_under_every_row_is_a_users_mistake(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.max_length=8 is shorter than every training row"):
        tune(tmp_path, inputs, recipe(max_length=8))


def test_unknown_adapter_targets_are_a_users_mistake(inputs: dict[str, Path], tmp_path: Path) -> None:
    wrong = recipe()
    wrong.spec["adapter"]["targets"] = ["nowhere_proj"]
    with pytest.raises(UserError, match=r"adapter\.targets=\['nowhere_proj'\]") as caught:
        tune(tmp_path, inputs, wrong)
    assert "\n" not in str(caught.value)


# ---- checkpoints ------------------------------------------------------------------------------------------------


def break_off(
    folder: Path, inputs: dict[str, Path], recipe: Recipe, patch: pytest.MonkeyPatch, runtime: Runtime = RUNTIME
) -> Path:
    """The last checkpoint, of step 4, of a run that ends in its fifth step."""
    record = StudentModule._record

    def dying(self: StudentModule, step: int, loss: float, rate: float) -> None:
        if step == 5:
            raise KeyboardInterrupt
        record(self, step, loss, rate)

    with patch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(StudentModule, "_record", dying)
        tune(folder, inputs, recipe, runtime)
    return folder / SCRATCH / "step=4.ckpt"


def test_no_run_goes_on_from_anothers_checkpoint(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither from one in the working folder, where Lightning looks under Slurm, nor from one in its own scratch."""
    saved = break_off(tmp_path / "other", inputs, recipe(seed=1), monkeypatch)
    whole = tune(tmp_path / "whole", inputs, recipe())
    shutil.copyfile(saved, tmp_path / "hpc_ckpt_1.ckpt")
    monkeypatch.chdir(tmp_path)
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "arm"}.items():
        monkeypatch.setenv(name, value)
    assert same(tune(tmp_path / "beside", inputs, recipe()), whole)
    for name in ("step=4.ckpt", "hpc_ckpt_1.ckpt"):
        scratch = tmp_path / f"with {name}" / SCRATCH
        scratch.mkdir(parents=True)
        shutil.copyfile(saved, scratch / name)
        assert same(tune(scratch.parent, inputs, recipe()), whole)
        assert f"'{name}' in {scratch} is no checkpoint of this run, or damaged; it is removed" in caplog.text


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_fault_of_the_machine_costs_no_checkpoint(
    error: Exception, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = break_off(tmp_path, inputs, recipe(), monkeypatch)

    def failing(*words: Any, **named: Any) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(torch, "load", failing)
        with pytest.raises(type(error)):
            tune(tmp_path, inputs, recipe())
    assert saved.is_file()


def test_a_checkpoint_that_does_not_fit_its_run_is_no_checkpoint(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged, cut short, or holding something else than this run would have left: each is removed, none is opened."""
    from sdd.finetuning.module import read_checkpoint

    saved = break_off(tmp_path, inputs, recipe(), monkeypatch)
    content = torch.load(saved, weights_only=True)
    name, tensor = next(iter(content["state_dict"].items()))
    known = {"run": recipe().address, "plan": range(STEPS), "rollouts": None, "loss_state": dict}
    module = SimpleNamespace(**known, trained=lambda: content["state_dict"])
    assert read_checkpoint(saved, module) is not None  # type: ignore[arg-type]
    moments = content["optimizer_states"][0]["state"]
    wrong = [
        {"run": "another"},
        {"global_step": 3},
        {"history": content["history"][1:]},
        {"history": None},
        {"loss": {"t": 0.5}},
        {"loss": [0.5]},
        {"state_dict": {}},
        {"state_dict": content["state_dict"] | {name: tensor[:1]}},
        {"state_dict": content["state_dict"] | {"more": tensor}},
        {"optimizer_states": []},
        {"optimizer_states": [{"state": moments | {0: {"exp_avg": tensor[:1]}}}]},
    ]
    for change in wrong:
        torch.save(content | change, tmp_path / "wrong.ckpt")
        assert read_checkpoint(tmp_path / "wrong.ckpt", module) is None, change  # type: ignore[arg-type]
    (tmp_path / "cut.ckpt").write_bytes(saved.read_bytes()[:2000])
    (tmp_path / "link.ckpt").symlink_to(saved)
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "empty.ckpt").touch()
    for kind in ("cut", "empty", "link", "pipe", "folder"):
        assert read_checkpoint(tmp_path / f"{kind}.ckpt", module) is None, kind  # type: ignore[arg-type]


def test_one_that_lightning_cannot_take_over_ends_in_a_line_and_is_gone(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = break_off(tmp_path, inputs, recipe(), monkeypatch)
    content = torch.load(saved, weights_only=True)
    torch.save(content | {"loops": {"fit_loop": {}}}, saved)
    with pytest.raises(UserError, match=r"step=4\.ckpt: training cannot go on from it \(ValueError\); it is removed"):
        tune(tmp_path, inputs, recipe())
    assert not saved.exists()
    assert same(tune(tmp_path, inputs, recipe()), tune(tmp_path / "whole", inputs, recipe()))


@pytest.mark.parametrize("where", ["local", "above"])
def test_what_a_checkpoint_names_is_not_removed(
    where: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's callback removes what it remembers as the last checkpoint once there is a new one."""
    mine = tmp_path / "mine"
    mine.mkdir()
    saved = break_off(tmp_path / "run", inputs, recipe(), monkeypatch)
    key = f"ModelCheckpoint{ {'monitor': None, 'mode': 'min', 'every_n_train_steps': 2, 'every_n_epochs': 0} }"
    key = key.replace("}", ", 'train_time_interval': None}")
    named = {"local": f"local://{mine}", "above": str(saved.parent / ".." / ".." / "mine")}[where]
    content = torch.load(saved, weights_only=True)
    state = {"best_model_path": named, "best_model_score": None, "dirpath": "/elsewhere"}
    torch.save(content | {"callbacks": {key: state}}, saved)
    tune(tmp_path / "run", inputs, recipe())
    assert mine.is_dir()


class Hostile:
    """A pickle that makes a folder where it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("kind", ["pickle", "legacy", "archive"])
def test_a_strangers_checkpoint_runs_nothing(kind: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    path, canary = tmp_path / SCRATCH / "step=4.ckpt", tmp_path / "canary"
    path.parent.mkdir(parents=True)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(canary), protocol=2))
    else:
        content = {"state_dict": {}, "global_step": 4, "history": Hostile(canary)}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(UserError, match=r"step=4\.ckpt is no checkpoint of plain tensors and is not opened"):
        tune(tmp_path, inputs, recipe())
    assert not canary.exists()
