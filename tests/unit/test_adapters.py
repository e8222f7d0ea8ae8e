"""What each adapter trains, what it leaves alone, and that what was trained is what is stored and opened again."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig

from sdd.errors import UserError
from sdd.finetuning.adapters import adapted, beside_cut, causal_lm, merged, save_student
from sdd.finetuning.module import TrainingRow, loss_sum
from sdd.models.checkpoints import Checkpoint, recompute_activations, save_model
from sdd.pruning.depth import prune_checkpoint
from sdd.stages.runtime import Runtime
from sdd.stages.student import open_student
from sdd.stages.tuned import build as build_tuned
from sdd.store import SCRATCH, Recipe, digest_of
from sdd.store.files import write_json, write_jsonl
from sdd.tiny.tasks import instances

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}
HEAD_AND_NORMS = {"method": "head_and_norms"}
FULL = {"method": "full"}
IDS = torch.randint(6, 256, (3, 20), generator=torch.Generator().manual_seed(1))
ROWS = [TrainingRow(row, 5) for row in IDS.tolist()]


@pytest.mark.parametrize(
    ("kept", "removed", "reach", "expected"),
    [
        ([0, 1, 4, 5], [2, 3], 1, [1, 2]),
        ([0, 1, 4, 5], [2, 3], 2, [0, 1, 2, 3]),
        ([0, 1, 4, 5], [2, 3], 9, [0, 1, 2, 3]),
        ([2, 3, 4], [0, 1], 1, [0]),
        ([0, 1, 2], [3], 1, [2]),
        ([1, 3, 4, 5, 6], [0, 2, 7], 1, [0, 1, 4]),
        ([0, 1], [], 1, []),
    ],
)
def test_blocks_beside_the_cut_by_hand(kept: list[int], removed: list[int], reach: int, expected: list[int]) -> None:
    assert beside_cut(kept, removed, reach) == expected


def opened(folder: Path) -> Any:
    return Checkpoint(folder).model("float32", attention="sdpa")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def step(student: Any, learning_rate: float = 1e-2) -> float:
    """One step of the optimiser; the loss per token before it."""
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=learning_rate)
    loss, count = loss_sum(causal_lm(student), ROWS)
    (loss / count).backward()
    optimizer.step()
    student.zero_grad(set_to_none=True)
    return loss.item() / count


def trained_names(student: Any) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


# ---- scopes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("places", [[3], [1, 2]], ids=str)
def test_lora_goes_into_the_blocks_named_and_no_others(places: list[int], targets: list[str], tiny_llama: Path) -> None:
    student = adapted(opened(tiny_llama), LORA | {"targets": targets}, places)
    names = trained_names(student)
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == set(places)
    assert len(names) == 2 * len(places) * (7 if targets == ["all-linear"] else 2)


def test_all_linear_by_name_is_what_peft_makes_of_it(tiny_llama: Path) -> None:
    named, whole = (trained_names(adapted(opened(tiny_llama), LORA, places)) for places in ([0, 1, 2, 3], None))
    assert named == whole


def test_no_gradient_flows_below_the_last_blocks(tiny_llama: Path) -> None:
    """Neither with recomputed activations: an embedding that asks for one would cost the frozen blocks' backward."""
    model = opened(tiny_llama)
    student = adapted(model, LORA, [3]).train()
    recompute_activations(model)
    entering: list[bool] = []
    for layer in causal_lm(student).model.layers:
        layer.register_forward_hook(lambda module, given, out: entering.append(out.requires_grad))
    loss_sum(causal_lm(student), ROWS)
    assert entering == [False, False, False, True]


# ---- head and norms ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path], sizes: Any) -> Path:
    return save_random(tmp_path_factory.mktemp("gemma"), Gemma2Config(**sizes, final_logit_softcapping=5.0))


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path], sizes: Any) -> Path:
    return save_random(tmp_path_factory.mktemp("neox"), GPTNeoXConfig(**sizes))


