"""lm-eval's free-form answers by this project's own loop, which keeps the batch full over all prompts of a task.

Prompts, cuts, stop strings, limits, filters and metrics stay lm-eval's; its call of stock generation on one padded
batch is what is replaced. A row ends by itself, as it would alone in a batch of lm-eval's. Sampled answers and caches
that the loop does not know stay with lm-eval.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.forward import ranks
from sdd.forward.batches import padded
from sdd.forward.decoding import Ending, decode, keeps_all
from sdd.forward.parts import Parts

BATCHES = 16
"""Prompts are answered so many batches' worth at a time, which is what a kill costs."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GREEDY = {"until", "do_sample", "temperature", "top_p", "top_k", *LIMITS}
"""Settings that lm-eval reads itself, or that greedy generation does not look at."""


class FullBatches:
    """What is mixed into lm-eval's `HFLM`."""

    places: int | None = None
    """Rows of the batch while answers come from the loop."""
    kept: Path | None = None
    """What files are named after in which likelihoods and answers outlast a kill."""

    def generate_until(self: Any, requests: list[Any], disable_tqdm: bool = False) -> Any:
        if not (keeps_all(self.model) and all(is_greedy(request.args[1]) for request in requests)):
            if not all(is_greedy(request.args[1]) for request in requests):  # draws follow each other: all make all
                return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
            own = ranks.own(list(enumerate(requests)))
            asked = [request for _, request in own]
            answers = super().generate_until(asked, disable_tqdm=disable_tqdm) if asked else []  # type: ignore[misc]
            whole = ranks.merged({index: answer for (index, _), answer in zip(own, answers, strict=True)})
            return [whole[index] for index in range(len(requests))]
        self.places = self.batch_size_per_gpu
        self.batch_size_per_gpu *= BATCHES  # lm-eval hands over so many prompts at once
        try:
            return super().generate_until(requests, disable_tqdm=True)  # type: ignore[misc]
        finally:
            self.batch_size_per_gpu, self.places = self.places, None

    def _model_generate(self: Any, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        """(N, T) left-padded prompts -> (N, T + longest answer), padded behind an answer."""
        import torch

        if self.places is None:
            return super()._model_generate(context, max_length, stop, **settings)  # type: ignore[misc]
        masks = settings["attention_mask"].bool()
        prompts = [(row[mask] if mask.any() else row[-1:]).tolist() for row, mask in zip(context, masks, strict=True)]
        added = self.tokenizer.get_added_vocab()
        ends = self.model.generation_config.eos_token_id
        stops = {*(ends if isinstance(ends, list) else [ends]), *(added[text] for text in stop if text in added)}
        ending = ending_of(self.tokenizer, [text for text in stop if text and text not in added])
        limit = max_length - context.shape[1]
        with Parts(self.kept, self.kept and [prompts, limit, sorted(stops), stop, self.places]) as parts:
            known = json.loads(ranks.told(json.dumps(list(parts.known())).encode())[0])  # what the first rank knows
            if not known:
                rows = decode(self.model, prompts, limit, stops, self.places, ending=ending)
                answers = dict(tqdm(rows, total=len(prompts), desc="answers", unit="row", leave=False))
                known = [[answers[index] for index in range(len(prompts))]]
                if ranks.rank() == 0:
                    parts.add(lambda: known[0])
                    parts.write()
        pad = self.tokenizer.pad_token_id
        new, mask = padded(known[0], context.device)
        return torch.cat([context, new.masked_fill(mask == 0, pad)], dim=1)


def is_greedy(settings: Mapping[str, Any]) -> bool:
    """Whether these settings of a request ask for the most likely tokens and for nothing else."""
    sampled = settings.get("do_sample")
    warm = sampled is None and float(settings.get("temperature") or 0) > 0
    return not sampled and not warm and set(settings) <= GREEDY


def ending_of(tokenizer: Any, texts: Sequence[str]) -> Ending | None:
    """Where a row's tokens come to one of the texts; lm-eval looks back two tokens further than a text takes."""
    if not texts:
        return None
    widths = {text: len(tokenizer.encode(text, add_special_tokens=False)) + 2 for text in texts}
    longest = max(widths.values())

    def ending(tokens: list[int], fresh: int) -> int | None:
        recent = tokenizer.decode(tokens[-(longest + fresh) :])
        if not any(text in recent for text in texts):
            return None
        for end in range(len(tokens) - fresh + 1, len(tokens)):
            if any(text in tokenizer.decode(tokens[max(0, end - width) : end]) for text, width in widths.items()):
                return end
        return len(tokens)

    return ending
