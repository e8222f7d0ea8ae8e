"""Every supported architecture as a random checkpoint of six blocks: scored, cut, opened by stock code, tuned."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from sdd.architectures import check_cut, explicit_config
from sdd.errors import UserError
from sdd.finetuning.adapters import adapted, causal_lm, merged, save_student
from sdd.finetuning.module import TrainingRow, loss_sum
from sdd.forward.batches import show_texts
from sdd.forward.bypass import Row
from sdd.forward.decoding import decode, keeps_all
from sdd.importance.removal import without_each
from sdd.importance.states import Angular, BlockInfluence, angular_distance, block_influence
from sdd.importance.weights import Taylor
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint, check_logits, decoder, head_logits, save_model
from sdd.pruning.depth import check_prunable, prune_checkpoint

BLOCKS = 6
WINDOW = 8
CUTS = {"span": [2, 3], "list": [0, 3, 5], "none": []}

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": WINDOW}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"sliding_window": WINDOW, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"use_sliding_window": True, "sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoXConfig", {"use_parallel_residual": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
}
DERIVED = {
    "qwen2": ["layer_types"],
    "gemma2": ["layer_types"],
    "gemma3": ["layer_types"],
    "smollm3": ["layer_types", "no_rope_layers"],
}
"""Lists that checkpoints on the hub leave to stock code; the random ones store them."""


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path], sizes: dict[str, Any]
) -> Callable[..., Path]:
    """`checkpoint(name, sharded=False)`: the folder of a random model, made once; read it, copy it."""
    made: dict[tuple[str, bool], Path] = {}

    def function(name: str, sharded: bool = False) -> Path:
        if (name, sharded) not in made:
            kind, options = ARCHITECTURES[name]
            config = getattr(transformers, kind)(**{**sizes, "num_hidden_layers": BLOCKS, **options})
            folder = tmp_path_factory.mktemp(name)
            made[name, sharded] = save_random(folder, config, **({"max_shard_size": "60KB"} if sharded else {}))
            assert len(list(folder.glob("*.safetensors"))) > 3 if sharded else (folder / "model.safetensors").is_file()
        return made[name, sharded]

    return function


def open_stock(folder: Path) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not found["missing_keys"], found
    assert not found["unexpected_keys"], found
    assert not found["mismatched_keys"], found
    return model.eval()


def cut_in_memory(model: Any, removed: list[int]) -> Any:
    """The model, its blocks' modules deleted and the kept ones renumbered; kinds follow where forward reads them."""
    kept = [block for block in range(BLOCKS) if block not in removed]
    layers = model.get_decoder().layers
    model.get_decoder().layers = torch.nn.ModuleList([layers[block] for block in kept])
    for index, layer in enumerate(model.get_decoder().layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[block] for block in kept]
    model.config.num_hidden_layers = len(kept)
    return model


def tokens(rows: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(6, 256, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens(), use_cache=False).logits
    return found


def generated(model: Any, use_cache: bool) -> list[int]:
    """Six tokens after a prompt that is longer than the window."""
    prompt = tokens(1, 11)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, eos_token_id=None, use_cache=use_cache
    )
    found: list[int] = out[0, 11:].tolist()
    assert len(found) == 6
    return found


