"""The benchmarks of `--device cuda` on a GPU that is not there: every way runs, and computes nothing on the CPU.

Models are small, and data are drawn beforehand: whatever is drawn there has no values. The numbers of a Llama are not
known either, so that its first token is the last one of every answer.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from lm_eval.api.instance import Instance

from benchmarks import evaluation, fake_gpu, finetuning, generation, scores, sdm
from benchmarks.models import random_llama
from benchmarks.rows import Setting
from benchmarks.shapes import FakeGPU
from sdd.finetuning.module import TrainingRow

SMALL = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 32}
ON_GPU = Setting("cuda:0", turns=1)
MOVED = {"aten::_to_copy", "aten::copy_", "aten::clone"}
"""What a result goes through on its way to the CPU."""


def small(**_: Any) -> Any:
    return random_llama(**SMALL)


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_gpu.Trace]:
    monkeypatch.setattr(fake_gpu, "LARGE", 1)
    for name in ("synchronize", "set_device", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(1))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tensor.shape, np.uint8))
    monkeypatch.setattr(PartialState, "default_device", fake_gpu.CUDA)
    AcceleratorState._reset_state(reset_partial_state=True)
    with fake_gpu.on_fake_gpu() as trace:
        yield trace
        assert trace.flops > 0
        assert set(trace.on_cpu) <= MOVED
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before `trace`."""
    texts = [[3, 4, 5], [6, 7, 8, 9], [10, 11]]
    monkeypatch.setattr(scores, "draw_texts", lambda *_: texts)
    monkeypatch.setattr(scores, "SIZES", range(1, 3))
    for module in (scores, evaluation):
        monkeypatch.setattr(module, "random_llama", small)
    monkeypatch.setattr(generation, "EVERY", 1)
    monkeypatch.setattr(generation, "MODELS", {"small": (lambda _: (small(), texts, [0], 3), 3)})
    tokenizer = evaluation.make_tokenizer(["what is it", "a word"], 300)
    monkeypatch.setattr(evaluation, "make_tokenizer", lambda *_: tokenizer)
    choices = [(item, choice) for item in ("is it", "what is") for choice in (" a", " word")]
    monkeypatch.setattr(evaluation, "ITEMS", {"arc_challenge": 2})
    monkeypatch.setattr(
        evaluation,
        "requests_of",
        lambda *_: [Instance("loglikelihood", {}, pair, at, doc_id=at // 2) for at, pair in enumerate(choices)],
    )
    rows = [TrainingRow([3] * length, length // 2) for length in (5, 6, 7, 8)]
    monkeypatch.setattr(finetuning, "MODELS", {"small": lambda _: (small(), rows)})
    adapter = finetuning.LORA | {"scope": "last", "blocks": 1}
    case = replace(finetuning.CASES["embedded"], model="small", batch=2, epochs=2, adapter=adapter)
    monkeypatch.setattr(finetuning, "CASES", {"last": case})
    runtime = property(lambda bench: replace(bench_runtime(bench), accelerator=FakeGPU()))
    bench_runtime = finetuning.Bench.runtime.fget
    monkeypatch.setattr(finetuning.Bench, "runtime", runtime)


def test_scores(data: None, trace: fake_gpu.Trace) -> None:
    assert len(scores.rows(ON_GPU)) == 2


@pytest.mark.parametrize("form", sdm.FORMS)
def test_sdm(form: str, data: None, trace: fake_gpu.Trace) -> None:
    model = small().to(ON_GPU.device)
    taken, _ = sdm.stages(form, model, [[3, 4, 5], [6, 7, 8, 9]], ON_GPU.device)
    assert len(taken) == 2


def test_generation(data: None, trace: fake_gpu.Trace) -> None:
    assert [row.parity for row in generation.rows(ON_GPU)] == ["every token"] * 2


def test_evaluation(data: None, trace: fake_gpu.Trace, tmp_path: Path) -> None:
    assert len(evaluation.rows(replace(ON_GPU, data=tmp_path))) == 1


def test_finetuning(data: None, trace: fake_gpu.Trace) -> None:
    assert {row.peer for row in finetuning.rows(ON_GPU)} == {"a padded Trainer", "a packed loop"}
