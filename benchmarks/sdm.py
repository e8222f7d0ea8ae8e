"""SDMPrune's scoring, both stages, against the formula written out: time, peak memory, and that the numbers are equal.

    python benchmarks/sdm.py [--repeats 3] [--out sdm.json]

The naive form takes one sample at a time, holds autograd's gradient of every parameter and both models' full logits,
and sums |g*w| of whole matrices. Each form runs in a process of its own, in turns, on a random Llama, with texts of
equal and of varied lengths; the median of the repeats counts. Memory is the peak resident set above that of the
imports, the model included. Expected: at least 1.5 times faster at at most 0.6 of the memory.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak import own_peak
from benchmarks.rows import Ratio, ratio

FORMS = ("naive", "sdd")
WORKLOADS = {"equal": (4, 512, 512), "varied": (8, 32, 512)}
"""Texts, and the tokens of the shortest and of the longest."""
ALPHA, TEMPERATURE, FIRST_CUT = 0.4, 0.2, 0.025


def build_model(shape: dict[str, int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["width"],
        num_hidden_layers=shape["blocks"],
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=shape["vocabulary"],
        initializer_range=0.05,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def draw_rows(shape: dict[str, int], workload: str) -> list[list[int]]:
    """Random tokens; lengths are spread evenly between the shortest and the longest."""
    import torch

    texts, shortest, longest = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(shortest, longest, texts).round().int()
    lengths = lengths[torch.randperm(texts, generator=generator)].tolist()
    return [torch.randint(3, shape["vocabulary"], (length,), generator=generator).tolist() for length in lengths]


def naive_stage(model: Any, rows: list[list[int]], masks: Any, device: str) -> list[Any]:
    """Stage 1 without masks, stage 2 with them: the channels' activations are multiplied by 0 in the student."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

    mlps = [block.mlp for block in model.model.layers]
    keeps = None if masks is None else [(~mask).float().to(device) for mask in masks]
    totals: list[Any] = [0.0] * len(mlps)
    for row in rows:
        ids = torch.tensor([row], device=device)
        soft = None
        if keeps is not None:
            with torch.no_grad():
                soft = model(ids, use_cache=False).logits[0, :-1]
        hooks = [
            mlp.down_proj.register_forward_pre_hook(lambda module, given, keep=keep: (given[0] * keep,))
            for mlp, keep in zip(mlps, keeps or [], strict=False)
        ]
        logits = model(ids, use_cache=False).logits[0, :-1]
        loss = cross_entropy(logits, ids[0, 1:])
        if soft is not None:
            divergence = kl_div(log_softmax(logits, -1), softmax(soft / TEMPERATURE, -1), reduction="batchmean")
            loss = (1 - ALPHA) * loss + ALPHA * divergence
        loss.backward()
        for hook in hooks:
            hook.remove()
        for block, mlp in enumerate(mlps):
            terms = (mlp.down_proj.weight.grad * mlp.down_proj.weight).t()
            terms = terms + mlp.up_proj.weight.grad * mlp.up_proj.weight
            terms = terms + mlp.gate_proj.weight.grad * mlp.gate_proj.weight
            totals[block] = totals[block] + terms.abs().detach()
        model.zero_grad(set_to_none=True)
    return [total.mean(dim=1).cpu() for total in totals]


def measure(form: str, workload: str, shape: dict[str, int], folder: Path, device: str) -> dict[str, float]:
    """Both stages in this process; leaves the importances in `folder`."""
    import torch
    from safetensors.torch import save_file

    from sdd.importance.channels import SDM, TaylorWidth

    criterion = SDM(FIRST_CUT, ALPHA, TEMPERATURE)
    torch.set_num_threads(shape["threads"])
    build_model({**shape, "hidden": 64, "width": 64, "vocabulary": 64})  # loads all that is imported late
    baseline = peak_memory(device)
    model, rows = build_model(shape).to(device), draw_rows(shape, workload)
    start = seconds(device)
    if form == "naive":
        first = naive_stage(model, rows, None, device)
        middle = seconds(device)
        second = naive_stage(model, rows, criterion.masked(first), device)
    else:
        first = TaylorWidth().measure(model, rows, shape["max_tokens"])
        middle = seconds(device)
        second = criterion.measure(model, rows, shape["max_tokens"], first)
    end = seconds(device)
    found = {f"{stage}.{block}": v.double() for stage, vs in enumerate((first, second)) for block, v in enumerate(vs)}
    save_file(found, folder / f"{form}.safetensors")
    return {
        "stage 1, s": middle - start,
        "stage 2, s": end - middle,
        "both, s": end - start,
        "peak memory, MB": (peak_memory(device) - baseline) / 1e6,
    }


