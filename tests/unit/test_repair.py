"""The refitted projection against naive least squares, on cases with a known answer, and the checkpoint around it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from sdd.architectures import explicit_config, refittable
from sdd.errors import UserError
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint
from sdd.pruning.depth import prune_checkpoint
from sdd.pruning.repair import Cut, Moments, check_repairable, cuts_of, repair, replace_tensors

BLOCKS = 4
ROWS = [torch.randint(6, 256, (20 + n % 7,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(30)]
FITTED, HELD = ROWS[:24], ROWS[24:]


@pytest.fixture(scope="session")
def neox(tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path], sizes: dict[str, Any]) -> Path:
    """Parallel residual, and biases in its MLP; an untied head."""
    return save_random(tmp_path_factory.mktemp("neox"), GPTNeoXConfig(**sizes, tie_word_embeddings=False))


def cut_out(source: Path, folder: Path, removed: list[int]) -> tuple[Path, dict[str, Any]]:
    folder.mkdir()
    return folder, prune_checkpoint(Checkpoint(source), folder, removed)


def states(model: Any, rows: list[list[int]], block: int, down: str, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all tokens, one text at a time: activations, output of `block`, and what leaves block `end - 1`."""
    layers, seen = checkpoints.blocks(model), {"x": [], "output": [], "target": []}

    def keep(name: str, value: Any) -> None:
        seen[name].append((value[0] if isinstance(value, tuple) else value)[0])

    layers[block].get_submodule(down).register_forward_pre_hook(lambda m, a: keep("x", a))
    layers[block].register_forward_hook(lambda m, a, o: keep("output", o))
    layers[end - 1].register_forward_hook(lambda m, a, o: keep("target", o))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]), use_cache=False)
    if isinstance(seen["x"][0], tuple):
        seen["x"] = [x[0] for x in seen["x"]]
    x, output, target = (
        torch.cat([part if part.dim() == 2 else part[0] for part in parts]).double() for parts in seen.values()
    )
    return x, output, target


def error(output: Tensor, target: Tensor) -> float:
    return float((output - target).norm() / target.norm())


# ---- the regression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_change_is_that_of_naive_least_squares(bias: bool) -> None:
    """Rows of sqrt(penalty) below the activations, and nothing asked of the bias."""
    draw = torch.Generator().manual_seed(3)
    x, missing = torch.randn(90, 12, generator=draw).double() * 3 + 1, torch.randn(90, 5, generator=draw).double()
    moments = Moments(12, 5, bias)
    for part in (slice(0, 40), slice(40, 41), slice(41, 90)):
        moments.add(x[part], missing[part])
    penalty = 0.3
    strength = penalty * float((x * x).sum(0).mean())
    ones = torch.ones(90, bias, dtype=torch.float64)
    below = torch.cat([strength**0.5 * torch.eye(12, dtype=torch.float64), torch.zeros(12, bias)], 1)
    wide = torch.cat([torch.cat([x, ones], 1), below])
    expected = torch.linalg.lstsq(wide, torch.cat([missing, torch.zeros(12, 5)]).double(), driver="gelsd").solution
    found = moments.change(penalty)
    assert found.shape == (12 + bias, 5)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_by_hand() -> None:
    """One activation 1 and 2, missing 3 and 3: (3 + 6) / (5 + 0.2 * 5) = 1.5."""
    moments = Moments(1, 1, bias=False)
    moments.add(torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0], [3.0]]).double())
    assert moments.change(0.2).item() == pytest.approx(1.5)


def test_texts_that_leave_the_answer_open_are_a_users_mistake() -> None:
    moments = Moments(3, 1, bias=False)
    moments.add(torch.tensor([[1.0, 1.0, 1.0]]).double(), torch.tensor([[1.0]]).double())
    with pytest.raises(UserError, match=r"repair.penalty=1e-30 is too small .*; raise it, or calibration.num_texts"):
        moments.change(1e-30)


def test_cuts() -> None:
    assert cuts_of([0, 1, 4], [2, 3]) == [Cut(1, 1, 4)]
    assert cuts_of([0, 2, 5], [1, 3, 4, 6]) == [Cut(0, 0, 2), Cut(2, 1, 5), Cut(5, 2, 7)]
    assert cuts_of([0, 1, 2], []) == []
    with pytest.raises(UserError, match="nothing is before block 0; choose a cut that begins later"):
        cuts_of([2, 3], [0, 1])


