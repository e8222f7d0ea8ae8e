"""Divergence, likelihood and similarity on cases done by hand, and against stock models."""

import json
from pathlib import Path

import pytest
import torch

from sdd.analysis.shift import (
    cosine,
    embedder_digest,
    embedder_folder,
    histogram,
    similarities,
    token_kl,
    token_nll,
)
from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint
from sdd.stages.surprisals import lengths, surprise


def test_kl_and_nll_of_rows_are_those_of_whole_forwards(tiny_llama: Path, sharded_llama: Path, monkeypatch) -> None:
    teacher, student = (Checkpoint(path).model("float32") for path in (tiny_llama, sharded_llama))
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, 7), (9, 1), (5, 12)]
    rows = [tuple(torch.randint(0, 99, (n,), generator=generator).tolist() for n in pair) for pair in sizes]
    monkeypatch.setattr("sdd.forward.teacher_forcing.CHUNK", 5)  # 7 and 12 tokens take several chunks
    kl, nll = token_kl(teacher, student, rows, 2), token_nll(student, rows, 2)
    for (prompt, answer), divergence, likelihood in zip(rows, kl, nll, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0, len(prompt) - 1 : -1] for model in (teacher, student)]
        p, q = (each.log_softmax(-1) for each in logits)
        expected = (p.exp() * (p - q)).sum(-1)
        assert divergence == pytest.approx(expected.tolist(), abs=1e-4)
        assert likelihood == pytest.approx([-float(q[at, token]) for at, token in enumerate(answer)], abs=1e-4)
        assert min(divergence) > 0.01
    assert all(value == pytest.approx(0, abs=1e-5) for row in token_kl(teacher, teacher, rows, 3) for value in row)


def test_cosine_by_hand() -> None:
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]])
    assert cosine(x, y).tolist() == pytest.approx([0.96, -1.0, 0.0])


def test_histogram_counts_every_value_once() -> None:
    found = histogram([-1.0, -0.1, 0.0, 0.99, 1.0, 1.0], bins=4)
    assert found == {"edges": [-1.0, -0.5, 0.0, 0.5, 1.0], "counts": [1, 1, 1, 3]}


def test_surprise_by_hand() -> None:
    rows = [
        {"source": "rewrite", "target_tokens": 2, "target_nll": 0.5, "reference_tokens": 4, "reference_nll": 2.0},
        {"source": "reference", "target_tokens": 6, "target_nll": 1.5, "reference_tokens": 6, "reference_nll": 1.5},
    ]
    found = surprise(rows)
    assert found["all"]["target"]["nll"] == pytest.approx((1 + 9) / 8)
    assert found["all"]["reference"]["nll"] == pytest.approx((8 + 9) / 10)
    assert found["rewritten"]["rows"] == 1
    assert found["rewritten"]["target"] == {"nll": 0.5, "tokens": {"mean": 2, "p5": 2, "p50": 2, "p95": 2}}
    assert "rewritten" not in surprise(rows[1:])
    assert lengths(list(range(1, 102))) == {"mean": 51, "p5": 6, "p50": 51, "p95": 96}


MODULES = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}]


@pytest.mark.parametrize(
    ("modules", "weights", "message"),
    [
        ([*MODULES, {"type": "os.path.join"}], "model.safetensors", "made of os.path.join"),
        ([{"type": "sentence_transformers.models.WordEmbeddings"}], "model.safetensors", "made of"),
        (MODULES, "pytorch_model.bin", "pickled weights can run code"),
        (None, "model.safetensors", "no valid modules.json"),
    ],
)
def test_embedder_that_is_not_opened(tmp_path: Path, modules: list, weights: str, message: str) -> None:
    if modules is not None:
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / weights).touch()
    with pytest.raises(UserError, match=message):
        embedder_folder(str(tmp_path), None)


def test_embedder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder|cannot be fetched"):
        embedder_folder(str(tmp_path / "nothing"), None)
    assert embedder_folder("nobody/nothing", None, fetch=False) is None
    with pytest.raises(UserError, match=r"set analysis\.embedder=null"):
        embedder_folder("nobody/nothing", None)


def test_similarity_of_texts_by_a_stock_embedder(tmp_path: Path, tokenizer) -> None:
    pytest.importorskip("sentence_transformers", reason="the extra `shift` is not installed")
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    paths = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(paths)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    folder = embedder_folder(str(tmp_path), None)
    assert folder == tmp_path
    texts, others = ["add three", "sort the list", "a lamp"], ["add three", "a lamp", "seven and two"]
    found = similarities(folder, texts, others, "cpu")
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert max(found[1:]) < 0.999
    before = embedder_digest(folder, tmp_path / "memory")
    (folder / "README.md").write_text("another page")
    assert embedder_digest(folder, tmp_path / "memory") == before
    pooling["pooling_mode_mean_tokens"], pooling["pooling_mode_cls_token"] = False, True
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert embedder_digest(folder, tmp_path / "memory") != before