def seconds(device: str) -> float:
    """On a CPU those of this process, which others on the machine do not lengthen; on a GPU the clock's."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> float:
    """Bytes: of this process so far, or on a GPU those allocated there."""
    import torch

    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return own_peak()


def largest_difference(folder: Path) -> float:
    """Of the two forms' importances, relative to each vector's largest."""
    from safetensors.torch import load_file

    naive, own = (load_file(folder / f"{form}.safetensors") for form in FORMS)
    return max(float((naive[key] - own[key]).abs().max() / naive[key].max()) for key in naive)


def compare(workload: str, repeats: int, device: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """Both forms in turns; medians over the repeats, and the ratios of each repeat. `options` are of this script."""
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(repeats):
            for form in FORMS:
                words = [sys.executable, __file__, *options, "--form", form, "--workload", workload]
                path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
                environment = {**os.environ, "PYTHONPATH": path}
                done = subprocess.run(
                    [*words, "--folder", temporary], env=environment, stdout=subprocess.PIPE, check=True
                )
                runs[form].append(json.loads(done.stdout))
        difference = largest_difference(Path(temporary))
    found: dict[str, Any] = {
        form: {name: statistics.median(run[name] for run in runs[form]) for name in runs[form][0]} for form in FORMS
    }
    pairs = list(zip(runs["naive"], runs["sdd"], strict=True))
    found["speed"] = statistics.median(naive["both, s"] / own["both, s"] for naive, own in pairs)
    found["speeds"] = [naive["both, s"] / own["both, s"] for naive, own in pairs]
    found["memory"] = found["sdd"]["peak memory, MB"] / found["naive"]["peak memory, MB"]
    found["difference"] = difference
    found["good"] = found["speed"] >= 1.5 and found["memory"] <= 0.6 and difference < 1e-5
    return found


def rows(pairs: int = 3) -> list[Ratio]:
    """For the table of all benchmarks."""
    found = []
    for workload in WORKLOADS:
        result = compare(workload, pairs, "cpu")
        runs = [(a * result["sdd"]["both, s"], result["sdd"]["both, s"]) for a in result["speeds"]]
        equal = f"{result['difference']:.0e} apart; {result['memory']:.2f} of the memory"
        parity = equal if result["difference"] < 1e-5 else ""
        found.append(ratio(f"SDMPrune's scores, {workload} texts", "the formula written out", runs, parity, goal=1.5))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 512, "width": 1408, "blocks": 8, "vocabulary": 32_000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens of a pass (trainer.micro_batch_tokens)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="write the numbers into this JSON file")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--workload", choices=WORKLOADS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = {key: getattr(given, key) for key in ("hidden", "width", "blocks", "vocabulary", "max_tokens", "threads")}
    if given.form:
        print(json.dumps(measure(given.form, given.workload, shape, given.folder, given.device)))
        return 0
    record: dict[str, Any] = {"shape": shape, "device": given.device, "machine": platform.machine()}
    for workload, (texts, shortest, longest) in WORKLOADS.items():
        found = record[workload] = compare(workload, given.repeats, given.device, sys.argv[1:])
        print(f"{texts} texts of {shortest} to {longest} tokens{'':<6}{'naive':>10}{'sdd':>10}")
        for name in found["naive"]:
            print(f"{name:<34}{found['naive'][name]:>10.2f}{found['sdd'][name]:>10.2f}")
        spread = f"{min(found['speeds']):.2f} to {max(found['speeds']):.2f}"
        print(f"{found['speed']:.2f} times as fast ({spread}) at {found['memory']:.2f} of the memory; ", end="")
        print(f"largest relative difference {found['difference']:.1e}; ", end="")
        print("as expected" if found["good"] else "NOT as expected: 1.5 times, 0.6, 1e-5", end="\n\n")
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(record[workload]["good"] for workload in WORKLOADS) else 1


if __name__ == "__main__":
    sys.exit(main())
