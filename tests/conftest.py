"""Random models of a few thousand parameters, stored as stock checkpoints; no network, one thread.

Norm weights are drawn too: with the usual ones a state before and after the final norm has the same direction, and a
test could not tell which of them was measured. Biases are drawn for the same reason: zeros would hide a lost one.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

gc.disable()  # modules and tests are there to stay, and there are a million of their objects

BLOCKS = 4
WIDTH = 32
CONTEXT = 256


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded model's kind of tokenizer and its chat template, trained on fewer tasks."""
    from sdd.tiny.tokenizer import build_tokenizer

    return build_tokenizer(CONTEXT, tasks=1_000)


@pytest.fixture(scope="session")
def save_random(tokenizer: Any) -> Callable[..., Path]:
    """`save_random(folder, config, **options)`: a random float32 model of the config, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)

    def save(folder: Path, config: Any, **options: Any) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.uniform_(-0.5, 0.5)
        model.generation_config.do_sample = False
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def sizes(tokenizer: Any) -> dict[str, Any]:
    """Config values that every small model here shares."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path], sizes: Any) -> Path:
    """Folder of a 4-block, width-32 Llama with tied embeddings in one file."""
    from transformers import LlamaConfig

    return save_random(tmp_path_factory.mktemp("tiny_llama"), LlamaConfig(**sizes, tie_word_embeddings=True))


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path], sizes: Any) -> Path:
    """The same with a head of its own, over several files and an index."""
    from transformers import LlamaConfig

    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    return save_random(tmp_path_factory.mktemp("sharded_llama"), config, max_shard_size="60KB")


@pytest.fixture(scope="session")
def conversations() -> list[str]:
    """Seven running texts of different lengths."""
    from sdd.tiny.tasks import instances

    return [f"<|user|>{task.prompt}<|end|><|assistant|>{task.gold}" for task in instances("pool", 5, 7)]
