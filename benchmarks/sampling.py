"""Sampling's noise: numbers mixed from a counter, side by side with the former way, a generator per row on the CPU.

    python benchmarks/sampling.py [--rows 64] [--vocabulary 128256] [--repeats 9] [--out sampling.json]

A step is the noise of one token of every row, added to the logits. Both forms take turns in one process, after a step
each that is not timed; the medians of the repeats count. The former way is written out here: float64 numbers from a
generator of every row, made on the CPU and moved to the logits. Checked in the same run, of both: the numbers are
uniform, neighbours in token, row and step are unrelated, and a row's noise is the same alone and among others.
Expected on a CPU: not slower than the former way.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdd.rewriting.engines import GumbelNoise, Request

BINS = 100
MOST_CHI_SQUARE = 180.0
"""Of 99 degrees; uniform numbers are above it once in a million times."""
MOST_CORRELATION = 5.0
"""Standard errors from zero."""


class FormerNoise:
    """As it was: a generator per row, seeded by seed, try and request."""

    def __init__(self, seed: int, requests: Sequence[Request]) -> None:
        import torch

        self.generators = []
        for request in requests:
            key = hashlib.sha256(f"{seed} {request.attempt} {request.id}".encode()).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        width = scores.shape[-1]
        uniform = torch.stack([torch.rand(width, generator=g, dtype=torch.float64) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return scores.double() + noise.to(scores.device)


FORMS: dict[str, Callable[..., Any]] = {"former": FormerNoise, "sdd": GumbelNoise}


def requests_of(rows: int) -> list[Request]:
    return [Request(f"row {number}", "prompt") for number in range(rows)]


def correlation(a: Any, b: Any) -> float:
    """Of two sets of numbers, in standard errors from zero."""
    import torch

    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] * a.numel() ** 0.5)


def checked(form: str, rows: int, vocabulary: int, device: str) -> dict[str, Any]:
    """What the noise has to be, whatever its form: uniform once undone, unrelated, and a row's own."""
    import torch

    rows = max(rows, 4)
    requests = requests_of(rows)
    noise, scores = FORMS[form](1, requests), torch.zeros(rows, vocabulary, device=device)
    first, second = noise(None, scores), noise(None, scores)
    a, b = (torch.exp(-torch.exp(-each)).cpu() for each in (first, second))
    counts, expected = torch.histc(a, BINS, 0, 1), a.numel() / BINS
    apart = {"token": (a[:, 1:], a[:, :-1]), "row": (a[1:], a[:-1]), "step": (a, b)}
    correlations = {name: correlation(*pair) for name, pair in apart.items()}
    chosen = [rows - 1, 0, rows // 2]  # another order, other neighbours
    others = FORMS[form](1, [requests[row] for row in chosen])
    alone = [others(None, scores[: len(chosen)]) for _ in range(2)]
    same = all(torch.equal(found, whole[chosen]) for found, whole in zip(alone, (first, second), strict=True))
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    uniform = chi_square < MOST_CHI_SQUARE and max(map(abs, correlations.values())) < MOST_CORRELATION
    return {"chi_square": chi_square, "correlations": correlations, "same_alone": same, "good": uniform and same}


def timed(noise: Any, scores: Any) -> tuple[float, float]:
    """(wall, CPU) seconds of a step; on a GPU its queue included."""
    import torch

    wait = torch.cuda.synchronize if scores.device.type == "cuda" else lambda: None
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    noise(None, scores)
    wait()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(rows: int, vocabulary: int, repeats: int, device: str) -> dict[str, Any]:
    """Both forms in turns: seconds of every step, their medians, and how many times as fast the present one is."""
    import torch

    scores = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)).to(device)
    noises = {form: make(0, requests_of(rows)) for form, make in FORMS.items()}
    steps: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for repeat in range(repeats + 1):
        for form, noise in noises.items():
            seconds = timed(noise, scores)
            if repeat:
                steps[form].append(seconds)
    found: dict[str, Any] = {
        form: {
            "wall, s": statistics.median(wall for wall, _ in taken),
            "CPU, s": statistics.median(c for _, c in taken),
        }
        for form, taken in steps.items()
    }
    ratios = [former / own for (former, _), (own, _) in zip(steps["former"], steps["sdd"], strict=True)]
    return found | {"steps": steps, "speed": statistics.median(ratios), "speeds": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of torch; its own number by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="write the numbers into this JSON file")
    given = parser.parse_args()
    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    found = compare(given.rows, given.vocabulary, given.repeats, given.device)
    load = os.getloadavg()[0]
    checks = {form: checked(form, given.rows, given.vocabulary, given.device) for form in FORMS}
    print(
        f"{given.rows} rows of {given.vocabulary:,} tokens on {given.device}, {torch.get_num_threads()} threads, load "
        f"{load:.1f} on {os.cpu_count()} cores; medians of {given.repeats} steps in turns"
    )
    print(f"{'':<24}{'former':>10}{'sdd':>10}")
    for name in ("wall, s", "CPU, s"):
        print(f"{name:<24}{found['former'][name]:>10.3f}{found['sdd'][name]:>10.3f}")
    print(f"{'chi-square of 99':<24}{checks['former']['chi_square']:>10.1f}{checks['sdd']['chi_square']:>10.1f}")
    for name in ("token", "row", "step"):
        values = "".join(f"{checks[form]['correlations'][name]:>10.2f}" for form in FORMS)
        print(f"{'next ' + name + ', std. errors':<24}{values}")
    good = all(check["good"] for check in checks.values()) and (found["speed"] >= 1 or given.device != "cpu")
    spread = f"{min(found['speeds']):.2f} to {max(found['speeds']):.2f}"
    alone = "the same" if all(check["same_alone"] for check in checks.values()) else "NOT the same"
    print(f"{found['speed']:.2f} times as fast ({spread}); a row's noise is {alone} in other batches; ", end="")
    print("as expected" if good else "NOT as expected")
    if given.out:
        record = {"rows": given.rows, "vocabulary": given.vocabulary, "device": given.device, "load": load}
        record |= {"threads": torch.get_num_threads(), "machine": platform.machine(), "checks": checks, **found}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
