"""Pruned checkpoints against the same model with its blocks deleted in memory, and the bytes they are made of."""

import json
import math
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sdd.architectures import cut_config
from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint
from sdd.pruning import depth as pruning
from sdd.pruning.depth import prune_checkpoint
from sdd.store import hashed
from sdd.store.hashed import HashedFile

BLOCKS = 4
CUTS = [[0], [1, 2], [2, 3], [0, 2], [0, 1, 3], [3], []]


@pytest.fixture(params=["tiny_llama", "sharded_llama"])
def source(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "pruned"
    folder.mkdir()
    return folder


def open_stock(folder: Path) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"], found
    assert not found["unexpected_keys"], found
    assert not found["mismatched_keys"], found
    return model.eval()


def cut_in_memory(folder: Path, removed: list[int]) -> Any:
    """The model without the blocks; `layer_types` follow, as the forward pass reads them from the config."""
    model = open_stock(folder)
    kept = [block for block in range(model.config.num_hidden_layers) if block not in removed]
    model.model.layers = torch.nn.ModuleList([model.model.layers[block] for block in kept])
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[block] for block in kept]
    model.config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def logits(model: Any, length: int = 24) -> torch.Tensor:
    ids = torch.randint(6, 256, (3, length), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def headers(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found[path.name] = json.loads(data[8 : 8 + length])
    return found


def stored_names(folder: Path) -> list[str]:
    return [name for header in headers(folder).values() for name in header if name != "__metadata__"]


# ---- the model that comes out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", CUTS, ids=str)
def test_logits_equal_the_model_with_its_blocks_deleted(source: Path, target: Path, removed: list[int]) -> None:
    facts = prune_checkpoint(Checkpoint(source), target, removed)
    pruned = open_stock(target)
    assert torch.equal(logits(pruned), logits(cut_in_memory(source, removed)))
    kept = [block for block in range(BLOCKS) if block not in removed]
    assert (facts["removed_blocks"], facts["kept_blocks"]) == (removed, kept)
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == len(kept)
    if removed:
        assert not torch.allclose(logits(pruned), logits(open_stock(source)), atol=1e-2)


def test_removing_nothing_leaves_the_logits_unchanged(source: Path, target: Path) -> None:
    facts = prune_checkpoint(Checkpoint(source), target, [])
    assert torch.equal(logits(open_stock(target)), logits(open_stock(source)))
    assert facts["flops_saved"] == 0
    assert facts["parameters_after"] == facts["parameters_before"]


def test_generation_is_the_same_with_and_without_a_cache(source: Path, target: Path) -> None:
    """A hole in `layer_idx` shows here: the cache of a block would be another's, or not there."""
    prune_checkpoint(Checkpoint(source), target, [0, 2])
    model = open_stock(target)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    prompt = torch.tensor([[1, 40, 90, 121, 77]])
    outputs = [model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*outputs)
    assert outputs[0].shape == (1, 25)


def test_tokenizer_and_chat_template_come_along(source: Path, target: Path) -> None:
    prune_checkpoint(Checkpoint(source), target, [1])
    chat = [{"role": "user", "content": "Sort these letters: c a b"}]
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, target))
    assert after.apply_chat_template(chat)["input_ids"] == before.apply_chat_template(chat)["input_ids"]
    assert after.eos_token == before.eos_token
    assert (target / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


# ---- per-block lists of the config ------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False], ids=["layer_types stored", "layer_types derived"])
@pytest.mark.parametrize("removed", [[0], [1, 2], [0, 3], [3]], ids=str)
@pytest.mark.parametrize("family", [Qwen3Config, Gemma2Config, Qwen2Config])
def test_every_block_keeps_its_kind_of_attention(
    family: Any,
    removed: list[int],
    explicit: bool,
    save_random: Callable[..., Path],
    sizes: dict[str, Any],
    tmp_path: Path,
    target: Path,
) -> None:
    """Hub checkpoints of Gemma 2 store no `layer_types`: the kinds follow from the index, which pruning shifts."""
    options = {} if family is Gemma2Config else {"use_sliding_window": True, "max_window_layers": 2}
    mixed = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}
    options |= mixed if explicit and family is Qwen3Config else {}
    config = family(**sizes, sliding_window=4, **options)
    source = save_random(tmp_path / "source", config)
    kinds = list(config.layer_types)
    assert set(kinds) == {"full_attention", "sliding_attention"}
    if not explicit:
        stored = json.loads((source / "config.json").read_text())
        del stored["layer_types"]
        (source / "config.json").write_text(json.dumps(stored))
    prune_checkpoint(Checkpoint(source), target, removed)
    pruned = open_stock(target)
    assert pruned.config.layer_types == [kinds[block] for block in range(BLOCKS) if block not in removed]
    assert torch.equal(logits(pruned), logits(cut_in_memory(source, removed)))


