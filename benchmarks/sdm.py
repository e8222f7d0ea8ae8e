"""SDMPrune's scoring, both stages, against the formula written out: time, peak memory, and that the numbers are equal.

    python -m benchmarks sdm

The naive form takes one sample at a time, holds autograd's gradient of every parameter and both models' full logits,
and sums |g*w| of whole matrices. The limit is passes forward and back with the gradients of the MLPs' weights alone,
and in stage 2 the uncut model's logits from the states that stage 1 passed, nothing summed. Each form runs in a process
of its own, in turns, on a random Llama, with texts of equal and of varied lengths. Memory is the peak resident set
above that of the imports, or what a GPU had allocated, the model included. Expected: at least 1.5 times as fast at at
most 0.56 of the memory.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.models import random_llama
from benchmarks.rows import Ratio, Setting
from benchmarks.timing import in_turns, peak_memory, seconds

FORMS = ("naive", "sdd", "limit")
WORKLOADS = {"equal": (4, 512, 512), "varied": (8, 32, 512)}
"""Texts, and the tokens of the shortest and of the longest."""
MODEL = {"num_hidden_layers": 8, "initializer_range": 0.05}
MAX_TOKENS = 512
"""Of a pass."""
ALPHA, TEMPERATURE, FIRST_CUT = 0.4, 0.2, 0.025


def draw_rows(workload: str) -> list[list[int]]:
    """Random tokens; lengths are spread evenly between the shortest and the longest."""
    import torch

    texts, shortest, longest = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(shortest, longest, texts).round().int()
    lengths = lengths[torch.randperm(texts, generator=generator)].tolist()
    return [torch.randint(3, 32_000, (length,), generator=generator).tolist() for length in lengths]


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


def bare_stage(model: Any, rows: list[list[int]], seen: dict[int, Any], device: str) -> None:
    """The passes alone; the second stage finds the uncut model's final states in `seen`, where the first left them."""
    import torch
    from torch.nn.functional import cross_entropy

    distilled = bool(seen)
    model.requires_grad_(False)
    for block in model.model.layers:
        block.mlp.requires_grad_(True)
    for number, row in enumerate(rows):
        ids = torch.tensor([row], device=device)
        states = model.model(ids, use_cache=False).last_hidden_state
        if distilled:
            with torch.no_grad():
                model.lm_head(seen[number])
        seen[number] = states.detach()
        cross_entropy(model.lm_head(states)[0, :-1], ids[0, 1:]).backward()
        model.zero_grad(set_to_none=True)


def stages(form: str, model: Any, rows: list[list[int]], device: str) -> tuple[list[float], list[list[Any]]]:
    """(seconds of each stage, importances by stage and block) by one of the forms."""
    from sdd.forward.row_states import RowStates
    from sdd.importance.channels import SDM, TaylorWidth

    first, second = TaylorWidth(), SDM(FIRST_CUT, ALPHA, TEMPERATURE)
    seen, found, taken = dict[int, Any](), list[list[Any]](), [seconds(device)]
    with tempfile.TemporaryDirectory() as folder:
        first.final_states = second.final_states = RowStates([len(row) for row in rows], Path(folder))
        for stage in (0, 1):
            if form == "limit":
                bare_stage(model, rows, seen, device)
            elif form == "naive":
                found.append(naive_stage(model, rows, second.masked(found[0]) if stage else None, device))
            elif stage == 0:
                found.append(first.measure(model, rows, MAX_TOKENS))
            else:
                found.append(second.measure(model, rows, MAX_TOKENS, found[0]))
            taken.append(seconds(device))
    return [end - start for start, end in pairwise(taken)], found


def measure(form: str, workload: str, folder: Path, device: str) -> dict[str, float]:
    """Both stages in this process; leaves the importances in `folder`."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    random_llama(**MODEL, hidden_size=64, intermediate_size=64, vocab_size=64)  # loads what is imported late
    baseline = peak_memory(device)
    model, rows = random_llama(**MODEL).to(device), draw_rows(workload)
    taken, found = stages(form, model, rows, device)
    held = (peak_memory(device) - baseline) / 1e6
    tensors = {f"{stage}.{block}": v.double() for stage, vs in enumerate(found) for block, v in enumerate(vs)}
    save_file(tensors, folder / f"{form}.safetensors")
    return {"stage 1, s": taken[0], "stage 2, s": taken[1], "peak memory, MB": held}


def largest_difference(folder: Path) -> float:
    """Of the two forms' importances, relative to each vector's largest."""
    from safetensors.torch import load_file

    naive, own = (load_file(folder / f"{form}.safetensors") for form in FORMS[:2])
    return max(float((naive[key] - own[key]).abs().max() / naive[key].max()) for key in naive)


def compared(workload: str, turns: int, device: str) -> Ratio:
    """Both forms in turns, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:

        def form(name: str) -> tuple[float, dict[str, float]]:
            words = [sys.executable, "-m", "benchmarks.sdm", name, workload, folder, device]
            done = subprocess.run(words, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout)
            return sum(found[stage] for stage in ("stage 1, s", "stage 2, s")), found

        spent, found = in_turns({name: partial(form, name) for name in FORMS}, turns)
        difference = largest_difference(Path(folder))
    naive, own = (statistics.median(one["peak memory, MB"] for one in found[name]) for name in FORMS[:2])
    equal = f"{difference:.0e} apart; {own / naive:.2f} of the memory"
    parity = equal if difference < 1e-5 else ""
    what, peer = f"SDMPrune's scores, {workload} texts", "the formula written out"
    return Ratio(what, peer, spent["naive"], spent["sdd"], spent["limit"], parity, 1.5, {"forms": found})


def rows(setting: Setting) -> list[Ratio]:
    return [compared(workload, setting.turns, setting.device) for workload in WORKLOADS]


if __name__ == "__main__":
    form, workload, folder, device = sys.argv[1:]
    print(json.dumps(measure(form, workload, Path(folder), device)))