# ---- on a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "down"), [("sharded_llama", "mlp.down_proj"), ("neox", "mlp.dense_4h_to_h")])
def test_weights_are_those_of_naive_least_squares_on_the_models_states(
    name: str, down: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """All states at once, no padding, and the ridge written out; in batches, padded, only real tokens count."""
    source: Path = request.getfixturevalue(name)
    pruned, facts = cut_out(source, tmp_path / "pruned", [2])
    tensors, done = repair(Checkpoint(source), Checkpoint(pruned), facts, ROWS, 1e-3, "float32", batch_size=7)
    whole = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    x, output, target = states(whole, FITTED, 1, down, 3)
    projection = checkpoints.blocks(whole)[1].get_submodule(down).requires_grad_(False)
    residual = output - x @ projection.weight.double().T
    if projection.bias is not None:
        residual, x = residual - projection.bias.double(), torch.cat([x, torch.ones(len(x), 1)], 1)
    inputs = projection.in_features
    old = (
        torch.cat([projection.weight.T, *([] if projection.bias is None else [projection.bias[None]])])
        .detach()
        .double()
    )
    ridge = torch.zeros(len(old), len(old), dtype=torch.float64)
    ridge[:inputs, :inputs] = (1e-3 * (x[:, :inputs] ** 2).sum(0).mean()) ** 0.5 * torch.eye(inputs)
    wide, goal = torch.cat([x, ridge]), torch.cat([target - residual, ridge @ old])
    expected = torch.linalg.lstsq(wide, goal, driver="gelsd").solution
    weight, *bias = tensors.values()
    assert [key.rsplit(".", 1)[1] for key in tensors] == ["weight", "bias"][: 1 + len(bias)]
    assert len(bias) == (projection.bias is not None)
    found = torch.cat([weight.T, *(part[None] for part in bias)]).double()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(found, old, atol=1e-2)
    (cut,) = done["cuts"]
    assert cut["fitted"]["before"] == pytest.approx(error(output, target), rel=1e-5)
    assert cut["fitted"]["after"] == pytest.approx(error(residual + x @ found, target), rel=1e-4)
    assert cut["fitted"]["after"] < cut["fitted"]["before"]
    assert (done["texts_fitted"], done["texts_held_out"]) == (24, 6)
    assert done["tokens_fitted"] == len(x) == sum(map(len, FITTED))


def test_held_out_error_is_that_of_the_repaired_checkpoint(sharded_llama: Path, tmp_path: Path) -> None:
    """Opened by stock code; two cuts, the second on the states of the student whose first is repaired."""
    pruned, facts = cut_out(sharded_llama, tmp_path / "pruned", [1, 3])
    tensors, done = repair(Checkpoint(sharded_llama), Checkpoint(pruned), facts, ROWS, 1e-3, "float32", batch_size=4)
    (tmp_path / "repaired").mkdir()
    replace_tensors(Checkpoint(pruned), tmp_path / "repaired", tensors)
    whole, cut, mended = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        for folder in (sharded_llama, pruned, tmp_path / "repaired")
    )
    for place, (block, end) in enumerate([(0, 2), (2, 4)]):
        told = done["cuts"][place]
        assert (told["block"], told["place"]) == (block, place)
        for rows, name in ((FITTED, "fitted"), (HELD, "held_out")):
            _, _, target = states(whole, rows, block, "mlp.down_proj", end)
            _, output, _ = states(mended, rows, place, "mlp.down_proj", 1)
            assert told[name]["after"] == pytest.approx(error(output, target), rel=1e-4)
    _, output, _ = states(cut, HELD, 0, "mlp.down_proj", 1)
    assert done["cuts"][0]["held_out"]["before"] == pytest.approx(
        error(output, states(whole, HELD, 0, "mlp.down_proj", 2)[2]), rel=1e-5
    )