def test_only_lists_of_blocks_are_cut() -> None:
    config = {
        "num_hidden_layers": 3,
        "eos_token_id": [7, 8, 9],
        "layer_types": ["a", "b", "c"],
        "no_rope_layers": [1, 0, 1],
        "hidden_size": 32,
    }
    untouched = json.dumps(config)
    cut = cut_config(config, [0, 2])
    assert cut == {
        "num_hidden_layers": 2,
        "eos_token_id": [7, 8, 9],
        "layer_types": ["a", "c"],
        "no_rope_layers": [1, 1],
        "hidden_size": 32,
    }
    assert json.dumps(config) == untouched, "the argument stays as it was"


def test_blocks_named_by_index_are_renumbered(
    save_random: Callable[..., Path], sizes: dict[str, Any], tmp_path: Path, target: Path
) -> None:
    """Mixture-of-experts configs list the blocks that are dense; with stale numbers the tensors do not fit."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    source = save_random(tmp_path / "source", Qwen3MoeConfig(**sizes, **experts, mlp_only_layers=[0, 3]))
    prune_checkpoint(Checkpoint(source), target, [1])
    pruned = open_stock(target)
    assert pruned.config.mlp_only_layers == [0, 2]
    assert torch.equal(logits(pruned), logits(cut_in_memory(source, [1])))


# ---- bytes ------------------------------------------------------------------------------------------------------


def test_offsets_are_contiguous_and_headers_aligned(source: Path, target: Path) -> None:
    prune_checkpoint(Checkpoint(source), target, [0, 2])
    for path in sorted(target.glob("*.safetensors")):
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert length % 8 == 0
        entries = [entry for name, entry in headers(target)[path.name].items() if name != "__metadata__"]
        at = 0
        for entry in sorted(entries, key=lambda entry: entry["data_offsets"][0]):
            assert entry["data_offsets"][0] == at
            at = entry["data_offsets"][1]
        assert 8 + length + at == path.stat().st_size
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_the_index_names_every_tensor_where_it_is(sharded_llama: Path, target: Path) -> None:
    assert len(headers(sharded_llama)) > 3
    prune_checkpoint(Checkpoint(sharded_llama), target, [1])
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found = headers(target)
    for header in found.values():
        header.pop("__metadata__")
    assert index["weight_map"] == {name: file for file, header in found.items() for name in header}
    ranges = [entry["data_offsets"] for header in found.values() for entry in header.values()]
    assert index["metadata"]["total_size"] == sum(end - begin for begin, end in ranges)


def test_a_file_without_kept_tensors_is_left_out(sharded_llama: Path, target: Path) -> None:
    prune_checkpoint(Checkpoint(sharded_llama), target, [1, 2, 3])
    assert all(len(header) > 1 for header in headers(target).values())
    assert len(headers(target)) < len(headers(sharded_llama))
    open_stock(target)


def test_one_numbered_file_with_an_index_stays_readable(sharded_llama: Path, tmp_path: Path, target: Path) -> None:
    """Some hub checkpoints come as model-00001-of-00001.safetensors; stock loading finds it by the index only."""
    source = tmp_path / "source"
    model = open_stock(sharded_llama)
    model.save_pretrained(source)
    name = "model-00001-of-00001.safetensors"
    (source / "model.safetensors").rename(source / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(headers(source)[name], name)}
    index["weight_map"].pop("__metadata__")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    prune_checkpoint(Checkpoint(source), target, [1])
    assert torch.equal(logits(open_stock(target)), logits(cut_in_memory(sharded_llama, [1])))


def test_weights_beside_the_stock_ones_are_not_read(tiny_llama: Path, tmp_path: Path, target: Path) -> None:
    """Some hub folders hold the weights a second time, in another naming; stock loading reads model.safetensors."""
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    shutil.copyfile(source / "model.safetensors", source / "consolidated.safetensors")
    facts = prune_checkpoint(Checkpoint(source), target, [1])
    assert facts["parameters_before"] == Checkpoint(tiny_llama).num_parameters
    assert list(headers(target)) == ["model.safetensors"]
    open_stock(target)


def test_tied_embeddings_are_stored_once(tiny_llama: Path, target: Path) -> None:
    prune_checkpoint(Checkpoint(tiny_llama), target, [1])
    names = stored_names(target)
    assert len(names) == len(set(names))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    pruned = open_stock(target)
    assert pruned.lm_head.weight.data_ptr() == pruned.model.embed_tokens.weight.data_ptr()


def test_memory_is_bounded_by_the_chunk(tiny_llama: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding alone has 98 KB; with chunks of 4 KB the whole copy stays far below it."""
    whole = target.parent / "whole"
    whole.mkdir()
    prune_checkpoint(Checkpoint(tiny_llama), whole, [1])
    biggest = max(parameter.nbytes for parameter in open_stock(tiny_llama).parameters())
    for module in (pruning, hashed):
        monkeypatch.setattr(module, "CHUNK", 4096)
    position = {0: 0, 2: 1, 3: 2}

    def kept(name: str) -> pruning.Part | None:
        new = pruning.renamed(name, position)
        return None if new is None else pruning.Part(new)

    tracemalloc.start()
    try:
        pruning._stream(tiny_llama / "model.safetensors", target / "model.safetensors", kept)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    headers_and_buffers = 60_000
    assert peak < headers_and_buffers < biggest, f"{peak} bytes were held"


