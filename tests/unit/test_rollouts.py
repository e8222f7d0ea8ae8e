"""The student's own answers in place of targets: whose, how long, how they end, and what one step learns from them."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model

from sdd.finetuning.losses.weighted import built
from sdd.finetuning.module import Optimisation, StudentModule, TrainingRow
from sdd.finetuning.rollouts import LOOP, REPEATS, Policy, Rollouts, loop_ends, looped
from sdd.forward.decoding import Ending
from sdd.models.checkpoints import Checkpoint
from sdd.rewriting.engines import GumbelNoise, HFEngine, Request

STOPS = [2, *range(7, 256, 31)]
SEED, TEMPERATURE = 3, 0.9
LENGTHS = [(5, 9), (3, 4), (8, 30), (2, 3), (6, 17), (4, 22)]

# ---- loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([1, 2, *[7] * 16], [1, 2, 7, 7]),
        ([1, 2, *[7] * 15], None),
        ([1, 2, *[7, 8] * 8], [1, 2, 7, 8, 7]),
        ([1, 2, *[7, 8] * 7, 7], None),
        ([*[7, 8] * 8, 7], [7, 8, 7]),
        ([5, *range(10, 20), *[*range(20, 30)] * REPEATS], [5, *range(10, 20), *range(20, 30), 20]),
        ([*range(100)], None),
        ([*[7] * 40, 8], None),
        ([], None),
    ],
)
def test_a_loop_is_cut_where_it_turns_back(tokens: list[int], kept: list[int] | None) -> None:
    cut = looped(tokens)
    assert (None if cut is None else tokens[:cut]) == kept


def test_the_first_loop_ends_an_answer_however_many_tokens_come_at_once() -> None:
    tokens = [1, 2, 3, *[7, 8] * 12, 9, 9]
    closed = next(end for end in range(len(tokens)) if looped(tokens[:end]) is not None)
    assert closed == 3 + LOOP
    for fresh in (1, 4, closed):
        assert loop_ends(tokens[:closed], fresh) == loop_ends(tokens[: closed + 3], fresh + 3) == 6
        assert loop_ends(tokens[: closed - 1], fresh - 1) is None
    assert loop_ends(tokens, len(tokens)) == 6


# ---- which rows, how long ---------------------------------------------------------------------------------------


def test_rollouts_grow_from_short_to_long_over_the_first_half() -> None:
    policy = Policy(1.0, (16, 96), 1, 0, steps=20)
    lengths = [policy.longest(step) for step in range(20)]
    assert lengths == [16, 24, 32, 40, 48, 56, 64, 72, 80, 88, *[96] * 10]
    by_three = Policy(1.0, (16, 96), 3, 0, steps=20)
    assert [by_three.longest(step) for step in range(20)] == [lengths[step // 3 * 3] for step in range(20)]


def test_a_larger_share_adds_to_a_smaller_one() -> None:
    few, more, all_of_them, none = (Policy(share, (4, 4), 1, 5, 10) for share in (0.25, 0.5, 1.0, 0.0))
    counts = [0, 0]
    for step in range(40):
        drawn = few.drawn(step, 16), more.drawn(step, 16)
        assert set(drawn[0]) <= set(drawn[1])
        counts = [count + len(places) for count, places in zip(counts, drawn, strict=True)]
        assert (all_of_them.drawn(step, 16), none.drawn(step, 16)) == ([*range(16)], [])
    assert 110 < counts[0] < 210 < 270 < counts[1] < 370
    assert [few.drawn(step, 16) for step in range(9)] != [Policy(0.25, (4, 4), 1, 6, 10).drawn(s, 16) for s in range(9)]


# ---- steps ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[TrainingRow]:
    rng = random.Random(0)
    return [TrainingRow([1, *(rng.randint(6, 250) for _ in range(whole - 1))], prompt) for prompt, whole in LENGTHS]


@pytest.fixture(scope="module")
def teacher(sharded_llama: Path) -> Any:
    return Checkpoint(sharded_llama).model("float32").requires_grad_(False)


def adapted(folder: Path) -> Any:
    """A student whose adapter says something already, with dropout."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    student = get_peft_model(Checkpoint(folder).model("float32"), config)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return student


class Tokenizer:
    pad_token_id, eos_token_id = 0, 2


