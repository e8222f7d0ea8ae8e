"""Checkpoints and adapters of a stranger's: refused in one line, at once, and nothing of theirs runs or leaks."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import run

from sdd.errors import UserError
from sdd.finetuning.adapters import check_adapter
from sdd.models.checkpoints import Checkpoint
from sdd.models.files import read_headers
from sdd.pruning.depth import prune_checkpoint

Harm = Callable[[Path], Any]


def refused(work: Callable[[], Any], canaries: Any, named: Path) -> None:
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert str(named) in message
    assert len(message) < 900, "what a stranger claims is not printed as a whole"
    for path in canaries.work.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size > 1 << 29:
            path.unlink()  # a sparse one, which the canaries would read
    canaries.check(message)


@pytest.fixture
def model(checkpoint: Path, canaries: Any) -> Path:
    return Path(shutil.copytree(checkpoint, canaries.work / "model"))


def pruned(folder: Path) -> None:
    target = folder.with_name("target")
    target.mkdir()
    try:
        prune_checkpoint(Checkpoint(folder), target, [1])
    except UserError:
        assert not list(target.iterdir()), "refused before anything is written"
        raise


# ---- files ------------------------------------------------------------------------------------------------------


def replaced(name: str, by: str) -> Harm:
    def harm(folder: Path) -> None:
        path, outside = folder / name, folder.parents[1] / "outside.txt"
        path.unlink(missing_ok=True)
        match by:
            case "link":
                path.symlink_to(outside)
            case "relative link":
                path.symlink_to(Path("../../outside.txt"))
            case "link to a link":
                (folder / "step").symlink_to(outside)
                path.symlink_to("step")
            case "lost link":
                path.symlink_to("/nowhere/at/all")
            case "circle":
                path.symlink_to(name)
            case "pipe":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/zero")
            case "folder":
                path.mkdir()
            case "sparse":
                path.touch()
                os.truncate(path, 1 << 40)

    return harm


SIDE = ["link", "pipe", "folder", "device", "relative link", "link to a link", "lost link", "circle", "sparse"]
FILES = {f"tokenizer_config.json as {kind}": replaced("tokenizer_config.json", kind) for kind in SIDE}
FILES |= {f"config.json as {kind}": replaced("config.json", kind) for kind in SIDE}
FILES |= {f"weights as {kind}": replaced("model.safetensors", kind) for kind in SIDE}
FILES |= {
    f"{name} as {kind}": replaced(name, kind)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.model", "merges.txt", "added_tokens.json")
    for kind in ("link", "pipe")
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_plain_ones_of_the_folder(name: str, model: Path, canaries: Any) -> None:
    FILES[name](model)
    refused(lambda: pruned_or_digest(model), canaries, model)


def pruned_or_digest(folder: Path) -> None:
    """What a command does first: the digest, which reads every file."""
    Checkpoint(folder).digest(folder.with_name("memory"))
    pruned(folder)


def test_stock_code_sees_no_file_that_is_not_known(model: Path, canaries: Any) -> None:
    """Beside the known names it would read templates of a folder, an adapter's config, and other formats."""
    templates = model / "additional_chat_templates"
    templates.mkdir()
    (templates / "evil.jinja").symlink_to(canaries.outside)
    os.mkfifo(templates / "pipe.jinja")
    for name in ("processor_config.json", "preprocessor_config.json", "tekken.json", "tiktoken.model"):
        os.mkfifo(model / name)
    for name in ("generation_config_link.json", "custom_generate"):
        (model / name).symlink_to(canaries.outside)
    tokenizer = Checkpoint(model).tokenizer()
    assert not isinstance(tokenizer.chat_template, dict)
    assert tokenizer.name_or_path == str(model)
    opened = Checkpoint(model).model("float32")
    assert opened.config._name_or_path == str(model)
    pruned(model)
    assert not (canaries.work / "target" / "additional_chat_templates").exists()
    canaries.check()