# ---- the cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pruned_is_the_model_with_its_blocks_deleted(
    name: str, cut: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The list goes through several files and an index, the span through one file."""
    source, removed = checkpoint(name, sharded=cut == "list"), CUTS[cut]
    facts = prune_checkpoint(Checkpoint(source), tmp_path, removed)
    pruned, whole = open_stock(tmp_path), open_stock(source)
    if removed:
        assert not torch.allclose(logits(pruned), logits(whole), atol=1e-3)
        assert generated(pruned, use_cache=True) == generated(pruned, use_cache=False)
    assert torch.equal(logits(pruned), logits(cut_in_memory(whole, removed)))
    assert pruned.config.num_hidden_layers == len(checkpoints.blocks(pruned)) == BLOCKS - len(removed)
    assert facts["parameters_after"] == sum(p.numel() for p in pruned.parameters())


@pytest.mark.parametrize("removed", [[0], [1, 2], [5]], ids=str)
@pytest.mark.parametrize("name", DERIVED)
def test_kinds_that_follow_from_the_place_are_written_down(
    name: str, removed: list[int], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """With the kinds left to stock code, every block behind the cut would take its neighbour's."""
    source = shutil.copytree(checkpoint(name), tmp_path / "source")
    stored = json.loads((source / "config.json").read_text())
    for key in DERIVED[name]:
        del stored[key]
    if (pattern := stored.pop("_sliding_window_pattern", None)) is not None:
        stored["sliding_window_pattern"] = pattern
    (source / "config.json").write_text(json.dumps(stored))
    (tmp_path / "pruned").mkdir()
    prune_checkpoint(Checkpoint(source), tmp_path / "pruned", removed)
    written = json.loads((tmp_path / "pruned" / "config.json").read_text())
    whole = open_stock(source).config
    for key in DERIVED[name]:
        assert written[key] == [kind for block, kind in enumerate(getattr(whole, key)) if block not in removed]
    assert torch.equal(logits(open_stock(tmp_path / "pruned")), logits(cut_in_memory(open_stock(source), removed)))


