"""Merging two LoRA students, side by side with mergekit: end to end, and on the same two full checkpoints.

    python benchmarks/merging.py --mergekit /path/to/its/bin/python --out DIR

End to end, ours reads the base once and both adapters; the other way makes a full checkpoint of each adapter (PEFT, in
bfloat16, the cheaper way) and then runs mergekit. Every way is a process of its own, imports included, and the ways
take turns. The results are compared in the same run, in bfloat16 steps. Prints a table and writes DIR/merging.json.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak import used_by

REPOSITORY = Path(__file__).resolve().parents[1]

OURS = """
import json, sys
from pathlib import Path
from sdd.merging.streaming import merge_checkpoints
from sdd.merging.students import open_students
from sdd.models.checkpoints import Checkpoint
base, target, method, *folders = sys.argv[1:]
Path(target).mkdir()
students = open_students([Path(folder) for folder in folders])
merge_checkpoints(Checkpoint(Path(base)), students, json.loads(method), Path(target))
"""

FULL = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)
"""


def make_base(folder: Path, hidden: int, blocks: int, vocabulary: int) -> None:
    """A random bfloat16 Llama, in one file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def make_adapter(base: Path, folder: Path, seed: int, scale: float, places: list[int] | None = None) -> None:
    """LoRA of rank 16 on every linear layer of the blocks, or of those at `places`.

    `scale` is the spread of B, which training moves from 0.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    chosen: dict[str, Any] = {"layers_to_transform": places, "layers_pattern": "layers"} if places else {}
    config = LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM", **chosen)
    student = get_peft_model(model, config)
    student.peft_config["default"].base_model_name_or_path = "model/base"  # an adapter that names a place is not read
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    student.save_pretrained(folder / "adapter", save_embedding_layers=False)


def mergekit_config(method: dict[str, Any], base: Path, students: list[Path], dtype: str) -> dict[str, Any]:
    """The same merge in mergekit's words; `dtype` is what it computes in, bfloat16 what it writes."""
    weights = method.get("weights", [None] * len(students))
    models: list[dict[str, Any]] = [{"model": str(one), "parameters": {}} for one in students]
    config: dict[str, Any] = {"models": models, "dtype": dtype, "out_dtype": "bfloat16", "parameters": {}}
    for model, weight in zip(models, weights, strict=True):
        if weight is not None:
            model["parameters"]["weight"] = weight
        if "density" in method:
            model["parameters"]["density"] = method["density"]
    config["merge_method"] = method["method"]
    match method["method"]:
        case "slerp":
            config |= {"base_model": str(students[0]), "parameters": {"t": method["t"]}}
        case "task_arithmetic":
            config |= {"base_model": str(base), "parameters": {"normalize": False}}
        case "ties":
            config |= {"base_model": str(base), "parameters": {"normalize": True, "lambda": 1.0}}
    return config


def mergekit_command(python: Path, config: dict[str, Any], target: Path) -> list[str]:
    """Its command line; the config is written beside the folder it is to make (JSON is YAML)."""
    written = target.with_suffix(".yaml")
    written.write_text(json.dumps(config))
    return [str(python), "-m", "mergekit.scripts.run_yaml", str(written), str(target), "--no-copy-tokenizer"]


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def compared(ours: Path, other: Path) -> dict[str, Any]:
    """How far two bfloat16 checkpoints are apart: the largest distance in steps, the shares of numbers that differ.

    A step is the spacing of bfloat16 at the larger of two numbers; what is below 1/4096 of its tensor's largest number
    counts in the steps of that size, since there float32 rounding shows where a sum cancels.
    """
    import torch

    a, b = tensors_of(ours), tensors_of(other)
    assert set(a) ^ set(b) <= {"lm_head.weight"}, sorted(set(a) ^ set(b))
    largest, beyond, differing, numbers = 0.0, 0, 0, 0
    for name in set(a) & set(b):
        assert a[name].dtype == b[name].dtype == torch.bfloat16, name
        x, y = a[name].float(), b[name].float()
        size = torch.maximum(x.abs(), y.abs())
        step = torch.exp2(torch.floor(torch.log2(size.clamp(min=float(size.max()) / 4096).clamp(min=1e-30))) - 7)
        apart = (x - y).abs() / step
        largest = max(largest, float(apart.max()))
        beyond += int((apart > 1).sum())
        differing += int((apart > 0).sum())
        numbers += apart.numel()
    shares = {"share_differing": differing / numbers, "share_beyond_one": beyond / numbers}
    return {"largest_steps": largest, **shares, "tensors": len(set(a) & set(b))}