# ---- counts -----------------------------------------------------------------------------------------------------


def test_parameter_counts_are_the_models_own(source: Path, target: Path) -> None:
    facts = prune_checkpoint(Checkpoint(source), target, [1, 2])
    before, after = (sum(p.numel() for p in open_stock(folder).parameters()) for folder in (source, target))
    assert (facts["parameters_before"], facts["parameters_after"]) == (before, after)
    assert facts["flops_saved"] == (before - after) / before
    block = sum(p.numel() for p in open_stock(source).model.layers[0].parameters())
    assert before - after == 2 * block


def test_a_tied_head_that_is_stored_twice_is_counted_once(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(tiny_llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert Checkpoint(source).num_parameters == Checkpoint(tiny_llama).num_parameters


def test_flops_saved_is_the_published_figure_for_llama_3_1_8b(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 of 32 blocks: 6 * 218,112,000 / 8,030,261,248 = 16.30%. The tensors' bytes are a hole in a sparse file."""
    hidden, middle, narrow, vocabulary = 4096, 14336, 1024, 128256
    block = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [narrow, hidden],
        "self_attn.v_proj": [narrow, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [middle, hidden],
        "mlp.up_proj": [middle, hidden],
        "mlp.down_proj": [hidden, middle],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    shapes = {"model.embed_tokens": [vocabulary, hidden], "lm_head": [vocabulary, hidden], "model.norm": [hidden]}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in block.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    source = tmp_path / "source"
    source.mkdir()
    _replace_header(source / "model.safetensors", text)
    os.truncate(source / "model.safetensors", 8 + len(text) + end)
    wide = {"hidden_size": hidden, "intermediate_size": middle, "num_key_value_heads": 8, "vocab_size": vocabulary}
    LlamaConfig(**wide, num_hidden_layers=32, architectures=["LlamaForCausalLM"]).save_pretrained(source)

    def skip(writer: HashedFile, reader: Any, length: int) -> None:
        writer.flush()
        writer.file.seek(writer.file.truncate(writer.file.tell() + length))

    monkeypatch.setattr(HashedFile, "copy", skip)
    facts = prune_checkpoint(Checkpoint(source), target, list(range(22, 28)))
    assert facts["parameters_before"] == 8_030_261_248
    assert facts["parameters_before"] - facts["parameters_after"] == 6 * 218_112_000
    assert round(100 * facts["flops_saved"], 2) == 16.30


# ---- what cannot be pruned --------------------------------------------------------------------------------------


def _shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def _replace_header(path: Path, text: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def _rename_blocks(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"model.layers.3.", b"model.layers.7."))


def _edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "data cut off": (lambda f: _shorten(f / "model.safetensors", 100), "model.safetensors: damaged .* data are cut"),
    "header cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:200]),
        "model.safetensors: damaged .* header is cut",
    ),
    "almost empty": (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "model.safetensors: damaged"),
    "no JSON": (lambda f: _replace_header(f / "model.safetensors", b"{not json"), "model.safetensors: damaged"),
    "no UTF-8": (lambda f: _replace_header(f / "model.safetensors", b'{"\xff\xfe": 1}'), "model.safetensors: damaged"),
    "a list": (lambda f: _replace_header(f / "model.safetensors", b"[1, 2]"), "model.safetensors: damaged"),
    "entry without offsets": (
        lambda f: _replace_header(f / "model.safetensors", b'{"a": {"shape": [1]}}'),
        "model.safetensors: damaged",
    ),
    "entry with odd offsets": (
        lambda f: _replace_header(f / "model.safetensors", b'{"a": {"shape": [1], "data_offsets": ["0", 4]}}'),
        "model.safetensors: damaged",
    ),
    "entry ends before it begins": (
        lambda f: _replace_header(f / "model.safetensors", b'{"a": {"shape": [1], "data_offsets": [9, 0]}}'),
        "model.safetensors: damaged",
    ),
    "other block names": (lambda f: _rename_blocks(f / "model.safetensors"), "layers.0 to layers.3"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pickled .pytorch_model.bin.*convert them to safetensors",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not"),
    "encoder": (
        lambda f: _edit_config(f, architectures=["BertForMaskedLM"]),
        "BertForMaskedLM is not a causal language model",
    ),
    "no architecture": (lambda f: _edit_config(f, architectures=None), "not a causal language model"),
    "no depth": (lambda f: _edit_config(f, num_hidden_layers=None), "no num_hidden_layers"),
    "remote code": (lambda f: _edit_config(f, auto_map={"AutoModel": "x.Y"}), "remote code"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_checkpoint_is_refused_in_one_line(name: str, tiny_llama: Path, tmp_path: Path, target: Path) -> None:
    break_it, message = BROKEN[name]
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    break_it(source)
    with pytest.raises(UserError, match=message) as caught:
        prune_checkpoint(Checkpoint(source), target, [1])
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "names model-0.*not there; fetch it again"),
        ("{", "not a valid index"),
        ("{}", "not a valid index"),
        ('{"weight_map": {"a": 7}}', "not a valid index"),
    ],
)
def test_a_broken_index_is_refused_in_one_line(
    index: str | None, message: str, sharded_llama: Path, tmp_path: Path, target: Path
) -> None:
    source = shutil.copytree(sharded_llama, tmp_path / "source")
    if index is None:
        sorted(source.glob("*.safetensors"))[1].unlink()
    else:
        (source / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message) as caught:
        prune_checkpoint(Checkpoint(source), target, [1])
    assert "\n" not in str(caught.value)
    assert not list(target.iterdir()), "refused before anything is written"


def test_shards_without_their_index_are_refused(sharded_llama: Path, tmp_path: Path, target: Path) -> None:
    source = shutil.copytree(sharded_llama, tmp_path / "source")
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="index"):
        prune_checkpoint(Checkpoint(source), target, [1])
