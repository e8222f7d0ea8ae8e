"""Noise of a sampled step: a counter's, on the device, against a generator a row on the processor, as it once was.

    python benchmarks/sampling.py [--rows 64] [--vocabulary 128256] [--repeats 5]

Medians of repeats in turns, one thread. Checked in the same run: a row's noise does not depend on its batch, and it is
uniform.
"""

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdd.rewriting.engines import GumbelNoise, Request


class GeneratorNoise:
    """A generator a row, seeded by what decides its sample; float64 draws on the processor."""

    def __init__(self, seed: int, requests: Sequence[Request]) -> None:
        self.generators = []
        for request in requests:
            digest = hashlib.sha256(f"{seed} {request.attempt} {request.id}".encode()).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        rows = [torch.rand(scores.shape[-1], generator=one, dtype=torch.float64) for one in self.generators]
        uniform = torch.stack(rows).clamp_min(1e-300)
        return scores + (-torch.log(-torch.log(uniform))).to(scores.device)


def seconds(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = torch.zeros(arguments.rows, arguments.vocabulary, device=device)
    requests = [Request(str(n), "p") for n in range(arguments.rows)]
    ways = {"generator": GeneratorNoise(0, requests), "counter": GumbelNoise(0, requests)}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):  # the first warms up
        for name, way in ways.items():
            spent = seconds(lambda way=way: way(None, scores))  # type: ignore[misc]
            if repeat:
                taken[name].append(spent)
    whole, alone = GumbelNoise(0, requests)(None, scores), GumbelNoise(0, requests[-1:])(None, scores[-1:])
    assert torch.equal(whole[-1:], alone), "a row's noise depends on its batch"
    mean = float(torch.exp(-torch.exp(-whole)).mean())
    assert abs(mean - 0.5) < 5 / (12 * whole.numel()) ** 0.5, f"not uniform: mean {mean}"
    median = {name: statistics.median(times) for name, times in taken.items()}
    print(
        f"{arguments.rows} x {arguments.vocabulary:,} on {device}, one thread, medians of {arguments.repeats} in turns"
    )
    for name, times in taken.items():
        print(f"{name:<10} {median[name]:.3f} s a step ({min(times):.3f} to {max(times):.3f})")
    print(f"the counter takes {median['counter'] / median['generator']:.2f} of the generators' time")


if __name__ == "__main__":
    main()