def in_cache(folder: Path) -> Path:
    """The folder as the hub's cache lays it out."""
    repository = folder.with_name("models--somebody--model")
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_layout_of_the_hubs_cache_works(model: Path, canaries: Any) -> None:
    snapshot = in_cache(model)
    Checkpoint(snapshot).digest(canaries.work / "memory")
    Checkpoint(snapshot).tokenizer()
    Checkpoint(snapshot).model("float32")
    (canaries.work / "pruned").mkdir()
    prune_checkpoint(Checkpoint(snapshot), canaries.work / "pruned", [1])
    assert (canaries.work / "pruned" / "tokenizer.json").is_file()


@pytest.mark.parametrize("way", ["other repository", "blobs are a link", "not a cache"])
def test_layout_like_the_hubs_cache_is_no_way_out(way: str, model: Path, canaries: Any) -> None:
    snapshot = in_cache(model)
    repository = snapshot.parents[1]
    if way == "other repository":
        (canaries.work / "models--b--c" / "blobs").mkdir(parents=True)
        shutil.copy(snapshot / "tokenizer.json", canaries.work / "models--b--c" / "blobs" / "x")
        (snapshot / "tokenizer.json").unlink()
        (snapshot / "tokenizer.json").symlink_to("../../../models--b--c/blobs/x")
    elif way == "blobs are a link":
        (repository / "blobs").rename(canaries.work / "elsewhere")
        (repository / "blobs").symlink_to(canaries.work / "elsewhere")
    else:
        snapshot = snapshot.rename(repository / "other")
        (snapshot / "tokenizer.json").unlink()
        (snapshot / "tokenizer.json").symlink_to("../blobs/" + "0" * 64)
    refused(lambda: Checkpoint(snapshot).digest(canaries.work / "memory"), canaries, snapshot)


INDICES = [
    "[]",
    "null",
    '{"weight_map": []}',
    '{"weight_map": {"a": ["x"]}}',
    '{"weight_map": {"a": "../x.safetensors"}}',
]
INDICES += [
    '{"weight_map": {"a": "x.bin"}}',
    '{"weight_map": {"a": "/x.safetensors"}}',
    "[" * 100_000,
    '{"weight_map": 1}',
]


@pytest.mark.parametrize("text", INDICES, ids=range(len(INDICES)))
def test_index(text: str, model: Path, canaries: Any) -> None:
    (model / "model.safetensors").rename(model / "x.safetensors")
    (model / "model.safetensors.index.json").write_text(text)
    refused(lambda: Checkpoint(model).weight_files, canaries, model)


# ---- headers ----------------------------------------------------------------------------------------------------

F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
HEADERS: dict[str, Any] = {
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "unknown dtype": {"a": F | {"dtype": "F33"}},
    "dtype a list": {"a": F | {"dtype": ["F32"]}},
    "shape of texts": {"a": F | {"shape": ["2"]}},
    "shape a text": {"a": F | {"shape": "2"}},
    "negative extents": {"a": F | {"shape": [-1, -2]}},
    "extents of bool": {"a": F | {"shape": [True, 2]}},
    "extents of floats": {"a": F | {"shape": [2.0]}},
    "huge extents": {"a": F | {"shape": [10**30, 0]}},
    "many axes": {"a": F | {"shape": [1] * 1000 + [2]}},
    "more than its bytes": {"a": F | {"shape": [3]}},
    "beyond the file": {"a": F | {"shape": [1 << 38], "data_offsets": [0, 1 << 40]}},
    "overlapping": {"a": F, "b": F},
    "overlapping by half": {"a": F, "b": F | {"data_offsets": [4, 12]}},
    "a hole": {"a": F, "b": F | {"data_offsets": [12, 20]}},
    "hole in front": {"a": F | {"data_offsets": [4, 12]}},
    "bytes left": {"a": F},
    "three offsets": {"a": F | {"data_offsets": [0, 8, 8]}},
    "offsets a text": {"a": F | {"data_offsets": "08"}},
    "control characters": {"a\x1b[2J": F, "b": NEXT},
    "newline in a name": {"a\nb": F, "b": NEXT},
    "long name": {"a" * 5000: F, "b": NEXT},
    "entry a list": {"a": [F]},
    "entry null": {"a": None},
    "something beside": {"a": F | {"code": "x"}, "b": NEXT},
    "metadata nested": {"__metadata__": {"a": {"b": "c"}}, "a": F, "b": NEXT},
    "metadata a list": {"__metadata__": ["a"], "a": F, "b": NEXT},
    "deep": b'{"a":' + b"[" * 200_000,
    "named twice": b'{"a":%s,"a":%s}' % (json.dumps(F).encode(), json.dumps(NEXT).encode()),
    "huge number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "nan": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
}


