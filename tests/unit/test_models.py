"""Opening checkpoints, finding their blocks and head, and the digest that stands for a model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config

from sdd.architectures import skeleton
from sdd.errors import UserError
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint


def test_a_model_opens_in_the_dtype_asked_for_and_ready_to_use(tiny_llama: Path) -> None:
    for name in ("float32", "bfloat16"):
        model = Checkpoint(tiny_llama).model(name)
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
        assert not model.training
    assert Checkpoint(tiny_llama).num_blocks == len(checkpoints.blocks(model)) == 4


def test_head_logits_are_the_models_own(tiny_llama: Path) -> None:
    model = Checkpoint(tiny_llama).model("float32")
    ids = torch.tensor([[1, 40, 90, 121]])
    with torch.no_grad():
        hidden = checkpoints.decoder(model)(input_ids=ids).last_hidden_state
        assert torch.equal(checkpoints.head_logits(model, hidden), model(ids).logits)


def test_head_logits_keep_a_soft_cap(save_random: Callable[..., Path], sizes: Any, tmp_path: Path) -> None:
    """Gemma 2 squashes its logits after the head; a loss taken on the bare head would be another model's."""
    config = Gemma2Config(**sizes, final_logit_softcapping=5.0)
    model = Checkpoint(save_random(tmp_path, config)).model("float32")
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
        Checkpoint(pickled).model("float32")
    remote = shutil.copytree(tiny_llama, tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (remote / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="remote code"):
        Checkpoint(remote).model("float32")


def test_a_cut_off_file_is_a_users_mistake(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(UserError, match="damaged safetensors file") as caught:
        Checkpoint(folder).model("float32")
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
        Checkpoint(folder).tokenizer()
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
    before = Checkpoint(folder).digest(tmp_path / "memory")
    change(folder)
    assert Checkpoint(folder).digest(tmp_path / "memory") != before


def test_the_digest_is_of_content_and_not_of_place_or_time(tiny_llama: Path, tmp_path: Path) -> None:
    before = Checkpoint(tiny_llama).digest(tmp_path / "memory")
    folder = shutil.copytree(tiny_llama, tmp_path / "elsewhere")
    os.utime(folder / "model.safetensors", (1, 1))
    (folder / "README.md").write_text("a note")
    assert Checkpoint(folder).digest(tmp_path / "memory") == before


def test_stock_code_does_not_write_into_the_config(tiny_llama: Path, tmp_path: Path) -> None:
    """It adds to a nested table in place, and what is written beside a cut has to be what is stored."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    stored = json.loads((folder / "config.json").read_text())
    stored |= {"rope_scaling": {"type": "linear", "factor": 2.0}}
    stored.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(stored))
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    skeleton(config, checkpoint.where)
    assert config != stored
    assert checkpoint.config == stored


def test_another_object_reads_the_folder_again(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    checkpoint = Checkpoint(folder)
    assert (checkpoint.num_blocks, len(checkpoint.weight_files)) == (4, 1)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    assert checkpoint.config["num_hidden_layers"] == 4
    with pytest.raises(UserError, match=r"no config\.json"):
        _ = Checkpoint(folder).config
    with pytest.raises(UserError, match="no safetensors weights"):
        _ = Checkpoint(folder).weight_files


def test_tensors_are_known_from_headers(tiny_llama: Path, sharded_llama: Path) -> None:
    for folder in (tiny_llama, sharded_llama):
        checkpoint = Checkpoint(folder)
        whole = {name: tensor for path in checkpoint.weight_files for name, tensor in load_file(path).items()}
        assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
        assert all(torch.equal(tensor.read(), whole[name]) for name, tensor in checkpoint.tensors.items())
        assert checkpoint.block_tensors.keys() == set(range(checkpoint.num_blocks))
        down = checkpoint.block_tensors[2]["mlp.down_proj.weight"]
        assert down is checkpoint.tensors["model.layers.2.mlp.down_proj.weight"]
        assert checkpoint.stored_dtype == str(down.read().dtype).removeprefix("torch.")
