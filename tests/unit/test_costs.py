"""FLOPs against those that torch counts as the models run; bytes by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdd.analysis import costs
from sdd.architectures import skeleton
from sdd.models.checkpoints import Checkpoint
from sdd.pruning.depth import prune_checkpoint

CONTEXT = 24


def flops_of(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, sharded_llama: Path, tmp_path_factory: Any, save_random: Any, sizes: dict) -> dict:
    from transformers import Gemma2Config, Qwen3MoeConfig

    cut = tmp_path_factory.mktemp("cut")
    prune_checkpoint(Checkpoint(tiny_llama), cut, [1, 2])
    windows = Gemma2Config(**sizes, sliding_window=8, query_pre_attn_scalar=8)
    experts = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return {
        "llama": tiny_llama,
        "untied": sharded_llama,
        "cut": cut,
        "windows": save_random(tmp_path_factory.mktemp("windows"), windows),
        "experts": save_random(tmp_path_factory.mktemp("experts"), experts),
    }


@pytest.mark.parametrize("name", ["llama", "untied", "cut"])
def test_flops_are_those_that_run(folders: dict, name: str) -> None:
    model = Checkpoint(folders[name]).model("float32", attention="eager")
    found = costs.counted(Checkpoint(folders[name]), CONTEXT, "float32")
    ids = torch.arange(CONTEXT)[None] % 50
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    step = flops_of(lambda: model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True))
    assert step == found["flops_per_generated_token"]["total"]
    # These kernels compute the whole square of a prompt's attention, each token as if it saw all of it.
    prompt = flops_of(lambda: model(input_ids=ids, logits_to_keep=1))
    square = CONTEXT * (costs.linear_flops(model) + costs.attention_flops(model, CONTEXT)) + costs.head_flops(model)
    assert prompt == square
    seen = sum(costs.attention_flops(model, place) for place in range(1, CONTEXT + 1))
    assert found["flops_per_prompt_token"]["attention"] * CONTEXT == pytest.approx(seen)


def test_parts_of_a_token_by_hand(folders: dict, sizes: dict) -> None:
    found = costs.counted(Checkpoint(folders["llama"]), 10, "bfloat16")["flops_per_generated_token"]
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48  # queries and output, keys and values, the MLP's three
    assert found["linear"] == 4 * 2 * block
    assert found["attention"] == 4 * (4 * 10 * 4 * 8)
    assert found["head"] == 2 * 32 * sizes["vocab_size"]
    assert found["total"] == found["linear"] + found["attention"] + found["head"]


def test_window_bounds_attention_and_cache(folders: dict) -> None:
    short, long = (costs.counted(Checkpoint(folders["windows"]), context, "float32") for context in (8, 20))
    per_token = 4 * 4 * 8
    assert short["flops_per_generated_token"]["attention"] == 4 * 8 * per_token
    assert long["flops_per_generated_token"]["attention"] == (2 * 8 + 2 * 20) * per_token
    assert long["cache_bytes_at_context"] == (2 * 8 + 2 * 20) * 2 * 16 * 4


def test_of_experts_those_that_a_token_uses(folders: dict) -> None:
    model = skeleton(Checkpoint(folders["experts"]).config, "here")
    attention, router = 32 * 32 * 2 + 32 * 16 * 2, 32 * 4
    uses = 2 * (attention + router + 2 * 3 * 32 * 16)
    assert costs.linear_flops(model) == pytest.approx(4 * uses)


def test_bytes_by_hand(folders: dict) -> None:
    found = costs.counted(Checkpoint(folders["llama"]), 100, "bfloat16")
    assert found["cache_bytes_per_token"] == 2 * 4 * 16 * 2
    assert found["cache_bytes_at_context"] == 100 * 256
    model = Checkpoint(folders["llama"]).model("float32")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["weight_bytes"] == 2 * found["parameters"]
    assert found["checkpoint_bytes"] == (folders["llama"] / "model.safetensors").stat().st_size


def test_saved_as_the_paper_counts_and_really(folders: dict) -> None:
    before, after = (costs.counted(Checkpoint(folders[name]), 16, "float32") for name in ("llama", "cut"))
    found = costs.saved(before, after)
    removed = before["parameters"] - after["parameters"]
    assert found["flops_as_in_the_paper"] == pytest.approx(removed / before["parameters"])
    assert found["cache_bytes_at_context"] == 0.5
    assert found["flops_per_prompt_token"] == pytest.approx(0.5)  # half the blocks, and no head
    assert 0 < found["flops_per_generated_token"] < 0.5  # the head stays


def test_measured_side_by_side(folders: dict) -> None:
    opened = {name: Checkpoint(folders[name]).model("float32") for name in ("llama", "cut")}
    found = costs.measured(opened, prompt_tokens=16, new_tokens=3, batch=2, repeats=2, device="cpu")
    for name, model in opened.items():
        record = found[name]
        assert set(record) == {"prefill_seconds", "decode_seconds_per_token", "tokens_per_second", "peak_bytes"}
        for key in set(record) - {"peak_bytes"}:
            assert 0 < record[key]["low"] <= record[key]["median"] <= record[key]["high"]
            assert record[key]["repeats"] == 2
        weights = sum(p.numel() * 4 for p in model.parameters())
        states = 2 * 16 * 32 * 4  # of two rows of 16 tokens; a block holds a few such, all blocks keep keys and values
        assert 3 * states < record["peak_bytes"] - weights < 60 * states
    assert found["llama"]["peak_bytes"] > found["cut"]["peak_bytes"]
    shown = {"one": ("llama", 1), "five": ("llama", 5)}
    assert set(costs.step_seconds(opened, shown, 16, 3, "cpu")) == {"one", "five"}
    assert set(costs.machine("cpu", "float32")) == {"device", "threads", "dtype", "torch"}


def test_peak_by_hand() -> None:
    weights = torch.ones(1000)

    def work() -> None:
        states = weights + 1  # 4,000 bytes
        states = states * 2  # 8,000 while both are there
        view = states.view(10, 100)  # none of its own
        weights.t()
        torch.cat([view, view]).sum()  # 8,000 more beside 4,000, and 4 of the sum

    assert costs._peak_of_tensors(work) == 12_004


def test_spread() -> None:
    assert costs.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "repeats": 3}