def with_header(path: Path, header: Any, data: bytes = bytes(16)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("name", HEADERS)
def test_header(name: str, model: Path, canaries: Any) -> None:
    with_header(model / "model.safetensors", HEADERS[name])
    refused(lambda: pruned(model), canaries, model)


@pytest.mark.parametrize("claimed", [1 << 30, 1 << 39, (1 << 63) + 1, (1 << 64) - 9])
def test_header_that_claims_to_be_large(claimed: int, model: Path, canaries: Any) -> None:
    """A sparse file of a terabyte holds it; it is not read."""
    (model / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + b"{}")
    os.truncate(model / "model.safetensors", 1 << 40)
    refused(lambda: pruned(model), canaries, model)


def test_tensor_of_two_files(canaries: Any) -> None:
    files = [canaries.work / "a.safetensors", canaries.work / "b.safetensors"]
    for path in files:
        with_header(path, {"a": F, "b": NEXT})
    assert set(read_headers(files[:1])) == {"a", "b"}
    refused(lambda: read_headers(files), canaries, files[1])


# ---- config.json ------------------------------------------------------------------------------------------------

DEEP = json.loads("[" * 50 + "]" * 50)
CONFIGS: dict[str, dict[str, Any]] = {
    "a billion blocks": {"num_hidden_layers": 10**9},
    "no block": {"num_hidden_layers": 0},
    "negative": {"num_hidden_layers": -4},
    "true": {"num_hidden_layers": True},
    "blocks of a float": {"num_hidden_layers": 4.0},
    "blocks of a text": {"num_hidden_layers": "4"},
    "blocks of a list": {"num_hidden_layers": [4]},
    "fewer than stored": {"num_hidden_layers": 3},
    "more than stored": {"num_hidden_layers": 5},
    "kind a list": {"model_type": ["llama"]},
    "kind an object": {"model_type": {"a": 1}},
    "kind null": {"model_type": None},
    "kind a number": {"model_type": 7},
    "kind unheard of": {"model_type": "llama\x1b[2J9"},
    "hidden size a text": {"hidden_size": "32"},
    "hidden size huge": {"hidden_size": 10**12},
    "hidden size zero": {"hidden_size": 0},
    "hidden size other": {"hidden_size": 64},
    "hidden size infinite": {"hidden_size": float("inf")},
    "heads zero": {"num_attention_heads": 0},
    "heads of a float": {"num_attention_heads": 0.5},
    "key heads many": {"num_key_value_heads": 10**9},
    "head size nan": {"head_dim": float("nan")},
    "middle huge": {"intermediate_size": 10**14},
    "middle other": {"intermediate_size": 49},
    "vocabulary other": {"vocab_size": 1000},
    "vocabulary huge": {"vocab_size": 10**11},
    "vocabulary negative": {"vocab_size": -1},
    "untied without a head": {"tie_word_embeddings": False},
    "a bias that is not stored": {"attention_bias": True},
    "kinds too few": {"layer_types": ["full_attention"]},
    "kinds a text": {"layer_types": "full"},
    "kinds unheard of": {"layer_types": ["evil"] * 4},
    "positions garbage": {"rope_scaling": {"rope_type": ["yarn"], "factor": "x"}},
    "positions nested": {"rope_parameters": {"a": DEEP}},
    "positions with infinity": {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
    "a number of 4000 digits": {"rope_theta": 10**4000},
    "deep": {"anything": DEEP},
    "a million values": {"anything": [0] * 1_000_000},
    "a long text": {"anything": "x" * 1_000_000},
    "names no list": {"architectures": "LlamaForCausalLM"},
    "names of numbers": {"architectures": [1]},
    "names an object": {"architectures": {"0": "LlamaForCausalLM"}},
    "dtype of torch's": {"dtype": "load"},
    "dtype nested": {"torch_dtype": {"": "hub"}},
    "tokenizer is a model": {"tokenizer_class": "AutoModel"},
    "activation unheard of": {"hidden_act": "evil"},
    "quantised": {"quantization_config": {"quant_method": "quark"}},
    "quantised within": {"part": {"quantization_config": {"quant_method": "hqq"}}},
    "attention kernel": {"attn_implementation": "somebody/kernel"},
    "attention kernel, underlined": {"_attn_implementation": "somebody/kernel@main:evil"},
    "attention kernel, inside": {"_attn_implementation_internal": "kernels-community/flash-attn3"},
    "attention kernel beside a good one": {"attn_implementation": "sdpa", "_attn_implementation": "a/b"},
    "attention kernel of a part": {"attn_implementation": {"": "sdpa", "text_config": "a/b"}},
    "attention kernel deep down": {"per_layer_config": {"0": {"attn_implementation": "a/b"}}},
    "attention paged": {"attn_implementation": "paged|a/b"},
    "attention of another release": {"_attn_implementation": "flash_attention_3"},
    "attention a list": {"attn_implementation": ["a/b"]},
    "experts kernel": {"experts_implementation": "a/b"},
    "experts kernel, underlined": {"_experts_implementation": "deepgemm"},
    "kernel of its own": {"kernel_config": {"RMSNorm": "a/b:C"}},
    "kernel by name": {"use_kernels": "a/b"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name: str, model: Path, canaries: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | CONFIGS[name]
    sys.set_int_max_str_digits(10_000)
    try:
        (model / "config.json").write_text(json.dumps(config))
    finally:
        sys.set_int_max_str_digits(4300)
    refused(lambda: pruned(model), canaries, model)


@pytest.mark.parametrize(
    "name", ["hidden size other", "untied without a head", "fewer than stored", "vocabulary other"]
)
def test_model_of_other_shapes_is_not_opened(name: str, model: Path, canaries: Any) -> None:
    """Stock code would draw at random what is not stored."""
    config = json.loads((model / "config.json").read_text()) | CONFIGS[name]
    if name == "fewer than stored":
        config |= {"num_hidden_layers": 5, "layer_types": None}
    (model / "config.json").write_text(json.dumps(config))
    refused(lambda: Checkpoint(model).model("float32"), canaries, model)


def test_model_of_a_million_parts_is_not_built() -> None:
    from sdd.architectures.trees import _within

    with pytest.raises(ValueError, match="more than 10 parts"), _within(10):
        import torch

        torch.nn.ModuleList(torch.nn.Identity() for _ in range(100))


@pytest.mark.parametrize("kind", [None, "eager", "sdpa", "flash_attention_2"])
def test_known_attention_is_allowed(kind: str | None, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"_attn_implementation": kind, "_attn_implementation_autoset": True}
    (model / "config.json").write_text(json.dumps(config))
    assert Checkpoint(model).config["num_hidden_layers"] == 4


# ---- adapters ---------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "a catastrophic pattern": {"target_modules": "(a+)+$"},
    "patterns in a list": {"target_modules": ["(a+)+$"]},
    "all modules": {"target_modules": "all-linear"},
    "a pattern of layers": {"layers_pattern": "(.*)*x"},
    "patterns of ranks": {"rank_pattern": {"(a+)+$": 4}},
    "patterns of alphas": {"alpha_pattern": {"(a+)+$": 4}},
    "excluded by pattern": {"exclude_modules": "(a+)+$"},
    "layers without end": {"layer_replication": [[0, 4]] * 1_000_000},
    "layers by place": {"layers_to_transform": [-1]},
    "layers by text": {"layers_to_transform": "0"},
    "another method": {"peft_type": "VERA"},
    "no method": {"peft_type": None},
    "another task": {"task_type": "SEQ_CLS"},
    "classes to import": {"auto_mapping": {"base_model_class": "x", "parent_library": "os"}},
    "module to import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    "module to import later": {"megatron_core": "antigravity"},
    "huge rank": {"r": 10**9},
    "rank true": {"r": True},
    "rank of another": {"r": 7},
    "alpha infinite": {"lora_alpha": float("inf")},
    "dropout a text": {"lora_dropout": "0.1"},
    "base elsewhere": {"base_model_name_or_path": "/etc"},
    "base above": {"base_model_name_or_path": "pruned/../../x"},
    "base on the hub": {"base_model_name_or_path": "somebody/model"},
    "weights by eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "corda": {"corda_config": {"cache_file": "/tmp/x"}},
    "loftq": {"loftq_config": {"loftq_bits": 4}},
    "arrow": {"arrow_config": {"top_k": 3}},
    "a key of tomorrow's": {"run_config": {"code": "x"}},
    "dora": {"use_dora": True},
    "parameters": {"target_parameters": ["x.*"]},
    "modules saved by pattern": {"modules_to_save": ["lm_head|.*"]},
}


@pytest.fixture(scope="session")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sdd.finetuning.adapters import adapted, save_student

    folder = tmp_path_factory.mktemp("tuned")
    recipe = {"method": "lora", "rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["all-linear"]}
    model = Checkpoint(checkpoint).model("float32")
    save_student(adapted(model, recipe, None), folder, Checkpoint(checkpoint), "pruned/0a1b")
    return folder / "adapter"


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str, adapter: Path, canaries: Any) -> None:
    folder = Path(shutil.copytree(adapter, canaries.work / "adapter"))
    assert check_adapter(folder, str(folder))["r"] == 2
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ADAPTERS[name]))
    refused(lambda: check_adapter(folder, str(folder)), canaries, folder)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "circle", "sparse"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter(name: str, kind: str, adapter: Path, canaries: Any) -> None:
    folder = Path(shutil.copytree(adapter, canaries.work / "adapter"))
    replaced(name, kind)(folder)
    refused(lambda: check_adapter(folder, str(folder)), canaries, folder)


# ---- as a command -----------------------------------------------------------------------------------------------

COMMANDS = {
    "pipe": replaced("tokenizer_config.json", "pipe"),
    "link": replaced("tokenizer_config.json", "link"),
    "header": lambda folder: with_header(folder / "model.safetensors", HEADERS["control characters"]),
    "kind": lambda folder: (folder / "config.json").write_text(json.dumps(CONFIGS["kind unheard of"])),
    "deep": lambda folder: (folder / "config.json").write_text("[" * 1_000_000),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_ends_in_one_line(name: str, model: Path, canaries: Any, small: list[str]) -> None:
    COMMANDS[name](model)
    canaries.check_refused(run("prune", *small, f"model.path={model}", "metric=magnitude", cwd=canaries.work))
    assert not (canaries.work / "artifacts" / "pruned").exists()


@pytest.mark.process
def test_kernels_are_never_imported(model: Path, canaries: Any) -> None:
    """Another package of that name, of a version that transformers would take, in a process of its own."""
    package = canaries.work / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(canaries.ran)!r}, 'w').close()\n")
    facts = package.with_name("kernels-0.17.0.dist-info")
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.0\n")
    body = "import sys\nfrom pathlib import Path\nfrom sdd.models.checkpoints import Checkpoint\n"
    body += "from sdd.pruning.depth import prune_checkpoint\n"
    body += "source, target = map(Path, sys.argv[1:])\nprune_checkpoint(Checkpoint(source), target, [1])\n"
    body += "Checkpoint(target).model('float32')\n"
    (canaries.work / "target").mkdir()
    paths = os.pathsep.join([str(canaries.work / "site"), *sys.path])
    words = [sys.executable, "-c", body, str(model), str(canaries.work / "target")]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not canaries.ran.exists()
