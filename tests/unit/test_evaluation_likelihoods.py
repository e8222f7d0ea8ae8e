"""Likelihoods from shared prefixes against lm-eval's own HFLM: values, greediness, and how much is computed."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sdd.evaluation.likelihoods import SharedPrefixes, keeps_prefixes
from sdd.evaluation.prefixes import DEEPEST, LONG, SHORTEST, STEP, Node, common_length, prefix_tree
from sdd.evaluation.tiny import suite_tasks
from sdd.models.checkpoints import Checkpoint
from sdd.stages.sources import TEACHER

Pairs = dict[str, list[tuple[str, str]]]
Wrapped = Callable[[type, int], Any]

# ---- the tree ----------------------------------------------------------------------------------------------------


def numbers(start: int, count: int) -> tuple[int, ...]:
    return tuple(range(start, start + count))


def walked(
    nodes: list[Node], before: tuple[int, ...] = (), depth: int = 0
) -> Iterator[tuple[Node, tuple[int, ...], int]]:
    """(node, tokens from the row's beginning to the node's end, depth)."""
    for node in nodes:
        assert node.start == len(before)
        whole = before + tuple(node.tokens)
        yield node, whole, depth
        yield from walked(node.children, whole, depth + 1)


EXAMPLES = numbers(0, LONG + 3)
CONTEXTS = [numbers(1000, 45), numbers(2000, 47), numbers(3000, 5)]
TREES = {
    "examples, contexts, choices": [
        EXAMPLES + context + choice for context in CONTEXTS for choice in (numbers(1, 4), numbers(7, 9), (7,), (8, 1))
    ],
    "one inside another": [EXAMPLES[:n] for n in (40, 41, 80, LONG, LONG + 3)],
    "nothing in common": [numbers(1000 * n, 30) for n in range(5)],
    "twice the same": [EXAMPLES, EXAMPLES, EXAMPLES[:20]],
    "ever deeper": [(*numbers(0, n), 9999) for n in range(20, 400, 20)],
}


@pytest.mark.parametrize("rows", TREES.values(), ids=TREES.keys())
def test_every_target_is_predicted_once_from_its_own_row(rows: list[tuple[int, ...]]) -> None:
    counts = [1 + n % 4 for n in range(len(rows))]
    places = [row[: len(row) - count + n + 1] for row, count in zip(rows, counts, strict=True) for n in range(count)]
    seen = {}
    for node, whole, depth in walked(prefix_tree(rows, counts)):
        assert depth <= DEEPEST
        assert node.tokens
        assert not node.children or len(node.tokens) >= SHORTEST
        for place, target in node.scored:
            assert target not in seen
            seen[target] = whole[: node.start + place + 1]
    assert seen == dict(enumerate(places))


def test_a_tree_shares_examples_and_contexts() -> None:
    rows = TREES["examples, contexts, choices"]
    (root,) = prefix_tree(rows, [1] * len(rows))
    assert len(root.tokens) == len(EXAMPLES), "a long prefix is kept to its end"
    inner = [node for node in root.children if node.children]
    assert [len(node.tokens) for node in inner] == [45 - 45 % STEP, 47 - 47 % STEP], "of one length: one batch"
    assert [len(node.children) for node in inner] == [4, 4]
    assert len(root.children) - len(inner) == 4, "a context of 5 tokens is repeated"


def test_common_length_by_hand() -> None:
    assert [common_length(*pair) for pair in [((1, 2, 3), (1, 2, 4)), ((1,), (1, 2)), ((2,), (1,)), ((), (1,))]] == [
        *(2, 1, 0, 0)
    ]


# ---- the embedded model ------------------------------------------------------------------------------------------


class Shared(SharedPrefixes, HFLM):
    """Both ways in one class, as the harness has it."""


@pytest.fixture(scope="module")
def model() -> Any:
    return Checkpoint(TEACHER).model("float32")


@pytest.fixture(scope="module")
def wrapped(model: Any) -> Wrapped:
    tokenizer = Checkpoint(TEACHER).tokenizer()
    return lambda kind, batch_size: kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Contexts and continuations by kind."""
    items = suite_tasks("tiny", ["nll"], "dev", 0, 12)["nll"].items
    chat = f"<|begin|><|user|>{items[0].prompt}<|end|><|assistant|>"
    golds = [item.gold or "" for item in items]
    examples = "".join(f"{item.prompt} {item.gold}\n" for item in items[5:8])
    long = [examples * 4 + items[0].prompt]
    words = golds[0].split(" ")
    return {
        "several tokens": list(itertools.product([examples + item.prompt for item in items[:4]], golds[:4])),
        "every beginning": [(chat, " ".join(words[:n])) for n in range(1, len(words) + 1)],
        "one token after examples": list(itertools.product([examples + item.prompt for item in items[:4]], "abcd")),
        "longer than the window": list(itertools.product(long, golds[:2])),
        "no context": [("", gold) for gold in golds[:3]],
        "spaces at the end": [(f"{items[0].prompt}  ", golds[0]), (f"{items[0].prompt} ", golds[0])],
    }


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The tokens of every pass while this lasts, padding included."""
    sizes: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: sizes.append(given[0].numel()))
    try:
        yield sizes
    finally:
        hook.remove()


def asked(language_model: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    answers: list[tuple[float, bool]] = language_model.loglikelihood(requests, disable_tqdm=True)
    return answers


def apart(first: list[tuple[float, bool]], second: list[tuple[float, bool]]) -> float:
    return max(abs(one[0] - other[0]) for one, other in zip(first, second, strict=True))


def test_likelihoods_are_hflms(model: Any, wrapped: Wrapped, pairs: Pairs) -> None:
    """Of every kind in one go, and in memory for one row as for many; each token's likelihood too, by beginnings."""
    mixed = [pair for of_kind in pairs.values() for pair in of_kind]
    expected = asked(wrapped(HFLM, 8), mixed)
    for batch_size in (8, 1):
        answers = asked(wrapped(Shared, batch_size), mixed)
        assert apart(answers, expected) < 1e-4
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == {True, False}
    lengths = {len(wrapped(Shared, 1)._encode_pair(*pair)[1]) for pair in pairs["one token after examples"]}
    assert lengths == {0, 1}, "of some prompts the last token goes on with the letter"


