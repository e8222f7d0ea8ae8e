"""The ready models: their stated sizes against stock transformers, and their headers against the estimates."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdd.models.hub import HUB_ID
from sdd.planning.cost_model import shape_of
from sdd.planning.requirements import requirements

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"
OPTIONS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if path.stem not in ("tiny", "local")}
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {}),
    "gemma3": ("Gemma3Text", {}),
    "smollm2": ("Llama", {}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0}),
    "olmo2": ("Olmo2", {}),
    "phi": ("Phi3", {"pad_token_id": 0}),
}
PARAMETERS = {
    "llama3.1_8b_instruct": 8_030_261_248,
    "mistral_7b_v0.3_instruct": 7_248_023_552,
    "llama3.2_1b_instruct": 1_235_814_400,
    "llama3.2_3b_instruct": 3_212_749_824,
    "qwen2.5_0.5b_instruct": 494_032_768,
    "qwen2.5_7b_instruct": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "gemma2_2b_instruct": 2_614_341_888,
    "gemma3_1b_instruct": 999_885_952,
    "smollm2_135m_instruct": 134_515_008,
    "smollm3_3b": 3_075_098_624,
    "phi3.5_mini_instruct": 3_821_079_552,
}
"""As their authors state them."""


def family(name: str) -> tuple[str, dict[str, Any]]:
    return next(value for key, value in FAMILIES.items() if name.startswith(key))


def node_of(name: str) -> dict[str, Any]:
    node: dict[str, Any] = yaml.safe_load(OPTIONS[name].read_text())
    return node


def test_the_papers_models_and_more_than_ten_others_are_there() -> None:
    assert {"llama3.1_8b_instruct", "mistral_7b_v0.3_instruct"} <= set(OPTIONS)
    assert len(OPTIONS) >= 12
    assert {re.match("[a-z]+", name)[0] for name in OPTIONS} >= {"llama", "qwen", "gemma", "smollm", "olmo", "phi"}


@pytest.mark.parametrize("name", OPTIONS)
def test_header_says_where_it_comes_from_and_what_it_needs(name: str) -> None:
    header = [line[2:] for line in OPTIONS[name].read_text().splitlines() if line.startswith("# ")]
    node = node_of(name)
    assert HUB_ID.fullmatch(node["path"])
    assert header[0].endswith(f"https://huggingface.co/{node['path']}")
    assert re.match(r"Licence: .+\. (Gated|Not gated|If the page asks)", header[1])
    assert re.fullmatch(rf"Template: the tokenizer's own.*\. Loaded in {node['dtype']}\.", header[2])
    assert header[3].startswith(f"Revision `{node['revision'][:7]}`")
    wanted = requirements(shape_of(node["shape"]))
    assert header[4 : 4 + len(wanted)] == wanted
    assert node["revision"] == "main" or re.fullmatch("[0-9a-f]{40}", node["revision"])


def test_sizes_are_those_of_the_real_models() -> None:
    """Stock transformers makes one and two blocks of these sizes, without memory; the rest are equal to the second.

    The estimate leaves out biases and norms beyond two a block.
    """
    import torch
    import transformers

    def count(name: str, blocks: int) -> int:
        shape = {key: value for key, value in node_of(name)["shape"].items() if key not in ("dtype", "model_type")}
        kind, more = family(name)
        config = getattr(transformers, f"{kind}Config")(**shape | {"num_hidden_layers": blocks}, **more)
        assert config.model_type == node_of(name)["shape"]["model_type"], name
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters())

    for name in OPTIONS:
        shape = shape_of(node_of(name)["shape"])
        first = count(name, 1)
        exact = first + (shape.blocks - 1) * (count(name, 2) - first)
        assert shape.parameters() == pytest.approx(exact, rel=1e-3), name
        assert PARAMETERS.get(name, exact) == exact, name