def sampler(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> Any:
    """The engine's own, with the stops of this file; notes how many rows it is asked for."""
    monkeypatch.setattr(HFEngine, "stops", STOPS)

    def sample(
        model: Any, prompts: Sequence[list[int]], names: Sequence[str], limit: int, ending: Ending
    ) -> Iterator[tuple[int, list[int]]]:
        assert not model.training
        calls.append(len(prompts))
        engine = HFEngine(max_new_tokens=limit, temperature=TEMPERATURE, seed=SEED)
        engine.take(model, Tokenizer(), None, 3)
        return engine.continued(prompts, names, ending)

    return sample


@torch.no_grad()
def said(student: Any, prompt: list[int], name: str, limit: int) -> list[int]:
    """A token at a time, each from a whole pass and its own noise; up to a stop, a loop or the limit."""
    tokens: list[int] = []
    noise = GumbelNoise(SEED, [Request(name, "")])
    for number in range(limit):
        logits = student(input_ids=torch.tensor([prompt + tokens])).logits[:, -1]
        tokens.append(int(noise.added(logits / TEMPERATURE, [(0, number)]).argmax()))
        if tokens[-1] in STOPS:
            return tokens
        if (cut := looped(tokens)) is not None:
            return tokens[:cut]
    return tokens


class Gradients(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.student.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trained(module: StudentModule) -> list[dict[str, torch.Tensor]]:
    gradients = Gradients()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_steps=len(module.plan), max_epochs=-1, callbacks=[gradients], **quiet)
    trainer.fit(module)
    return gradients.steps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_step_learns_what_the_teacher_says_of_the_students_own_samples(
    beta: float, tiny_llama: Path, teacher: Any, rows: list[TrainingRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against samples drawn one token a pass and a divergence over all probabilities; one row keeps its target."""
    student, plan = adapted(tiny_llama), [[0, 1, 2, 3, 4]]
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    policy, calls = Policy(0.8, (12, 12), 1, 3, steps=1), []
    drawn = policy.drawn(0, 5)
    assert len(drawn) == 4, "the case needs a row that keeps its target"
    rollouts = Rollouts(policy, rows, plan, 18, STOPS, sampler(monkeypatch, calls))
    expected = []
    for place, index in enumerate(plan[0]):
        row, prompt = rows[index], rows[index].ids[: rows[index].prompt_length]
        limit = min(12, 18 - len(prompt))
        own = TrainingRow(prompt + said(student, prompt, f"0 {place}", limit), len(prompt))
        expected.append(own if place in drawn else row)
    total, count = torch.zeros(()), 0
    for row in expected:
        logits, others = (
            model(input_ids=torch.tensor([row.ids])).logits[0, row.prompt_length - 1 : -1]
            for model in (student, teacher)
        )
        q, p = logits.softmax(-1), others.softmax(-1)
        m = p if beta == 1 else beta * p + (1 - beta) * q
        share = 1.0 if beta == 1 else 1 - beta
        total = total + beta * (p * (p / m).log()).sum() + share * (q * (q / m).log()).sum()
        count += len(q)
    named = {name: one for name, one in student.named_parameters() if one.requires_grad}
    gradients = dict(zip(named, torch.autograd.grad(total / count, list(named.values())), strict=True))
    optimisation = Optimisation(1e-2, 0.0, 0.25, 1e9, 0, 1, 1)
    loss = built({"reverse_kl": 1.0} if beta == 1 else {"jsd": 1.0}, {"jsd_beta": beta}, teacher)
    module = StudentModule(student, rows, plan, rows[5:], optimisation, 64, loss=loss, rollouts=rollouts)
    (found,) = trained(module)
    assert module.student.training
    assert [len(rollouts.written[0, place]) for place in drawn] == [
        len(expected[place].ids) - expected[place].prompt_length for place in drawn
    ]
    assert calls == [4, 1], "the step's own rows, and the held-out one"
    history = module.history[0]
    assert history["loss"] == pytest.approx(float(total) / count, rel=1e-4)
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3
    lengths = [len(rollouts.written[0, place]) for place in drawn]
    stopped = [rollouts.written[0, place][-1] in STOPS for place in drawn]
    assert (history["rollouts"], history["rollout_tokens"]) == (4, sum(lengths) / 4)
    assert history["rollout_stopped"] == sum(stopped) / 4
    assert 0 < history["rollout_stopped"] < 1, "the case has both"
    assert (history["rollout_limit"], history["rollout_staleness"], history["rollout_cut"]) == (12, 0, 0)


@pytest.mark.filterwarnings("ignore")
def test_both_what_is_trained_and_the_held_out_targets_are_validated(
    tiny_llama: Path, teacher: Any, rows: list[TrainingRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a teacher that is hacked the divergence on own answers falls, and the cross-entropy on targets rises."""
    plan, held_out = [[0, 1], [2, 3]], rows[4:]
    rollouts = Rollouts(Policy(1.0, (2, 9), 1, 1, 2), rows, plan, 40, STOPS, sampler(monkeypatch, []))
    optimisation = Optimisation(1e-2, 0.0, 0.25, 1e9, 0, 2, 2)
    loss = built({"jsd": 1.0}, {}, teacher)
    module = StudentModule(adapted(tiny_llama), rows, plan, held_out, optimisation, 64, loss=loss, rollouts=rollouts)
    trained(module)
    student = module.student.eval()
    own = [
        TrainingRow(prompt + said(student, prompt, f"held out {index}", 9), len(prompt))
        for index, prompt in enumerate(row.ids[: row.prompt_length] for row in held_out)
    ]
    with torch.no_grad():
        total, count = loss(module.causal_lm, own)
        ids = [torch.tensor([row.ids]) for row in held_out]
        logs = [student(input_ids=one).logits[0].log_softmax(-1)[:-1].gather(1, one[0, 1:, None])[:, 0] for one in ids]
    golden = torch.cat([-log[row.prompt_length - 1 :] for log, row in zip(logs, held_out, strict=True)])
    assert module.history[-1]["validation_loss"] == pytest.approx(float(total) / count, rel=1e-4)
    assert module.history[-1]["golden_loss"] == pytest.approx(float(golden.mean()), rel=1e-4)


def test_answers_of_a_window_are_written_at_once_by_the_student_as_it_then_is(
    tiny_llama: Path, rows: list[TrainingRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, calls = adapted(tiny_llama).train(), []
    plan = [[0, 1], [2, 3], [4, 5], [0, 3], [1, 2]]
    rollouts = Rollouts(Policy(1.0, (4, 8), 2, 1, 5), rows, plan, 40, STOPS, sampler(monkeypatch, calls))
    model = student.get_base_model()
    first = rollouts.step_rows(model, 0)
    assert model.training
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    written = [rollouts.step_rows(model, step) for step in range(5)]
    assert written[0] == first
    assert calls == [4, 4, 2]
    assert [rollouts.policy.longest(step) for step in range(5)] == [4, 4, 7, 7, 8]
    assert rollouts.facts(4)["rollout_staleness"] == 0
    other = Rollouts(rollouts.policy, rows, plan, 40, STOPS, rollouts.sample)
    assert other.step_rows(model, 1) != written[1], "another student"
    assert other.facts(1)["rollout_staleness"] == 1


def test_what_is_left_of_a_window_is_kept_and_nothing_else_is_taken_for_it(
    tiny_llama: Path, rows: list[TrainingRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = adapted(tiny_llama).get_base_model(), []
    plan = [[0, 1], [2, 3], [4, 5], [0, 3]]
    policy, sample = Policy(0.7, (4, 8), 3, 4, 4), sampler(monkeypatch, calls)
    rollouts, resumed = (Rollouts(policy, rows, plan, 40, STOPS, sample) for _ in range(2))
    written = [rollouts.step_rows(model, step) for step in range(3)]
    state = rollouts.state(2)
    assert rollouts.state(3) == {}
    assert resumed.fits(state, 2, 768)
    assert resumed.fits({}, 3, 768)
    resumed.load(state, 2)
    assert resumed.step_rows(None, 2) == written[2]
    assert resumed.facts(2) == rollouts.facts(2)
    assert len(calls) == 1
    lists = state["written"]
    first, *rest = lists
    wrong = [lists[1:], lists[::-1], [first[:2], *rest], [[*first, 768], *rest], [[*first[:-1], -1], *rest]]
    wrong += [[[*first[:-1], True], *rest], [[*first[:2], *[5] * 9], *rest], [[9, *first[1:]], *rest]]
    for one in wrong:
        assert not resumed.fits({"written": one}, 2, 768), one
    assert not resumed.fits(state, 3, 768)


def test_without_a_share_the_rows_are_those_of_the_plan(rows: list[TrainingRow]) -> None:
    plan = [[0, 1, 2], [3, 4, 5]]
    rollouts = Rollouts(Policy(0.0, (4, 8), 2, 1, 2), rows, plan, 40, STOPS, lambda *words: pytest.fail("asked"))
    assert [rollouts.step_rows(None, step) for step in range(2)] == [[rows[i] for i in step] for step in plan]
    nothing = {"rollouts": 0, "rollout_tokens": None, "rollout_stopped": None, "rollout_cut": None}
    assert rollouts.facts(1) == nothing | {"rollout_limit": 4, "rollout_staleness": 1}
