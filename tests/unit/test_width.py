"""Narrowed checkpoints against the same model with its channels deleted in memory, and the bytes they are made of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, GPTNeoXConfig, LlamaConfig, Phi3Config, Qwen3MoeConfig

from sdd.architectures import find_mlp
from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint
from sdd.pruning import depth as pruning
from sdd.pruning.width import Share, check_narrowable, narrow_checkpoint, sizes_of

WIDTH = 48
KEPT = [
    [0, 1, 2, 5, 11, 12, 13, 40],
    [3, 9, 10, 20, 21, 22, 46, 47],
    [0, 8, 16, 24, 32, 40, 41, 42],
    [40, 41, 42, 43, 44, 45, 46, 47],
]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    save_random: Callable[..., Path],
    sizes: dict[str, Any],
    tiny_llama: Path,
    sharded_llama: Path,
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("widths")
    half = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    half.save_pretrained(root / "half")
    return {
        "one file": tiny_llama,
        "sharded": sharded_llama,
        "bfloat16": root / "half",
        "bias": save_random(root / "bias", LlamaConfig(**sizes, mlp_bias=True)),
        "fused": save_random(root / "fused", Phi3Config(**sizes, tie_word_embeddings=False)),
        "plain": save_random(root / "plain", GPTNeoXConfig(**sizes)),
    }


NAMES = ["one file", "sharded", "bfloat16", "bias", "fused", "plain"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def sliced(name: str, tensor: torch.Tensor, kept: list[int]) -> torch.Tensor:
    rows = torch.tensor(kept)
    if "gate_up_proj" in name:
        return torch.cat([tensor[rows], tensor[WIDTH + rows]])
    if any(layer in name for layer in ("gate_proj", "up_proj", "dense_h_to_4h")):
        return tensor[rows]
    if "down_proj.weight" in name or "dense_4h_to_h.weight" in name:
        return tensor[:, rows]
    return tensor


@pytest.mark.parametrize("name", NAMES)
def test_narrowed_checkpoint_has_the_kept_channels_bit_for_bit(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "CHUNK", 1000)  # matrices go through in several pieces
    source = folders[name]
    facts = narrow_checkpoint(Checkpoint(source), tmp_path, KEPT)
    before, after = tensors(source), tensors(tmp_path)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        block = next((int(word) for word in key.split(".") if word.isdigit()), 0)
        expected = sliced(key, tensor, KEPT[block])
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], expected), key
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == json.loads((source / "config.json").read_text()) | {"intermediate_size": 8}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in source.iterdir())
    assert (facts["width_before"], facts["width_after"]) == (48, 8)
    assert facts["removed_of_mlp"] == pytest.approx(40 / 48)
    counted = sum(tensor.numel() for tensor in after.values())
    channel = sizes_of(Checkpoint(source)).channel
    assert facts["parameters_after"] == counted == facts["parameters_before"] - 40 * channel
    assert facts["removed_of_all"] == pytest.approx(1 - counted / facts["parameters_before"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_stock_model_equals_the_whole_one_with_channels_masked(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    narrow_checkpoint(Checkpoint(folders[name]), tmp_path, KEPT)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    whole = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    for block, kept in zip(whole.get_decoder().layers, KEPT, strict=True):
        down = block.mlp.dense_4h_to_h if name == "plain" else block.mlp.down_proj
        gone = torch.ones(WIDTH, dtype=torch.bool)
        gone[kept] = False
        down.weight[:, gone] = 0
    ids = torch.randint(6, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(ids).logits, whole(ids).logits, atol=2e-5, rtol=1e-4)


# ---- how wide ---------------------------------------------------------------------------------------------------

PAPER = {"hidden": 2048, "parameters": 1_235_814_400, "channel": 16 * 3 * 2048}


@pytest.mark.parametrize(("ratio", "width"), [(0.2, 2.774), (0.3, 2.161), (0.4, 1.548)])
def test_widths_of_the_paper(ratio: float, width: float) -> None:
    """Llama-3.2-1B, of 4 times the hidden size."""
    found = Share(ratio, "all", 1).width(4 * 2048, PAPER["parameters"], PAPER["channel"])
    assert found / 2048 == pytest.approx(width, abs=0.005)


def test_width_by_hand() -> None:
    """1,000 parameters, 40 channels of 10: 200 of all are 20 channels, 20% of the MLPs' 8."""
    assert Share(0.2, "all", 1).width(40, 1000, 10) == 20
    assert Share(0.2, "mlp", 1).width(40, 1000, 10) == 32
    assert Share(0.23, "all", 8).width(40, 1000, 10) == 16
    assert Share(0.2, "mlp", 7).width(40, 1000, 10) == 35


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (Share(0.4, "all", 1), "is more than the MLPs hold \\(40.0% of all\\)"),
        (Share(0.39, "all", 8), "leaves no channel of 40 \\(in multiples of 8\\)"),
        (Share(0.001, "all", 1), "removes no channel of 40"),
    ],
)
def test_width_that_is_none_is_refused(share: Share, message: str) -> None:
    with pytest.raises(UserError, match=message):
        share.width(40, 1000, 10)


def test_sizes_by_hand(folders: dict[str, Path]) -> None:
    """Width 32, 4 blocks; a channel of the plain MLP is a row, its bias and a column, of the fused one three."""
    assert sizes_of(Checkpoint(folders["plain"])).channel == 4 * 65
    assert sizes_of(Checkpoint(folders["fused"])).channel == sizes_of(Checkpoint(folders["one file"])).channel == 4 * 96
    assert sizes_of(Checkpoint(folders["bias"])).channel == 4 * 98
    sizes = sizes_of(Checkpoint(folders["one file"]))
    assert sizes.width(Share(0.2, "all", 1)) == round(48 - 0.2 * sizes.parameters / 384)
    half = (sizes.parameters - sizes.blocks / 2) * 0.2
    assert sizes.width(Share(0.2, "all", 1), blocks_removed=2) == round(48 - half / 192)


# ---- what is not known ------------------------------------------------------------------------------------------


def test_mixture_of_experts_is_refused(save_random: Callable[..., Path], sizes: dict[str, Any], tmp_path: Path) -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    folder = save_random(tmp_path / "source", Qwen3MoeConfig(**sizes, **experts))
    with pytest.raises(UserError, match=r"its MLP is not known here \(a mixture of experts\)"):
        sizes_of(Checkpoint(folder))


def test_widths_by_block_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text()) | {"intermediate_size": [48, 48, 48, 48]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a width for each block"):
        sizes_of(Checkpoint(tmp_path))
    assert isinstance(Gemma3nTextConfig().intermediate_size, list), "as Gemma 3n has them"


def test_config_that_disagrees_with_the_tensors_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"intermediate_size=64 in config\.json, but the MLPs are 48 wide"):
        sizes_of(Checkpoint(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_known_mlps_can_be_narrowed(name: str, folders: dict[str, Path]) -> None:
    assert check_narrowable(Checkpoint(folders[name]), 8).width == WIDTH


def test_mlp_of_other_names_is_refused() -> None:
    with pytest.raises(UserError, match="linear layers of other names"):
        find_mlp({"ffn.a.weight": (48, 32), "ffn.b.weight": (32, 48)}, "here")
    shapes = {"mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48), "mlp.down_proj.bias": (32,)}
    assert find_mlp(shapes, "here").into == ("mlp.up_proj",)
    gated = find_mlp(shapes | {"mlp.gate_proj.weight": (48, 32)}, "here")
    assert gated.into == ("mlp.gate_proj", "mlp.up_proj")
