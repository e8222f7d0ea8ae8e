"""Merging by hand-made vectors, and of real students: a random Llama with LoRA, norms and head, or all trained."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdd.errors import UserError
from sdd.finetuning.adapters import adapted, save_student
from sdd.merging import linear, slerp, task_arithmetic, ties
from sdd.merging.formulas import angle, norm, share_at, trimmed
from sdd.merging.streaming import merge_checkpoints, place_of
from sdd.merging.students import open_students
from sdd.models.checkpoints import Checkpoint, save_model
from sdd.stages.merged import angles, parallel_note
from sdd.stages.merged import build as build_merged
from sdd.stages.runtime import Runtime
from sdd.stages.student import open_student
from sdd.store import Recipe

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}
HEAD_AND_NORMS = {"method": "head_and_norms"}
FULL = {"method": "full"}
SLERP = {"method": "slerp", "t": 0.5, "space": "weights"}
METHODS = [
    SLERP,
    {"method": "slerp", "t": 0.3, "space": "task_vectors"},
    {"method": "linear", "weights": [1.0, 3.0]},
    {"method": "task_arithmetic", "weights": [0.7, 0.4]},
    {"method": "ties", "weights": [1.0, 1.0], "density": 0.3},
]


def named(method: dict) -> str:
    return "-".join(str(method[key]) for key in ("method", "space") if key in method)


# ---- formulas -------------------------------------------------------------------------------------------------------


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    root = math.sqrt(0.5)
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([[2 * root, root]]))  # a right angle, the original norms
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-7)
    x, y, third = (torch.tensor([math.cos(v), math.sin(v)], dtype=torch.float64) for v in (0.0, 1.2, 0.4))
    assert torch.allclose(slerp(x, y, 1 / 3), third, atol=1e-12)


def test_slerp_is_linear_for_nearly_parallel_opposite_and_zero_tensors() -> None:
    a = torch.tensor([1.0, 2.0, 3.0])
    for b in (a + 1e-3, -a, torch.zeros(3)):
        assert torch.allclose(slerp(a, b, 0.25), 0.75 * a + 0.25 * b)
    assert slerp(a.bfloat16(), a.bfloat16(), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("theta", [1e-5, 0.02, 1.0, 3.0])
def test_angle_is_exact_for_small_ones_too(theta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40_000, generator=generator, dtype=torch.float64) for _ in range(2))
    b = b - (a @ b) / (a @ a) * a
    turned = 1.01 * a.norm() * (math.cos(theta) * a / a.norm() + math.sin(theta) * b / b.norm())
    found = angle(norm(a), norm(turned), norm(a - turned))
    assert found == pytest.approx(theta, rel=1e-5)
    assert angle(0.0, 1.0, 1.0) is None


def test_linear_and_task_arithmetic_by_hand() -> None:
    base, a, b = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 5.0])
    assert linear([a, b], [1, 3]).tolist() == [1.5, 4.0]
    assert linear([a, b, base], [1, 1, 2]).tolist() == [1.5, 2.0]
    assert task_arithmetic(base, [a - base, b - base], [1, 0.5]).tolist() == [3.0, 3.0]


def test_ties_by_hand() -> None:
    base = torch.ones(5)
    a, b = torch.tensor([3.0, -1.0, 0.1, 2.0, 4.0]), torch.tensor([-1.5, -2.0, 0.2, 1.0, 2.0])
    assert trimmed(a, 0.6).tolist() == [3, 0, 0, 2, 4]
    assert trimmed(b, 0.6).tolist() == [-1.5, -2, 0, 0, 2]
    assert (ties(base, [a, b], [1, 1], 0.6) - base).tolist() == [3, -2, 0, 2, 3]
    assert torch.allclose(ties(base, [a, b], [1, 2], 0.6) - base, torch.tensor([3, -2, 0, 2, 8 / 3]))
    assert torch.allclose(ties(base, [a, b], [1, 3], 0.6) - base, torch.tensor([-1.5, -2, 0, 2, 2.5]))  # 3 - 4.5 < 0
    assert trimmed(a, 1.0) is a
    assert trimmed(a, 1e-6).tolist() == [0, 0, 0, 0, 4]


def test_share_by_block_and_by_kind() -> None:
    t = {"self_attn": [0.0, 1.0, 0.0], "q_proj": 0.9, "mlp": 0.2}
    assert share_at(0.3, "anything", 1.0) == 0.3
    assert [share_at([0, 1], "x", place) for place in (0, 0.25, 1)] == [0, 0.25, 1]
    assert [share_at([0.0, 1.0, 0.0], "x", place) for place in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 0]
    assert share_at([0.7], "x", 0.5) == 0.7
    assert share_at(t, "model.layers.1.self_attn.k_proj.weight", 0.25) == 0.5
    assert share_at(t, "model.layers.1.self_attn.q_proj.weight", 0.25) == 0.9  # the part furthest right
    assert share_at(t, "model.layers.1.mlp.up_proj.weight", 0.25) == 0.2
    assert share_at(t, "model.norm.weight", 1.0) == 0.5
    assert share_at(t | {"default": 0.1}, "model.norm.weight", 1.0) == 0.1


def test_places_from_embeddings_to_head() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
    names += ["model.layers.4.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "embed_out.weight"]
    assert [place_of(name, 5) for name in names] == [0, 0, 0.25, 1, 1, 1, 1]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny_llama", "sharded_llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 base: tied in one file, or with a head of its own over several."""
    source: Path = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(source, folder)
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    model = Checkpoint(source).model("bfloat16")
    model.save_pretrained(folder, **({"max_shard_size": "40KB"} if request.param == "sharded_llama" else {}))
    return folder