@pytest.mark.parametrize("name", ["tiny_llama", "sharded_llama", "gemma", "neox"])
def test_head_and_norms_are_trained_and_nothing_else(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A tied head (Llama here, Gemma) stays one matrix with the embeddings, through storing and merging."""
    source: Path = request.getfixturevalue(name)
    before = opened(source)
    untouched = {key: tensor.clone() for key, tensor in before.state_dict().items()}
    tied = before.get_output_embeddings().weight is before.get_input_embeddings().weight
    assert tied == (name in ("tiny_llama", "gemma"))
    student = adapted(opened(source), HEAD_AND_NORMS, None)
    losses = [step(student) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    save_student(student, tmp_path, Checkpoint(source), "pruned/address")
    model = merged(opened(source), tmp_path / "adapter")
    assert torch.equal(logits(model), logits(student))
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, untouched[key])}
    heads = {"tiny_llama": {"lm_head", "model.embed_tokens"}, "sharded_llama": {"lm_head"}, "neox": {"lm_head"}}
    expected = heads.get(name, heads["tiny_llama"])
    assert {key.removesuffix(".weight") for key in changed if "norm" not in key} == expected
    norms = {key for key in untouched if "norm" in key}
    assert norms and norms <= changed
    save_model(model, tmp_path / "exported", Checkpoint(source))
    attention = before.config._attn_implementation  # eager where SDPA would leave out a soft cap
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation=attention).eval()
    assert torch.equal(logits(exported), logits(student))
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in before.parameters())


def test_a_tie_that_peft_cannot_keep_is_refused(
    save_random: Callable[..., Path], sizes: dict[str, Any], tmp_path: Path
) -> None:
    source = save_random(tmp_path, GPTNeoXConfig(**sizes, tie_word_embeddings=True))
    with pytest.raises(UserError, match="GPTNeoXForCausalLM ties its head to embed_in"):
        adapted(opened(source), HEAD_AND_NORMS, None)


@pytest.mark.parametrize("name", ["tiny_llama", "gemma", "neox"])
@pytest.mark.parametrize("adapter", [LORA, HEAD_AND_NORMS, FULL], ids=["lora", "head_and_norms", "full"])
def test_what_is_trained_is_held_in_float32(adapter: dict[str, Any], name: str, request: pytest.FixtureRequest) -> None:
    """Beside a base in bfloat16, as with finetune.precision=bf16."""
    source: Path = request.getfixturevalue(name)
    student = adapted(Checkpoint(source).model("bfloat16", attention="sdpa"), adapter, None)
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(step(student, learning_rate=0.1))
    assert losses[-1] < losses[0]


# ---- recomputed activations -------------------------------------------------------------------------------------


def gradients(folder: Path, adapter: dict[str, Any], recompute: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one batch by name, and how often a block's MLP ran for it."""
    model = opened(folder)
    torch.manual_seed(0)
    student = adapted(model, adapter, None).train()
    if recompute:
        recompute_activations(model)
    runs: list[int] = []
    causal_lm(student).get_decoder().layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss_sum(causal_lm(student), ROWS)[0].backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, len(runs)


@pytest.mark.parametrize("name", ["tiny_llama", "gemma", "neox"])
@pytest.mark.parametrize("adapter", [LORA, HEAD_AND_NORMS, FULL], ids=["lora", "head_and_norms", "full"])
def test_recomputed_activations_give_equal_gradients(
    adapter: dict[str, Any], name: str, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(name)
    (kept, once), (recomputed, twice) = (gradients(source, adapter, recompute) for recompute in (False, True))
    assert (once, twice) == (1, 2)
    assert set(kept) == set(recomputed)
    assert all(torch.equal(gradient, recomputed[key]) for key, gradient in kept.items())
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in kept.values())


# ---- the stage --------------------------------------------------------------------------------------------------

FINETUNE = {
    "epochs": 2,
    "learning_rate": 1e-2,
    "batch_size": 4,
    "max_length": 256,
    "num_rows": 8,
    "validation_rows": 2,
    "warmup_share": 0.2,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
}


def recipe(adapter: dict[str, Any], quantisation: str | None = None) -> Recipe:
    targets = Recipe("targets", 1, {"mode": "sft"}, {}, {})
    pruned = Recipe("pruned", 1, {"blocks": [1]}, {}, {})
    spec = {
        "adapter": adapter,
        "base_quantisation": quantisation,
        "precision": "32",
        "finetune": FINETUNE,
        "system_prompt": None,
        "seed": 0,
    }
    return Recipe("tuned", 1, spec, {"targets": targets, "pruned": pruned}, {})


@pytest.fixture(scope="module")
def inputs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Blocks 0, 2 and 3 of the small Llama, block 1 removed, and a few targets."""
    store = tmp_path_factory.mktemp("store")
    pruned, targets = store / "pruned" / ("a" * 16), store / "targets" / "rows"
    pruned.mkdir(parents=True)
    write_json(pruned / "pruning.json", prune_checkpoint(Checkpoint(tiny_llama), pruned, [1]))
    targets.mkdir(parents=True)
    rows = [{"id": task.id, "prompt": task.prompt, "target": task.reference} for task in instances("pool", 0, 12)]
    write_jsonl(targets / "train.jsonl", rows)
    return {"targets": targets, "pruned": pruned}


def tune(inputs: dict[str, Path], made: Recipe, name: str, runtime: Runtime | None = None) -> Path:
    folder = inputs["pruned"].parent.parent / "tuned" / digest_of(name)[:16]
    (folder / SCRATCH).mkdir(parents=True)
    build_tuned(runtime or Runtime(), made, inputs, folder)
    facts = {"stage": "tuned", "address": folder.name, "inputs": {"pruned": inputs["pruned"].name}, "spec": made.spec}
    write_json(folder / "manifest.json", facts)
    return folder


def losses(folder: Path) -> list[float]:
    return [float(line.split(",")[2]) for line in (folder / "history.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize(
    ("scope", "blocks", "places"),
    [("last", 2, {1, 2}), ("beside_cut", 1, {0, 1})],
)
def test_a_scope_is_of_the_pruned_models_blocks(
    scope: str, blocks: int, places: set[int], inputs: dict[str, Path]
) -> None:
    folder = tune(inputs, recipe(LORA | {"scope": scope, "blocks": blocks}), scope)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert set(config["layers_to_transform"]) == places
    untouched, student = opened(inputs["pruned"]), open_student(folder, Runtime(), "float32")[0]
    for place, (a, b) in enumerate(zip(untouched.model.layers, student.model.layers, strict=True)):
        same = all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert same == (place not in places), place


def test_full_fine_tuning_leaves_a_stock_checkpoint(inputs: dict[str, Path]) -> None:
    folder = tune(inputs, recipe(FULL), "full")
    assert losses(folder)[-1] < losses(folder)[0]
    assert not (folder / "adapter").exists()
    untouched = opened(inputs["pruned"]).state_dict()
    student, base = open_student(folder, Runtime(), "float32")
    assert not any(torch.equal(tensor, untouched[name]) for name, tensor in student.state_dict().items())
    stock = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", attn_implementation="sdpa").eval()
    assert torch.equal(logits(stock), logits(student))
    assert (base.folder / "chat_template.jinja").read_bytes() == (inputs["pruned"] / "chat_template.jinja").read_bytes()
    names = {path.suffix for path in (folder / "checkpoint").iterdir()}
    assert ".safetensors" in names
    assert not names & {".bin", ".pt", ".pth", ".pkl"}


def test_recomputed_activations_are_no_part_of_the_result(inputs: dict[str, Path]) -> None:
    runtime = Runtime(gradient_checkpointing=True)
    kept = tune(inputs, recipe(LORA), "kept")
    recomputed = tune(inputs, recipe(LORA), "recomputed", runtime)
    assert dataclasses.replace(runtime, gradient_checkpointing=False) == Runtime()
    for name in ("history.csv", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (kept / name).read_bytes() == (recomputed / name).read_bytes()


def test_a_base_in_four_bits_trains_an_adapter_for_the_whole_one(inputs: dict[str, Path]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    small = Checkpoint(inputs["pruned"]).model("float32", attention="sdpa", quantisation="nf4")
    kinds = {name.rsplit(".", 1)[-1]: type(module) for name, module in small.named_modules()}
    assert kinds["q_proj"] is kinds["down_proj"] is bitsandbytes.nn.Linear4bit
    assert kinds["lm_head"] is torch.nn.Linear
    assert small.model.layers[0].mlp.up_proj.weight.quant_type == "nf4"
    assert not torch.allclose(logits(small), logits(opened(inputs["pruned"])), atol=1e-2)
    state = small.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.nested, state.absmax.dtype) == (True, torch.uint8), "a pass leaves the weights as they were"
    folder = tune(inputs, recipe(LORA, "nf4"), "nf4")
    assert losses(folder)[-1] < losses(folder)[0]
    assert losses(folder)[0] != losses(tune(inputs, recipe(LORA), "unquantised"))[0]
    student, _ = open_student(folder, Runtime(), "float32")
    whole = merged(opened(inputs["pruned"]), folder / "adapter")
    assert torch.equal(logits(student), logits(whole))
    assert {type(module) for module in student.modules() if hasattr(module, "in_features")} == {torch.nn.Linear}


# ---- opening ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [LORA, HEAD_AND_NORMS], ids=["lora", "head_and_norms"])
def test_merging_layer_by_layer_is_merging_in_float32_and_rounding_once(
    adapter: dict[str, Any], stored: str, target: str, sharded_llama: Path, tmp_path: Path
) -> None:
    """Bit for bit; and but for the layer in hand nothing is in float32 that is not to stay so."""
    from peft.tuners.lora.layer import Linear

    base, tuned = tmp_path / "pruned" / ("a" * 16), tmp_path / "tuned" / ("b" * 16)
    save_model(Checkpoint(sharded_llama).model(stored, attention="sdpa"), base, Checkpoint(sharded_llama))
    student = adapted(opened(base), adapter, None)
    for _ in range(2):
        step(student)
    save_student(student, tuned, Checkpoint(base), f"pruned/{base.name}")
    facts = {"stage": "tuned", "address": tuned.name, "inputs": {"pruned": base.name}, "spec": {}}
    write_json(tuned / "manifest.json", facts)
    expected = {
        name: tensor.to(getattr(torch, target))
        for name, tensor in merged(opened(base), tuned / "adapter").named_parameters()
    }
    wide: list[int] = []
    merge = Linear.merge

    def merging(self: Any, *rest: Any) -> None:
        shown = [weight for name, weight in watched[0].named_parameters() if "lora_" not in name]
        wide.append(sum(weight.dtype == torch.float32 for weight in shown))
        merge(self, *rest)

    watched: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        model_of = Checkpoint.model
        patch.setattr(Checkpoint, "model", lambda *a, **k: watched.append(model_of(*a, **k)) or watched[0])
        patch.setattr(Linear, "merge", merging)
        model, _ = open_student(tuned, Runtime(), target)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype for name, tensor in found.items()
    )
    stock = Checkpoint(base).model(target, attention="sdpa")
    assert {n: b.dtype for n, b in model.named_buffers()} == {n: b.dtype for n, b in stock.named_buffers()}
    if adapter is LORA and stored == target == "bfloat16":
        assert set(wide) == {1}