@pytest.mark.parametrize(("kind", "share"), [("several tokens", 0.5), ("one token after examples", 0.2)])
def test_what_requests_share_is_computed_once(
    kind: str, share: float, model: Any, wrapped: Wrapped, pairs: Pairs
) -> None:
    """What is left are contexts, or their ends after the same examples, then continuations, and padding."""
    language_model = wrapped(Shared, 8)
    encoded = [language_model._encode_pair(*pair) for pair in pairs[kind]]
    with counted(model) as passed:
        asked(language_model, pairs[kind])
    assert sum(passed) < share * sum(len(context) + len(continuation) for context, continuation in encoded)


def test_rows_that_are_cut_are_told_as_hflm_tells_them(
    wrapped: Wrapped, pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    def cuts(kind: type) -> int:
        caplog.clear()
        asked(wrapped(kind, 4), pairs["longer than the window"] + pairs["no context"])
        return sum("runcating" in record.getMessage() for record in caplog.records)

    with caplog.at_level("WARNING", "lm_eval.models.huggingface"):
        assert cuts(Shared) == cuts(HFLM) == len(pairs["longer than the window"])


def test_rolling_likelihoods_are_hflms(wrapped: Wrapped, pairs: Pairs) -> None:
    texts = [
        Instance("loglikelihood_rolling", {}, (context * 2,), 0) for context, _ in pairs["longer than the window"][:1]
    ]
    values = [wrapped(kind, 4).loglikelihood_rolling(texts, disable_tqdm=True) for kind in (HFLM, Shared)]
    assert values[1] == pytest.approx(values[0], abs=1e-3)


# ---- other caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "kept"), [(12, False), (256, True), (None, True)])
def test_a_window_that_slides_is_left_to_hflm(window: int | None, kept: bool, sizes: Any, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**sizes, sliding_window=window))
    pairs = list(itertools.product(["What is hot, and what is cold? " * 4, "Which way is up?"], ["up", "down and out"]))
    with counted(model) as passed:
        expected = asked(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), pairs)
        before = sum(passed)
        answers = asked(Shared(pretrained=model, tokenizer=tokenizer, batch_size=4), pairs)
    assert apart(answers, expected) < 1e-4
    assert (sum(passed) - before < before) == kept


def test_what_keeps_prefixes(sizes: Any) -> None:
    """Full attention does; states that are one for the whole row, and keys that depend on its length, do not."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, Qwen3NextConfig

    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    narrow = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_experts": 2, "num_experts_per_tok": 1}
    configs = {
        "llama": LlamaConfig(**sizes),
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4),
        "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2),
        "hybrid": Qwen3NextConfig(**sizes, **narrow),
        "length": LlamaConfig(**sizes, rope_parameters=scaled),
    }
    with torch.device("meta"):
        kept = {name: keeps_prefixes(AutoModelForCausalLM.from_config(each), 64) for name, each in configs.items()}
    assert kept == {"llama": True, "gpt2": True, "mamba": False, "hybrid": False, "length": False}
