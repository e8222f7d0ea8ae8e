"""Opening checkpoints, finding their blocks and head, and the digest that stands for a model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config

from sdd.errors import UserError
from sdd.models import checkpoints


def test_a_model_opens_in_the_dtype_asked_for_and_ready_to_use(tiny_llama: Path) -> None:
    for name in ("float32", "bfloat16"):
        model = checkpoints.load_model(tiny_llama, name)
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
        assert not model.training
    assert checkpoints.num_blocks(tiny_llama) == len(checkpoints.blocks(model)) == 4


def test_head_logits_are_the_models_own(tiny_llama: Path) -> None:
    model = checkpoints.load_model(tiny_llama, "float32")
    ids = torch.tensor([[1, 40, 90, 121]])
    with torch.no_grad():
        hidden = checkpoints.decoder(model)(input_ids=ids).last_hidden_state
        assert torch.equal(checkpoints.head_logits(model, hidden), model(ids).logits)


def test_head_logits_keep_a_soft_cap(save_random: Callable[..., Path], sizes: Any, tmp_path: Path) -> None:
    """Gemma 2 squashes its logits after the head; a loss taken on the bare head would be another model's."""
    config = Gemma2Config(**sizes, final_logit_softcapping=5.0)
    model = checkpoints.load_model(save_random(tmp_path, config), "float32")
    ids = torch.tensor([[1, 40, 90, 121]])
    with torch.no_grad():
        hidden = checkpoints.decoder(model)(input_ids=ids).last_hidden_state
        logits = checkpoints.head_logits(model, hidden)
        assert torch.equal(logits, model(ids).logits)
        assert not torch.allclose(logits, model.lm_head(hidden), atol=0.1)


def test_pickled_weights_and_remote_code_are_never_opened(tiny_llama: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(tiny_llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        checkpoints.load_model(pickled, "float32")
    remote = shutil.copytree(tiny_llama, tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (remote / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="remote code"):
        checkpoints.load_model(remote, "float32")


def test_a_cut_off_file_is_a_users_mistake(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(UserError, match="damaged safetensors file") as caught:
        checkpoints.load_model(folder, "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["missing", "broken"])
def test_a_tokenizer_that_does_not_open_is_a_users_mistake(wrong: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    if wrong == "broken":
        (folder / "tokenizer.json").write_text("{")
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    with pytest.raises(UserError, match="tokenizer") as caught:
        checkpoints.load_tokenizer(folder)
    assert "\n" not in str(caught.value)


# ---- digest -----------------------------------------------------------------------------------------------------


def _flip_weight(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _append(name: str) -> Callable[[Path], None]:
    def append(folder: Path) -> None:
        (folder / name).write_text((folder / name).read_text() + " ")

    return append


@pytest.mark.parametrize(
    "change",
    [
        _flip_weight,
        _append("config.json"),
        _append("tokenizer.json"),
        _append("tokenizer_config.json"),
        _append("chat_template.jinja"),
        _append("generation_config.json"),
    ],
    ids=["weight", "config", "tokenizer", "tokenizer config", "chat template", "generation config"],
)
def test_the_digest_covers_what_the_model_says(
    change: Callable[[Path], None], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    before = checkpoints.model_digest(folder, tmp_path / "memory")
    change(folder)
    assert checkpoints.model_digest(folder, tmp_path / "memory") != before


def test_the_digest_is_of_content_and_not_of_place_or_time(tiny_llama: Path, tmp_path: Path) -> None:
    before = checkpoints.model_digest(tiny_llama, tmp_path / "memory")
    folder = shutil.copytree(tiny_llama, tmp_path / "elsewhere")
    os.utime(folder / "model.safetensors", (1, 1))
    (folder / "README.md").write_text("a note")
    assert checkpoints.model_digest(folder, tmp_path / "memory") == before