@pytest.fixture
def rewired(sharded_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """`rewired(changes)`: a copy in which some tensors are others; the file is a single one."""

    def function(**changes: Tensor) -> Path:
        folder = tmp_path / "rewired"
        whole = AutoModelForCausalLM.from_pretrained(sharded_llama)
        shutil.copytree(sharded_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        tensors = {key: value.clone() for key, value in whole.state_dict().items()}
        for key, value in changes.items():
            name = f"model.layers.{key.replace('__', '.')}.weight"
            assert tensors[name].shape == value.shape
            tensors[name] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return function


def identity(block: int) -> dict[str, Tensor]:
    return {f"{block}__self_attn__o_proj": torch.zeros(32, 32), f"{block}__mlp__down_proj": torch.zeros(32, 48)}


def test_removed_identities_leave_nothing_to_repair(rewired: Callable[..., Path], tmp_path: Path) -> None:
    source = rewired(**identity(1), **identity(2))
    pruned, facts = cut_out(source, tmp_path / "pruned", [1, 2])
    tensors, done = repair(Checkpoint(source), Checkpoint(pruned), facts, ROWS, 1e-4, "float32")
    assert done["cuts"][0]["fitted"] == done["cuts"][0]["held_out"] == {"before": 0.0, "after": 0.0}
    (name,) = tensors
    assert name == "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(tensors[name], load_file(pruned / "model.safetensors")[name])


def test_a_projection_that_was_lost_is_found_again(rewired: Callable[..., Path], tmp_path: Path) -> None:
    """The second cut's student has zeros where the unpruned model has a projection, and the removed blocks add nothing:
    what is missing is linear in the activations."""
    right = torch.randn(32, 48, generator=torch.Generator().manual_seed(5))
    source = rewired(**{"2__mlp__down_proj": right}, **identity(1), **identity(3))
    pruned, facts = cut_out(source, tmp_path / "pruned", [1, 3])
    lost = "model.layers.1.mlp.down_proj.weight"
    save_file(load_file(pruned / "model.safetensors") | {lost: torch.zeros(32, 48)}, pruned / "model.safetensors")
    tensors, done = repair(Checkpoint(source), Checkpoint(pruned), facts, ROWS, 1e-10, "float32")
    assert torch.allclose(tensors[lost], right, atol=1e-4)
    assert done["cuts"][1]["held_out"]["before"] > 0.1
    assert done["cuts"][1]["held_out"]["after"] < 1e-5


def test_an_endless_penalty_keeps_the_weights(tiny_llama: Path, tmp_path: Path) -> None:
    pruned, facts = cut_out(tiny_llama, tmp_path / "pruned", [2, 3])
    tensors, done = repair(Checkpoint(tiny_llama), Checkpoint(pruned), facts, ROWS, 1e15, "float32")
    stored = load_file(pruned / "model.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in tensors.items())
    errors = done["cuts"][0]
    assert errors["held_out"]["after"] == pytest.approx(errors["held_out"]["before"])
    assert errors["held_out"]["before"] > 0.1


@pytest.mark.parametrize("name", ["tiny_llama", "sharded_llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_other_bytes_are_as_they_were(
    name: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(name)
    if dtype == "bfloat16":
        options = {"max_shard_size": "30KB"} if name == "sharded_llama" else {}
        half = Checkpoint(source).model(dtype)
        half.save_pretrained(tmp_path / "half", **options)
        source = tmp_path / "half"
    pruned, facts = cut_out(source, tmp_path / "pruned", [2])
    tensors, _ = repair(Checkpoint(source), Checkpoint(pruned), facts, ROWS, 1e-2, "float32")
    repaired = tmp_path / "repaired"
    repaired.mkdir()
    replace_tensors(Checkpoint(pruned), repaired, tensors)
    before, after = ({path.name: path for path in folder.iterdir()} for folder in (pruned, repaired))
    assert before.keys() == after.keys()
    changed = []
    for file, path in before.items():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == after[file].read_bytes(), file
            continue
        assert path.stat().st_size == after[file].stat().st_size
        old, new = load_file(path), load_file(after[file])
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert new[key].dtype == value.dtype == getattr(torch, dtype)
            if not torch.equal(new[key].view(torch.uint8), value.view(torch.uint8)):
                changed.append(key)
                assert torch.equal(new[key], tensors[key])
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    AutoModelForCausalLM.from_pretrained(repaired)


# ---- what cannot be repaired ------------------------------------------------------------------------------------


def folder_of(config: Any, name: str, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": [name]}))
    return folder


KINDS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "Llama": ("LlamaConfig", {"mlp_bias": True}, [0, 1, 2, 3]),
    "Phi3": ("Phi3Config", {}, [0, 1, 2, 3]),
    "GPTNeoX": ("GPTNeoXConfig", {"use_parallel_residual": False}, [0, 1, 2, 3]),
    "Cohere": ("CohereConfig", {}, [0, 1, 2, 3]),
    "Gemma2": ("Gemma2Config", {}, []),
    "Gemma3": ("Gemma3TextConfig", {}, []),
    "Olmo2": ("Olmo2Config", {}, []),
    "Granite": ("GraniteConfig", {"residual_multiplier": 0.5}, []),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 2}, []),
    "Qwen3Moe": (
        "Qwen3MoeConfig",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_only_layers": [1, 2]},
        [1, 2],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_blocks_with_a_projection_to_refit(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    kind, options, blocks = KINDS[name]
    folder = folder_of(getattr(transformers, kind)(**{**sizes, **options}), f"{name}ForCausalLM", tmp_path)
    config = explicit_config(Checkpoint(folder).config, "here")
    assert list(refittable(config, "here")) == blocks
    if not blocks:
        with pytest.raises(UserError, match=rf"{name}ForCausalLM does not \(a norm or a scale .*; choose repair=none"):
            check_repairable(Checkpoint(folder))
    elif len(blocks) < BLOCKS:
        with pytest.raises(UserError, match=rf"block 3 of {name}ForCausalLM does not"):
            check_repairable(Checkpoint(folder), [1, 3])
        assert check_repairable(Checkpoint(folder), [1, 2])[1] == "mlp.down_proj"


def test_a_single_text_cannot_be_held_out(tiny_llama: Path, tmp_path: Path) -> None:
    pruned, facts = cut_out(tiny_llama, tmp_path / "pruned", [2])
    with pytest.raises(UserError, match="holds out 1 of the calibration texts, and 1 is all"):
        repair(Checkpoint(tiny_llama), Checkpoint(pruned), facts, ROWS[:1], 1e-4, "float32")


def test_a_config_is_all_that_is_asked_of_a_large_model(tmp_path: Path) -> None:
    """A block of Llama 3.1 8B is 0.9 GB in float32; tried with zeros, each matrix a single one."""
    import resource

    wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    folder = folder_of(LlamaConfig(**wide, num_key_value_heads=8, vocab_size=128256), "LlamaForCausalLM", tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(check_repairable(Checkpoint(folder))) == 32
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000