def test_every_kth_block_sparse_becomes_a_list(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Blocks 1, 3 and 5 by the rule, less 1 by name; without block 0 the rule would name others."""
    prune_checkpoint(Checkpoint(checkpoint("qwen3_moe")), tmp_path, [0])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [0, 1, 3])
    kinds = [type(layer.mlp).__name__ for layer in checkpoints.blocks(open_stock(tmp_path))]
    assert kinds == ["Qwen3MoeMLP", "Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock", "Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock"]


# ---- what cannot be cut -----------------------------------------------------------------------------------------


def config_of(kind: str, sizes: dict[str, Any], **options: Any) -> dict[str, Any]:
    config = getattr(transformers, kind)(**{**sizes, "num_hidden_layers": BLOCKS, **options})
    return {**config.to_dict(), "architectures": [kind.replace("Config", "ForCausalLM")]}


def test_a_scale_that_follows_the_place_is_refused(sizes: dict[str, Any]) -> None:
    """Differential attention weighs its two maps by a constant of the block's place, and no config says otherwise."""
    config = explicit_config(config_of("DiffLlamaConfig", sizes), "here")
    with pytest.raises(
        UserError, match=r"here: DiffLlama\w+ .* block 1 at place 0 .*lambda_init.*not pruned"
    ) as caught:
        check_cut(config, [1, 2, 3, 4, 5], "here")
    assert "\n" not in str(caught.value)
    check_cut(config, [0, 1, 2], "here")


def test_experts_at_an_interval_are_refused_where_the_cut_shifts_it(sizes: dict[str, Any]) -> None:
    options = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_interval": 2}
    config = explicit_config(config_of("Ernie4_5_MoeConfig", sizes, **options, moe_layer_start_index=0), "here")
    with pytest.raises(UserError, match=r"Ernie4_5_MoeForCausalLM would make another block of block 1 at place 0"):
        check_cut(config, [1, 2, 3, 4, 5], "here")
    check_cut(config, [0, 1, 4, 5], "here")


def test_tensors_around_the_blocks_that_follow_their_number_are_refused(sizes: dict[str, Any]) -> None:
    options = {
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["full_attention"] * BLOCKS,
    }
    config = config_of("Gemma3nTextConfig", sizes, **options)
    config["intermediate_size"] = 48
    config["activation_sparsity_pattern"] = None
    with pytest.raises(UserError, match=r"more that depends on the number of blocks \(.*per_layer"):
        check_cut(explicit_config(config, "here"), [3, 4, 5], "here")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "images too": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_hidden_layers": 4}},
        "Gemma3ForConditionalGeneration reads more than text",
    ),
    "blocks under h": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel keeps its blocks under `h`"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "are quantised .* start from the unquantised"),
    "unheard of": ({"model_type": "llama9"}, "config.json does not open .model_type llama9 is not known"),
    "window of letters": ({"num_attention_heads": "many"}, "config.json does not open"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_in_one_line(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    changed, message = REFUSED[name]
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | changed
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        check_prunable(Checkpoint(source), [1])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.path={source}: ")


def test_constants_that_old_checkpoints_store_are_no_parameters(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Pythia's files hold each block's causal mask beside its weights: 4 million elements for a context of 2,048."""
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(checkpoint("gpt_neox"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for block in range(BLOCKS):
        attention = f"gpt_neox.layers.{block}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "pruned").mkdir()
    facts = prune_checkpoint(Checkpoint(source), tmp_path / "pruned", [1])
    for folder, key in ((checkpoint("gpt_neox"), "parameters_before"), (tmp_path / "pruned", "parameters_after")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert facts[key] == sum(p.numel() for p in model.parameters())


# ---- states and logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_of_the_states_around_each_block(name: str, checkpoint: Callable[..., Path]) -> None:
    """Against the states that stock code hands out, the last one with the final norm taken out."""
    model = Checkpoint(checkpoint(name)).model("float32", attention="eager")
    rows = [row.tolist() for row in tokens(3, 20)]
    angular, influence = Angular(), BlockInfluence()
    for criterion in (angular, influence):
        criterion.start(BLOCKS)
        show_texts(model, criterion, rows, batch_size=2)
    body = decoder(model)
    norm = "norm" if hasattr(body, "norm") else "final_layer_norm"
    setattr(body, norm, torch.nn.Identity())
    with torch.no_grad():
        states = torch.stack(body(tokens(3, 20), output_hidden_states=True).hidden_states).double()
    assert len(states) == BLOCKS + 1
    table = angular.scores()["distance"]
    for size in (1, 2, 5):
        expected = angular_distance(states[:-size, :, -1], states[size:, :, -1]).mean(-1)
        assert table[str(size)] == pytest.approx(expected.tolist(), rel=1e-4)
    expected = block_influence(states[:-1], states[1:]).mean((1, 2))
    assert influence.scores()["distance"]["1"] == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_passed_over_is_as_good_as_deleted(name: str, checkpoint: Callable[..., Path]) -> None:
    """Block 4 is gone already; what enters block 2 is kept, so that 0 to 2 are not run to measure 2 gone as well."""
    model = Checkpoint(checkpoint(name)).model("float32", attention="eager")
    whole, each = without_each(model, [Row(row) for row in tokens().tolist()], [4], batch_size=2)
    for removed, quality in (([4], whole), ([2, 4], each[2]), ([4, 5], each[5])):
        cut = logits(cut_in_memory(open_stock(checkpoint(name)), removed))[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(cut.double(), tokens()[:, 1:].flatten())
        assert quality.log_perplexity == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_taylor_scores_are_those_of_all_gradients_at_once(name: str, checkpoint: Callable[..., Path]) -> None:
    model = Checkpoint(checkpoint(name)).model("float32", attention="eager")
    made = model(tokens(), use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(made, tokens()[:, 1:].flatten()).backward()
    weights = [[p for p in layer.parameters() if p.grad is not None] for layer in checkpoints.blocks(model)]
    expected = [sum(float((p.grad * p.detach()).abs().sum()) for p in block) for block in weights]
    model.zero_grad()
    criterion = Taylor()
    criterion.start(BLOCKS)
    criterion.measure(model, [Row(row) for row in tokens().tolist()], batch_size=3)
    assert criterion.scores()["distance"]["1"] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_logits_are_the_models_own(name: str, checkpoint: Callable[..., Path]) -> None:
    model = Checkpoint(checkpoint(name)).model("float32", attention="eager")
    hidden = decoder(model)(tokens(), use_cache=False).last_hidden_state
    assert torch.allclose(head_logits(model, hidden.flatten(0, 1)), logits(model).flatten(0, 1), rtol=1e-5, atol=1e-5)
    check_logits(model)


STOCK_CACHES = {"mistral", "qwen2", "gemma2", "gemma3", "phi3", "smollm3", "mixtral"}
"""With a sliding window in some block or all, which is not a cache of one key and value a token."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_full_batch_says_what_stock_generation_says(name: str, checkpoint: Callable[..., Path]) -> None:
    model = Checkpoint(checkpoint(name)).model("float32", attention="eager")
    assert keeps_all(model) is (name not in STOCK_CACHES)
    if keeps_all(model):
        rows = [tokens(1, 11)[0].tolist(), *tokens(2, 7).tolist()]
        answers = dict(decode(model, rows, 6, [], batch_size=2))
        assert answers[0] == generated(model, use_cache=True)
        assert answers == dict(decode(model, rows, 6, [], batch_size=1))


def test_logits_made_otherwise_are_refused(tiny_llama: Path) -> None:
    model = Checkpoint(tiny_llama).model("float32")
    model.register_forward_hook(lambda module, given, out: type(out)(logits=out.logits * 2))
    with pytest.raises(UserError, match="LlamaForCausalLM makes its logits in a way that is not known here"):
        check_logits(model)


def test_a_soft_cap_in_the_attention_is_never_left_out(
    save_random: Callable[..., Path], sizes: dict[str, Any], tmp_path: Path
) -> None:
    """SDPA cannot cap scores; asked for, or by default, it would make another model of Gemma 2."""
    source = save_random(tmp_path, transformers.Gemma2Config(**sizes, attn_logit_softcapping=0.1))
    eager, sdpa = (
        logits(AutoModelForCausalLM.from_pretrained(source, attn_implementation=kind).eval())
        for kind in ("eager", "sdpa")
    )
    assert not torch.allclose(eager, sdpa, atol=1e-2), "the case cannot tell them apart"
    for asked in (None, "sdpa", "eager"):
        assert torch.equal(logits(Checkpoint(source).model("float32", attention=asked)), eager)


# ---- tuning and export ------------------------------------------------------------------------------------------

ROWS = [TrainingRow(row, 4) for row in tokens(4, 16).tolist()]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}


def trained(student: Any, steps: int = 3) -> list[float]:
    """Losses per token before each of a few steps on the same rows, the student in evaluation mode before and after."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss, count = loss_sum(causal_lm(student), ROWS)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() / count)
    return losses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_trains_the_adapter_alone_and_leaves_as_a_stock_checkpoint(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(name)
    (tmp_path / "pruned").mkdir()
    prune_checkpoint(Checkpoint(source), tmp_path / "pruned", CUTS["span"])
    model = Checkpoint(tmp_path / "pruned").model("float32", attention="eager")
    before = logits(model)
    student = adapted(model, LORA, None)
    frozen = {key: p.clone() for key, p in student.named_parameters() if not p.requires_grad}
    losses = trained(student)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert {key.split(".")[-3] for key, p in student.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(torch.equal(p, frozen[key]) for key, p in student.named_parameters() if key in frozen)
    tuned = logits(student)
    assert not torch.allclose(tuned, before, atol=1e-2)
    save_student(student, tmp_path, Checkpoint(tmp_path / "pruned"), "pruned/address")
    whole = merged(Checkpoint(tmp_path / "pruned").model("float32", attention="eager"), tmp_path / "adapter")
    save_model(whole, tmp_path / "exported", Checkpoint(tmp_path / "pruned"))
    exported = open_stock(tmp_path / "exported")
    assert torch.allclose(logits(exported), tuned, rtol=1e-3, atol=1e-3)
    assert len(checkpoints.blocks(exported)) == BLOCKS - 2


def test_code_that_a_phi_names_is_neither_run_nor_named_again(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Phi-3's repositories name code beside a stock class: stock code opens them, and what is made of them."""
    source = Path(shutil.copytree(checkpoint("phi3"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": named}))
    (source / "code.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    pruned, saved = tmp_path / "pruned", tmp_path / "saved"
    pruned.mkdir()
    prune_checkpoint(Checkpoint(source), pruned, [2])
    model = Checkpoint(source).model("float32")
    assert torch.equal(logits(model), logits(Checkpoint(checkpoint("phi3")).model("float32")))
    save_model(model, saved, Checkpoint(source))
    for folder in (pruned, saved):
        assert "auto_map" not in (folder / "config.json").read_text()
        assert not list(folder.glob("*.py"))
        assert type(open_stock(folder)).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()
