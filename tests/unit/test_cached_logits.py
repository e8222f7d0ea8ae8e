"""The teacher's logits from files: the online loss where all is kept, no bias where tokens are drawn."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from sdd.errors import UserError
from sdd.finetuning.losses import LOSSES, bytes_a_token
from sdd.finetuning.losses.cached import Cache, coded, decoded, drawn, from_drawn, from_likeliest, likeliest
from sdd.finetuning.losses.forward_kl import ForwardKL
from sdd.finetuning.losses.weighted import built
from sdd.finetuning.module import TrainingRow
from sdd.finetuning.rows import KeptRows
from sdd.models.checkpoints import Checkpoint
from sdd.stages import taught, tuned
from sdd.stages.runtime import Runtime
from sdd.store import SCRATCH, Recipe
from sdd.store.files import write_jsonl
from sdd.tiny.tasks import instances

VOCABULARY = 40


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Of a student and a teacher at 6 tokens, and these tokens; two of them are unlikely."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, VOCABULARY, generator=draw) for _ in range(2))
    return student, teacher, torch.cat([teacher.argmax(-1)[:4], teacher.argmin(-1)[4:]])


def gradient(losses: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(losses.sum(), logits)[0]


# ---- the likeliest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.needs == "teacher logits"])
def test_with_the_whole_vocabulary_it_is_the_loss_on_logits(
    name: str, temperature: float, logits: tuple[Tensor, ...]
) -> None:
    student, teacher, targets = logits
    ((_, term),) = built({name: 1.0}, {"temperature": temperature}).terms
    kept_at = getattr(term, "temperature", 1.0)
    tokens, nats = likeliest(teacher, VOCABULARY, kept_at)
    student = student.clone().requires_grad_()
    found = from_likeliest(term, student, targets, tokens, decoded(coded(nats, 32)))
    expected = term.per_token(student, teacher, targets)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient(found, student), gradient(expected, student), atol=1e-6)


def test_other_tokens_are_one_class_by_hand(logits: tuple[Tensor, ...]) -> None:
    student, teacher, targets = (each.double() if each.is_floating_point() else each for each in logits)
    tokens, nats = likeliest(teacher, 3)
    found = from_likeliest(ForwardKL(), student, targets, tokens, decoded(coded(nats, 32)))
    p, q = teacher.softmax(-1), student.softmax(-1)
    for row in range(len(targets)):
        best = p[row].argsort(descending=True)[:3]
        own, other = (torch.cat([each[row, best], 1 - each[row, best].sum(0, keepdim=True)]) for each in (p, q))
        assert found[row].item() == pytest.approx(float((own * (own / other).log()).sum()), rel=1e-4)
    whole = ForwardKL().per_token(student, teacher, targets)
    assert (found < whole).all(), "classes put together are less apart"


@pytest.mark.parametrize(("bits", "relative"), [(8, 0.06), (16, 3e-4), (32, 1e-6)])
def test_probabilities_in_few_bits(bits: int, relative: float) -> None:
    p = torch.tensor([[0.9, 0.09, 0.009, 0.001], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    codes = coded(-p.log(), bits)
    assert codes.itemsize == bits // 8
    found = decoded(codes).exp()
    assert torch.allclose(found, p, rtol=1.5 * relative, atol=1e-12)
    assert torch.allclose(found.sum(-1), torch.ones(3))


# ---- drawn ones -------------------------------------------------------------------------------------------------


def test_drawn_tokens_teach_without_bias_and_the_likeliest_alone_do_not(logits: tuple[Tensor, ...]) -> None:
    """The mean gradient of 4,000 draws of 4 tokens is forward KL's, within its error; that of the 4 likeliest made to
    sum to 1 is off by far more. With the rest as one class it is right where it says something: on the 4 themselves."""
    student, teacher, targets = logits
    student = student.clone().requires_grad_()
    expected = gradient(ForwardKL().per_token(student, teacher, targets), student)
    value = ForwardKL().per_token(student, teacher, targets).detach()
    many, k = 4000, 4
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(0)).random((many * 6, k)))
    shown = student.detach().repeat(many, 1).requires_grad_()
    tokens, entropy = drawn(teacher.repeat(many, 1), uniform)
    losses = from_drawn(1.0, shown, tokens, entropy.float())
    each = gradient(losses, shown).view(many, 6, VOCABULARY)
    error = each.std(0) / many**0.5
    assert ((each.mean(0) - expected).abs() <= 5 * error + 2e-4).all(), "some tokens are never drawn"
    assert float((each.mean(0) - expected).abs().max()) < 0.01
    spread = losses.detach().view(many, 6)
    assert ((spread.mean(0) - value).abs() <= 5 * spread.std(0) / many**0.5).all(), "nor is the value off"
    best, nats = likeliest(teacher, k)
    alone = (-nats[:, :-1]).log_softmax(-1)
    naive = -(alone.exp() * student.log_softmax(-1).gather(-1, best)).sum(-1)
    assert float((gradient(naive, student) - expected).abs().max()) > 0.05
    whole = from_likeliest(ForwardKL(), student, targets, best, decoded(coded(nats, 32)))
    on_kept = gradient(whole, student).gather(-1, best)
    assert torch.allclose(on_kept, expected.gather(-1, best), atol=1e-5)


def test_a_certain_teacher_is_drawn_as_it_is() -> None:
    tokens, entropy = drawn(torch.tensor([[0.0, 900.0, 0.0]]), torch.tensor([[0.0, 0.999999]]))
    assert tokens.tolist() == [[1, 1]]
    assert entropy.item() == 0


# ---- the stage --------------------------------------------------------------------------------------------------

TEXTS = list(instances("pool", 1, 9))
LONGEST = 120


def recipe(**spec: Any) -> Recipe:
    plain = {"model": "teacher's", "dtype": "float32", "system_prompt": None, "max_length": LONGEST}
    targets = Recipe("targets", 1, {"mode": "logit_distill"}, {}, {})
    return Recipe("taught", 1, plain | spec, {"targets": targets}, {})


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows, of which the third is over the limit."""
    folder = tmp_path_factory.mktemp("targets")
    rows = [{"id": task.id, "prompt": task.prompt, "target": task.reference} for task in TEXTS]
    rows[2]["target"] = "word " * LONGEST
    write_jsonl(folder / "train.jsonl", rows)
    return folder