def timed(commands: list[list[str]]) -> dict[str, float]:
    """Wall and CPU seconds of commands one after another, and the most memory that one of them held, bytes."""
    used = [used_by(command, {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}) for command in commands]
    wall, cpu = (sum(getattr(one, which) for one in used) for which in ("wall", "cpu"))
    return {"wall": wall, "cpu": cpu, "memory": max(one.memory for one in used)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="the python of an environment with mergekit 0.1.5")
    parser.add_argument("--out", type=Path, required=True, help="a folder for checkpoints and merging.json")
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--scale", type=float, default=0.01, help="spread of the adapters' B")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    base, adapters, full = work / "base", [work / "a", work / "b"], [work / "full_a", work / "full_b"]
    make_base(base, arguments.hidden, arguments.blocks, arguments.vocabulary)
    for seed, folder in enumerate(adapters):
        make_adapter(base, folder, seed, arguments.scale)
    method = {"method": "slerp", "t": 0.5, "space": "weights"}

    def ours(students: list[Path], target: Path) -> list[str]:
        return [sys.executable, "-c", OURS, str(base), str(target), json.dumps(method), *map(str, students)]

    to_full = [
        [sys.executable, "-c", FULL, str(base), str(adapter / "adapter"), str(target)]
        for adapter, target in zip(adapters, full, strict=True)
    ]
    theirs = mergekit_command(arguments.mergekit, mergekit_config(method, base, full, "bfloat16"), work / "mergekit")
    ways = {
        "ours, from the adapters": [ours(adapters, work / "ours")],
        "full checkpoints, then mergekit": [*to_full, theirs],
        "ours, on the full checkpoints": [ours(full, work / "ours_full")],
        "mergekit, on the full checkpoints": [theirs],
    }
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for folder in (work / "ours", work / "ours_full", work / "mergekit", *full):
            shutil.rmtree(folder, ignore_errors=True)
        for way, commands in ways.items():
            shutil.rmtree(work / "mergekit", ignore_errors=True) if commands == [theirs] else None
            runs[way].append(timed(commands))
    results = {
        "end to end": compared(work / "ours", work / "mergekit"),
        "same full checkpoints": compared(work / "ours_full", work / "mergekit"),
    }
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    table = {
        way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()
    }
    rows = list(table.items())
    print(f"base: {size / 1e6:.0f} MB in bfloat16, two LoRA adapters of rank 16; medians of {arguments.repeats}")
    print(f"{'':<36}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}")
    for way, found in rows:
        print(f"{way:<36}{found['wall']:>9.1f}{found['cpu']:>9.1f}{found['memory'] / 1e6:>9.0f}")
    faster = {}
    for name, (mine, other) in (("end to end", rows[:2]), ("same full checkpoints", rows[2:])):
        faster[name] = {key: other[1][key] / mine[1][key] for key in ("wall", "cpu")}
        apart = results[name]
        print(
            f"{name}: {faster[name]['wall']:.1f} times faster ({faster[name]['cpu']:.1f} in CPU time); at most "
            f"{apart['largest_steps']:.3g} bfloat16 steps apart, {100 * apart['share_differing']:.2g}% of numbers "
            f"differ, {100 * apart['share_beyond_one']:.2g}% by more than one step"
        )
    record = {"bytes": size, "medians": table, "runs": runs, "faster": faster, "compared": results}
    (out / "merging.json").write_text(json.dumps(record, indent=1) + "\n")
    if results["same full checkpoints"]["largest_steps"] > 1:
        raise SystemExit("the results on the same checkpoints are more than one bfloat16 step apart")


if __name__ == "__main__":
    main()