def student(base: Path, adapter: dict[str, Any], seed: int, folder: Path) -> Path:
    """The folder of a student whose trained parameters were drawn anew."""
    torch.manual_seed(seed)
    made = adapted(Checkpoint(base).model("float32"), adapter, None)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_student(made, folder, Checkpoint(base), "model/base")
    place = {"stage": folder.parent.name, "address": folder.name}
    (folder / "manifest.json").write_text(json.dumps({**place, "inputs": {}, "spec": {"model": "base"}}))
    return folder


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pair")
    return [student(base, LORA, seed, folder / str(seed)) for seed in (1, 2)]


def exported(tuned: Path, base: Path, target: Path, dtype: str) -> Path:
    """The student as a full checkpoint, made by PEFT and stock code."""
    model, _ = open_student(tuned, Runtime(sources={"base": base}), dtype)
    save_model(model, target, Checkpoint(base))
    return target


@pytest.fixture(scope="module")
def whole(base: Path, pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pair as full float32 checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return [exported(one, base, folder / one.name, "float32") for one in pair]


def merge(
    base: Path, folders: list[Path], method: dict[str, Any], target: Path, dtype: str | None = None
) -> tuple[dict, dict]:
    """(merged tensors, what was measured)."""
    target.mkdir()
    facts = merge_checkpoints(Checkpoint(base), open_students(folders), method, target, dtype)
    return tensors_of(target), facts


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance in bfloat16 steps."""
    ordered = [x.contiguous().view(torch.int16).int() for x in (a, b)]
    ordered = [torch.where(x < 0, -(x & 0x7FFF), x) for x in ordered]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize(("t", "which"), [(0.0, 0), (1.0, 1)])
def test_ends_are_the_students_as_peft_merges_them(
    t: float, which: int, base: Path, pair: list[Path], tmp_path: Path
) -> None:
    found, facts = merge(base, pair, SLERP | {"t": t}, tmp_path / "merged")
    expected = tensors_of(exported(pair[which], base, tmp_path / "student", "bfloat16"))
    assert found.keys() == expected.keys() and len(facts["tensors"]) == 28
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_files_are_those_of_the_base_and_stock_code_opens_them(base: Path, pair: list[Path], tmp_path: Path) -> None:
    _, facts = merge(base, pair, SLERP, tmp_path / "merged")
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in base.iterdir()}
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert set(facts["copied"]) == {name for name in before if torch.equal(before[name], after[name])}
    assert set(facts["copied"]) | set(facts["tensors"]) == set(before)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_adapters_merge_as_their_full_checkpoints_do(
    method: dict, base: Path, pair: list[Path], whole: list[Path], tmp_path: Path
) -> None:
    light, facts = merge(base, pair, method, tmp_path / "light")
    heavy, _ = merge(base, whole, method, tmp_path / "heavy")
    assert light.keys() == heavy.keys()
    assert max(ulps(light[name], heavy[name]) for name in light) <= 1
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = (tensors_of(folder)[name].double().flatten() for folder in whole)
    measured = facts["tensors"][name]
    assert measured["angles"] == [pytest.approx(math.acos(a @ b / a.norm() / b.norm()), rel=1e-3)]
    assert measured["norms"] == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-5)
    start = tensors_of(base)[name].double().flatten()
    a, b = a - start, b - start
    assert measured["task_vector_angles"] == [pytest.approx(math.acos(a @ b / a.norm() / b.norm()), rel=1e-3)]


@pytest.mark.parametrize("method", METHODS[:3], ids=named)
def test_a_student_merged_with_itself_is_that_student(
    method: dict, base: Path, pair: list[Path], tmp_path: Path
) -> None:
    """Evaluated in float32, a student is its base and its adapter, unrounded; a merge is stored as exactly."""
    spec, folder = method | {"dtype": "float32"}, tmp_path / "merged"
    folder.mkdir()
    recipe = Recipe("merged", 1, spec, {}, {})
    build_merged(Runtime(sources={"base": base}), recipe, dict.fromkeys(("student0", "student1"), pair[0]), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tuned, _ = open_student(pair[0], Runtime(sources={"base": base}), "float32")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        apart = (model(ids).logits - tuned(ids).logits).abs().max()
    assert apart <= (5e-5 if method.get("space") == "task_vectors" else 0)  # 0.7 x + 0.3 x is not quite x
    assert json.loads((folder / "merging.json").read_text())["dtype"] == "float32"


def test_wider_checkpoint(base: Path, pair: list[Path], tmp_path: Path) -> None:
    """Rounded, it is the one in the base's dtype; what is copied is exact; config and index say what is stored."""
    narrow, facts = merge(base, pair, SLERP, tmp_path / "narrow")
    wide, wide_facts = merge(base, pair, SLERP, tmp_path / "wide", "float32")
    assert facts == wide_facts and narrow.keys() == wide.keys()
    for name, tensor in wide.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor.bfloat16(), narrow[name]), name
    assert all(torch.equal(wide[name], narrow[name].float()) for name in facts["copied"])
    assert (tmp_path / "narrow" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "wide"))
    assert before["dtype"] == "bfloat16" and after == before | {"dtype": "float32"}
    assert {p.name for p in (tmp_path / "wide").iterdir()} == {p.name for p in base.iterdir()}
    index = tmp_path / "wide" / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(4 * x.numel() for x in wide.values())
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wide.items())