def build(folder: Path, targets: Path, teacher: Path, batch: int = 32, **spec: Any) -> Path:
    runtime = Runtime(sources={"teacher's": teacher}, inference_batch_size=batch)
    folder.mkdir(exist_ok=True)
    taught.build(runtime, recipe(**spec), {"targets": targets}, folder)
    return folder


@pytest.fixture
def few_rows_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdd.finetuning.losses import cached

    monkeypatch.setattr(cached, "ROWS", 4)


@pytest.mark.usefixtures("few_rows_a_shard")
def test_a_student_learns_from_files_what_it_learns_beside_its_teacher(
    targets: Path, sharded_llama: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """All that is kept in 32 bits, of rows of two shards in any order: loss and gradients of the teacher itself."""
    teacher = Checkpoint(sharded_llama).model("float32")
    vocabulary = teacher.config.vocab_size
    folder = build(tmp_path / "taught", targets, sharded_llama, kind="top_k", k=vocabulary, bits=32)
    assert len(list(folder.glob("*.safetensors"))) == 3
    rows, too_long = tuned.tokenized(
        Checkpoint(sharded_llama).tokenizer(),
        [
            {"prompt": task.prompt, "target": "word " * LONGEST if place == 2 else task.reference, "place": place}
            for place, task in enumerate(TEXTS)
        ],
        None,
        LONGEST,
    )
    assert too_long == 1
    chosen = [rows[6], rows[0], rows[3], rows[2]]
    student = Checkpoint(tiny_llama).model("float32").requires_grad_(True)
    weights = {"forward_kl": 0.75, "cross_entropy": 0.25}
    found, count = built(weights, {}, cache=Cache(folder))(student, chosen)
    expected, counted = built(weights, {}, teacher)(student, chosen)
    assert count == counted
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, list(student.parameters())) for loss in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6 * float(other.abs().max()) + 1e-5)
    tuned._check_places(Cache(folder), rows)
    with pytest.raises(UserError, match="are of other tokens than the student's"):
        tuned._check_places(Cache(folder), KeptRows([TrainingRow([1, 2, 3], 1, place=0)]))


@pytest.mark.usefixtures("few_rows_a_shard")
@pytest.mark.parametrize("spec", [{"kind": "top_k", "k": 5, "bits": 8}, {"kind": "sampled", "k": 7}], ids=str)
def test_a_killed_pass_goes_on_and_ends_with_the_same_bytes(
    spec: dict[str, Any], targets: Path, sharded_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is damaged, or of other rows, is made again. The disk is what the estimate says."""
    whole = build(tmp_path / "whole", targets, sharded_llama, **spec)
    replace, done = os.replace, []

    def dying(*paths: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", dying)
        build(tmp_path / "broken", targets, sharded_llama, **spec)
    assert any((tmp_path / "broken" / SCRATCH).iterdir()), "the store keeps what is begun"
    (tmp_path / "broken" / "00000.safetensors").write_bytes(b"damaged")
    made: list[Any] = []
    said = taught._said
    monkeypatch.setattr(taught, "_said", lambda *words: made.append(words) or said(*words))
    build(tmp_path / "broken", targets, sharded_llama, **spec)
    assert len(made) == 2, "the damaged one and the last"
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "broken" / path.name).read_bytes()
    tensors = [load_file(path) for path in sorted(whole.glob("*.safetensors"))]
    tokens = sum(len(each["tokens"]) for each in tensors)
    size = sum(each.nbytes for shard in tensors for name, each in shard.items() if name != "starts")
    vocabulary = Checkpoint(sharded_llama).config["vocab_size"]
    assert size == tokens * bytes_a_token(spec["kind"], spec["k"], spec.get("bits", 16), vocabulary)


def test_what_is_drawn_depends_on_no_batch(targets: Path, sharded_llama: Path, tmp_path: Path) -> None:
    folders = [build(tmp_path / str(b), targets, sharded_llama, b, kind="sampled", k=3) for b in (1, 32)]
    one, other = (load_file(folder / "00000.safetensors") for folder in folders)
    assert (one["tokens"] == other["tokens"]).all()
    assert len(np.unique(one["tokens"])) > 20
