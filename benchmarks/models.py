"""The models that benchmarks share."""

import json
from pathlib import Path
from typing import Any

TEACHER = Path(__file__).resolve().parents[1] / "sdd" / "tiny" / "teacher"
"""The embedded model."""


def random_llama(**settings: Any) -> Any:
    """A float32 Llama of 12 blocks, hidden 512, 32,000 tokens, the same every time; matrix products dominate there."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 32_000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(**{**sizes, **heads, "bos_token_id": None, "eos_token_id": None, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def writer_of_stories(stories: tuple[Path, Path], rows: int, longest: int) -> Any:
    """(model, tokens of as many of the first stories) of a checkpoint and a file; each is cut at `longest` tokens."""
    from itertools import islice

    from sdd.models.checkpoints import Checkpoint

    checkpoint = Checkpoint(stories[0])
    tokenizer = checkpoint.tokenizer()
    with stories[1].open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, rows)]
    return checkpoint.model("float32"), tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