def test_three_students(base: Path, pair: list[Path], tmp_path: Path) -> None:
    third = student(base, LORA, 3, tmp_path / "third")
    found, facts = merge(base, [*pair, third], METHODS[2] | {"weights": [1.0, 1.0, 2.0]}, tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert len(facts["tensors"][name]["angles"]) == 3
    tensors = [student.read(name, tensors_of(base)[name])[1] for student in open_students([*pair, third])]
    expected = tensors_of(base)[name].float() + (tensors[0] + tensors[1] + 2 * tensors[2]) / 4
    assert ulps(found[name], expected.bfloat16()) <= 1


@pytest.mark.parametrize("adapter", [HEAD_AND_NORMS, FULL], ids=str)
def test_other_students_merge_too(adapter: dict, base: Path, pair: list[Path], tmp_path: Path) -> None:
    """Trained copies of norms and head, or a checkpoint of its own, beside a LoRA student."""
    other = student(base, adapter, 5, tmp_path / "other")
    expected = tensors_of(exported(other, base, tmp_path / "full", "bfloat16"))
    found, facts = merge(base, [other, pair[0]], SLERP | {"t": 0.0}, tmp_path / "merged")
    assert found.keys() == expected.keys()
    assert max(ulps(found[name], expected[name]) for name in found) <= 1
    assert "model.norm.weight" in facts["tensors"]


def test_what_cannot_be_merged_is_refused(base: Path, pair: list[Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "dora")
    path = tmp_path / "dora" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(UserError, match=r"student 1 \(dora\): its adapter has use_dora=True"):
        open_students([pair[0], tmp_path / "dora"])
    fewer = tmp_path / "fewer"
    shutil.copytree(base, fewer)
    config = json.loads((fewer / "config.json").read_text()) | {"num_hidden_layers": 4}
    for shard in fewer.glob("*.safetensors"):
        shard.unlink()
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": 3, "layer_types": None}))
    (fewer / "model.safetensors.index.json").unlink(missing_ok=True)
    small.save_pretrained(fewer)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"its adapter changes model\.layers\.3.* which the base does not have"):
        merge_checkpoints(Checkpoint(fewer), open_students(pair), SLERP, tmp_path / "out")
    with pytest.raises(UserError, match=r"model\.layers\.3.* is not in both it and the base"):
        merge_checkpoints(Checkpoint(base), open_students([fewer, pair[0]]), SLERP, tmp_path / "out")


def test_note_says_where_slerp_is_linear() -> None:
    tensors = {"a": {"angles": [0.001]}, "b": {"angles": [0.002]}, "c": {"angles": [0.5]}, "d": {"angles": [None]}}
    found = angles(tensors, "angles")
    assert found == {"median": 0.002, "max": 0.5, "nearly_parallel": 2, "measured": 3}
    wide = {"median": 1.5, "max": 1.6, "nearly_parallel": 0, "measured": 3}
    note = parallel_note(SLERP, {"weights": found, "task_vectors": wide})
    assert "2 of 3 tensors are nearly parallel, where SLERP is a linear interpolation" in note
    assert "median 0.115°, max 28.6° in weights" in note
    other = parallel_note(SLERP | {"space": "task_vectors"}, {"weights": found, "task_vectors": wide})
    assert "linear" not in other
