"""Train the embedded teacher from scratch: a 2.5-million-parameter Llama on procedurally generated tasks.

    python -m sdd.tiny.train --out sdd/tiny/teacher

Muon (Jordan et al. 2024, `torch.optim.Muon`) for the matrices of the blocks, AdamW for embeddings and norms; constant
rate, then a linear decay. Whole blocks are dropped at random late in training (LayerDrop, Fan et al. 2020), which is
what lets blocks be removed afterwards, as depth and width do in a large model. Two gloo processes with one thread each
beat one process with two threads on a small CPU, so the work is cut by processes; on one kind of processor the result
is a function of the seed, the number of steps and the number of processes: other vector instructions round otherwise.
"""

import argparse
import json
import os
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

CONTEXT = 256
LEARNING_RATE = {"muon": 0.02, "adamw": 3e-3}
DECAY_FROM = 0.35
PRACTICE_UNTIL = 0.3
LAYERDROP_FROM = 0.6
LAYERDROP = 0.1
"""Chance of an inner block to be left out of a step, unless asked for otherwise."""
TOKENS_PER_PROCESS = 2_304
MONITOR_EVERY = 500
"""Steps between looks at the dev split."""


def build_model(tokenizer: Any) -> Any:
    """A stock Llama: 12 blocks of width 128, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def token_losses(model: Any, rows: list[Any], dropped: set[int], half: bool) -> Any:
    """Summed cross-entropy of the answers and their token count; `dropped` blocks are skipped, not computed.

    Logits are computed at answer positions only; `half`: products in bfloat16.
    """
    import torch

    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, row.prompt_length : len(row.ids)] = ids[i, row.prompt_length : len(row.ids)]
    decoder = model.model
    positions = torch.arange(length)[None]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        hidden = decoder.embed_tokens(ids)
        rotary = decoder.rotary_emb(hidden, positions)
        for index, block in enumerate(decoder.layers):
            if index not in dropped:
                hidden = block(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        at = labels[:, 1:] != -100
        logits = model.lm_head(decoder.norm(hidden[:, :-1][at]))
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][at], reduction="sum")
    return losses, int(at.sum())


@dataclass(frozen=True)
class Plan:
    """How one teacher is trained."""

    processes: int
    steps: int
    seed: int
    compiled: bool
    layerdrop: float
    paraphrases: bool
    float32: bool


def _orthogonalised(gradient: Any, coefficients: tuple[float, float, float], steps: int, eps: float) -> Any:
    """Muon's Newton-Schulz iteration in the gradient's own precision; torch's is in bfloat16 whatever the processor."""
    a, b, c = coefficients
    tall = gradient.size(0) > gradient.size(1)
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _worker(rank: int, plan: Plan, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from sdd.tiny.corpus import batches, exact_match
    from sdd.tiny.tokenizer import build_tokenizer

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // plan.processes))
    torch.manual_seed(plan.seed)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=plan.processes, timeout=timedelta(minutes=10)
    )
    tokenizer = build_tokenizer(CONTEXT)
    model = build_model(tokenizer)
    if plan.compiled:
        for block in model.model.layers:
            block.compile(dynamic=True)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    if plan.float32:
        torch.optim._muon._zeropower_via_newtonschulz = _orthogonalised  # type: ignore[assignment]
    optimizers = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE["muon"], momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=LEARNING_RATE["adamw"], betas=(0.9, 0.98), weight_decay=0.0),
    ]
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    inner = range(1, len(model.model.layers) - 1)
    streams = {
        practice: batches(tokenizer, plan.seed, TOKENS_PER_PROCESS, plan.processes, rank, practice, plan.paraphrases)
        for practice in (True, False)
    }
    smoothed = 0.0
    progress = tqdm(range(plan.steps), disable=rank > 0, desc="teacher", mininterval=10)
    for step in progress:
        done = step / plan.steps
        warm = min(1.0, (step + 1) / 50)
        rate = warm * (1.0 if done < DECAY_FROM else max(0.01, (1 - done) / (1 - DECAY_FROM)))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, base in zip(groups, base_rates, strict=True):
            group["lr"] = base * rate
        chance = random.Random(f"{plan.seed} drop {step}")
        dropped = {i for i in inner if done >= LAYERDROP_FROM and chance.random() < plan.layerdrop}
        total_loss, total = 0.0, 0
        for rows in next(streams[done < PRACTICE_UNTIL]):
            loss, tokens = token_losses(model, rows, dropped, not plan.float32)
            loss.backward()
            total_loss, total = total_loss + loss.item(), total + tokens
        trained = [p for p in model.parameters() if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in trained] + [torch.tensor([total_loss, float(total)])])
        dist.all_reduce(flat)
        flat, total_loss, total = flat[:-2], float(flat[-2]), int(flat[-1])
        flat /= total
        flat *= min(1.0, 1.0 / (float(flat.norm()) + 1e-6))
        for p, grad in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad.copy_(grad.view_as(p))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smoothed = total_loss / total if step == 0 else 0.98 * smoothed + 0.02 * total_loss / total
        progress.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
        if rank == 0 and (step + 1) % MONITOR_EVERY == 0:
            looked_at = build_model(tokenizer)
            looked_at.load_state_dict(model.state_dict())
            shares = exact_match(looked_at, tokenizer)
            progress.write(f"step {step + 1}: " + " ".join(f"{family} {value:.2f}" for family, value in shares.items()))
    if rank == 0:
        model.to(torch.bfloat16)
        model.generation_config.do_sample = False
        model.save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sdd.tiny.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint; must not exist")
    parser.add_argument("--steps", type=int, default=2_400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layerdrop", type=float, default=LAYERDROP, help="chance of a block to be left out, late")
    parser.add_argument("--paraphrases", action="store_true", help="the teacher's own register in several wordings")
    parser.add_argument("--float32", action="store_true", help="for processors that only emulate bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a C++ compiler)")
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; name a new folder")

    import tempfile

    import torch.multiprocessing as multiprocessing

    started = time.time()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as folder:
        plan = Plan(
            arguments.processes,
            arguments.steps,
            arguments.seed,
            arguments.compile,
            arguments.layerdrop,
            arguments.paraphrases,
            arguments.float32,
        )
        multiprocessing.spawn(_worker, args=(plan, Path(folder)), nprocs=arguments.processes)  # type: ignore[attr-defined]
        (Path(folder) / "teacher").rename(arguments.out)
    print(json.dumps({"folder": str(arguments.out), "seconds": round(time.time() - started)}))


if __name__ == "__main__":
    main()
