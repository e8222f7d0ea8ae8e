"""Generation in batches against generation one prompt at a time, and sampling against the distribution it claims."""

import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdd.models.chats import chat_prompt_ids
from sdd.models.checkpoints import Checkpoint
from sdd.rewriting import engines
from sdd.rewriting.engines import Completion, GumbelNoise, HFEngine, Place, Request
from sdd.tiny.tasks import instances

NEW = 12


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [Request(f"r{number}", task.prompt) for number, task in enumerate(instances("pool", 9, 8))]


def opened(folder: Path, **settings: Any) -> HFEngine:
    engine = HFEngine(**{"max_new_tokens": NEW, **settings})
    engine.open(Checkpoint(folder), "float32", None, Place(batch_size=4))
    return engine


def answered(engine: HFEngine, requests: list[Request]) -> dict[str, Completion]:
    found = {completion.id: completion for completion in engine.complete(requests)}
    assert set(found) == {request.id for request in requests}
    return found


@torch.no_grad()
def greedy(engine: HFEngine, prompt: str, new: int = NEW) -> list[int]:
    """Argmax of the full forward pass, no batch, no padding, no cache."""
    ids = chat_prompt_ids(engine.tokenizer, prompt)
    start = len(ids)
    for _ in range(new):
        ids = [*ids, int(engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
        if ids[-1] == engine.tokenizer.eos_token_id:
            break
    return ids[start:]


# ---- greedy -----------------------------------------------------------------------------------------------------


def test_a_batch_of_mixed_lengths_equals_one_at_a_time(tiny_llama: Path, requests: list[Request]) -> None:
    engine = opened(tiny_llama, batch_size=8)
    lengths = {len(chat_prompt_ids(engine.tokenizer, request.prompt)) for request in requests}
    assert len(lengths) > 4
    found = answered(engine, requests)
    for request in requests:
        expected = engine.tokenizer.decode(greedy(engine, request.prompt), skip_special_tokens=True).strip()
        assert found[request.id] == Completion(request.id, expected, "length")
    assert len({completion.text for completion in found.values()}) > 4, "all alike: the prompts were not read"


def test_greedy_text_does_not_depend_on_batches_or_order(tiny_llama: Path, requests: list[Request]) -> None:
    whole = answered(opened(tiny_llama, batch_size=8), requests)
    assert answered(opened(tiny_llama, batch_size=1), requests) == whole
    assert answered(opened(tiny_llama, batch_size=3), requests[::-1]) == whole


def test_a_system_prompt_is_read(tiny_llama: Path, requests: list[Request]) -> None:
    engine = HFEngine(max_new_tokens=NEW)
    engine.open(Checkpoint(tiny_llama), "float32", "Be brief.", Place(batch_size=4))
    assert answered(engine, requests) != answered(opened(tiny_llama), requests)


def test_generation_ends_at_the_end_of_turn(tiny_llama: Path, requests: list[Request]) -> None:
    """A token that one answer comes to is made the end of turn: that answer stops before it, its batch goes on."""
    engine = opened(tiny_llama, batch_size=8)
    runs = {request.id: greedy(engine, request.prompt) for request in requests}
    special = set(engine.tokenizer.all_special_ids)
    candidates = [token for run in runs.values() for token in run[2:6] if token not in special]
    end = min(candidates, key=lambda token: sum(token in run for run in runs.values()))
    engine.tokenizer.eos_token = engine.tokenizer.convert_ids_to_tokens(end)
    found = answered(engine, requests)
    for id, run in runs.items():
        kept = run[: run.index(end)] if end in run else run
        assert found[id].finish == ("stop" if end in run else "length")
        assert found[id].text == engine.tokenizer.decode(kept, skip_special_tokens=True).strip()
    assert {completion.finish for completion in found.values()} == {"stop", "length"}


def test_an_answer_that_ends_on_its_last_token_has_stopped(tiny_llama: Path, requests: list[Request]) -> None:
    engine = opened(tiny_llama)
    run = greedy(engine, requests[0].prompt)
    first = next(token for token in run if token not in engine.tokenizer.all_special_ids)
    engine.max_new_tokens = run.index(first) + 1
    engine.tokenizer.eos_token = engine.tokenizer.convert_ids_to_tokens(first)
    assert answered(engine, requests[:1])["r0"].finish == "stop"
    engine.max_new_tokens -= 1
    if engine.max_new_tokens:
        assert answered(engine, requests[:1])["r0"].finish == "length"


def test_prompts_over_the_limit_are_not_asked(tiny_llama: Path, requests: list[Request]) -> None:
    engine = opened(tiny_llama)
    whole = answered(engine, requests)
    lengths = {request.id: len(chat_prompt_ids(engine.tokenizer, request.prompt)) for request in requests}
    engine.max_prompt_tokens = sorted(lengths.values())[3]
    found = answered(engine, requests)
    for id, length in lengths.items():
        expected = whole[id] if length <= engine.max_prompt_tokens else Completion(id, "", "too_long")
        assert found[id] == expected
    assert Counter(completion.finish for completion in found.values())["too_long"] == 4
    engine.max_prompt_tokens = 1
    assert {completion.finish for completion in engine.complete(requests)} == {"too_long"}


def test_no_requests() -> None:
    engine = HFEngine(batch_size=2)
    assert list(engine.complete([])) == []


def test_a_model_without_a_template_is_asked_plainly(tiny_llama: Path, requests: list[Request], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    engine = opened(folder, batch_size=8)
    asked = engine.tokenizer.decode(chat_prompt_ids(engine.tokenizer, "2 + 2?"))
    assert asked == "<|begin|>Question:\n2 + 2?\n\nAnswer:\n"
    found = answered(engine, requests)
    for request in requests[:3]:
        expected = engine.tokenizer.decode(greedy(engine, request.prompt), skip_special_tokens=True).strip()
        assert found[request.id].text == expected


def test_generation_ends_at_every_stop_of_the_generation_config(tiny_llama: Path, requests: list[Request]) -> None:
    engine = opened(tiny_llama, batch_size=8)
    runs = {request.id: greedy(engine, request.prompt) for request in requests}
    special = set(engine.tokenizer.all_special_ids)
    listed = [next(token for token in runs[f"r{n}"][2:] if token not in special) for n in (0, 1)]
    engine.model.generation_config.eos_token_id = [engine.tokenizer.eos_token_id, *listed]
    found = answered(engine, requests)
    for id, run in runs.items():
        end = next((at for at, token in enumerate(run) if token in listed), None)
        assert found[id].finish == ("length" if end is None else "stop")
        assert found[id].text == engine.tokenizer.decode(run[:end], skip_special_tokens=True).strip()
    assert found["r0"].finish == found["r1"].finish == "stop"


# ---- sampling ---------------------------------------------------------------------------------------------------


def test_the_spec_names_what_decides_the_text() -> None:
    greedy_spec = HFEngine(seed=1, batch_size=8).spec()
    assert greedy_spec == HFEngine(seed=2, batch_size=64).spec()
    assert greedy_spec == {"kind": "hf", "max_new_tokens": 256, "max_prompt_tokens": 1024, "temperature": 0.0}
    sampled = HFEngine(temperature=0.7, tries=2, seed=1)
    assert sampled.spec() != HFEngine(temperature=0.7, tries=2, seed=2).spec()
    assert sampled.spec() == HFEngine(temperature=0.7, tries=2, seed=1, batch_size=3).spec()
    rebuilt = HFEngine(**{key: value for key, value in sampled.spec().items() if key != "kind"})
    assert rebuilt.spec() == sampled.spec()


def test_a_sample_does_not_depend_on_its_batch(tiny_llama: Path, requests: list[Request]) -> None:
    settings = {"temperature": 1.0, "seed": 5}
    whole = answered(opened(tiny_llama, batch_size=8, **settings), requests)
    assert answered(opened(tiny_llama, batch_size=8, **settings), requests) == whole
    assert answered(opened(tiny_llama, batch_size=1, **settings), requests) == whole
    assert answered(opened(tiny_llama, batch_size=3, **settings), requests[5:1:-1]) == {
        request.id: whole[request.id] for request in requests[5:1:-1]
    }


def test_a_sample_is_decided_by_seed_request_and_try(tiny_llama: Path, requests: list[Request]) -> None:
    prompt = requests[0].prompt
    engine = opened(tiny_llama, temperature=1.5, seed=0)
    texts = {c.id: c.text for c in engine.complete([Request(f"{n}", prompt) for n in range(6)])}
    texts |= {f"try {n}": next(engine.complete([Request("0", prompt, n)])).text for n in (1, 2)}
    engine.seed = 1
    texts["seed"] = next(engine.complete([Request("0", prompt)])).text
    texts["greedy"] = next(opened(tiny_llama).complete([Request("0", prompt)])).text
    assert len(set(texts.values())) == len(texts)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_the_loop_says_what_stock_generation_says(
    settings: dict[str, Any], tiny_llama: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At other tries too; stock code answers where the cache is of a kind that the loop does not know."""
    tried = [Request(request.id, request.prompt, number % 3) for number, request in enumerate(requests)]
    own = answered(opened(tiny_llama, batch_size=3, **settings), tried)
    monkeypatch.setattr(engines, "keeps_all", lambda model: False)
    stock = answered(opened(tiny_llama, batch_size=8, **settings), tried)
    assert own == stock
    assert [own[id].tokens for id in own] == [stock[id].tokens for id in own]


def test_noise_repeats_and_moves_on_with_every_token() -> None:
    scores = torch.zeros(2, 5)
    one, other = (GumbelNoise(3, [Request("a", "p"), Request("b", "p")]) for _ in range(2))
    first, second = one(None, scores), one(None, scores)
    assert torch.equal(other(None, scores), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(GumbelNoise(3, [Request("b", "p")])(None, scores[:1])[0], first[1])


def test_noise_is_uniform_and_rows_steps_and_tokens_are_unrelated() -> None:
    noise = GumbelNoise(0, [Request(str(n), "p") for n in range(16)])
    scores = torch.zeros(16, 32000)
    first, second = (torch.exp(-torch.exp(-noise(None, scores))) for _ in range(2))
    counts = torch.histc(first.flatten(), 100, 0, 1)
    expected = first.numel() / 100
    assert float(((counts - expected) ** 2 / expected).sum()) < 180, "chi-square, 99 degrees: above 180 in one of 1e6"
    for a, b in ((first[:, 1:], first[:, :-1]), (first[1:], first[:-1]), (first, second)):
        z = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] * a.numel() ** 0.5
        assert abs(float(z)) < 5


def test_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    requests = [Request(str(n), "p") for n in range(3)]
    together = GumbelNoise(5, requests)(None, torch.zeros(3, 1000))
    alone = [GumbelNoise(5, [request])(None, torch.zeros(1, 1000))[0] for request in requests]
    assert torch.equal(together, torch.stack(alone))


def splitmix64(seed: int, request: str, step: int, token: int) -> float:
    """The noise of one token in plain integers: two rounds of SplitMix64, over the row's step and over the token."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    key = int.from_bytes(hashlib.sha256(f"{seed} 0 {request}".encode()).digest()[:8], "big")
    row = mixed((key + step * golden) & mask)
    uniform = (mixed((row + (token + 1) * golden) & mask) % 2**53 + 0.5) / 2**53
    return -math.log(-math.log(uniform))


def test_noise_is_a_function_of_a_counter() -> None:
    """Of seed, request, try, step and token; not of how many tokens or rows there are."""
    wide, narrow = (GumbelNoise(7, [Request(id, "p") for id in ids]) for ids in (("a", "b", "c"), ("b",)))
    for step in range(3):
        noise = wide(None, torch.zeros(3, 40_000))
        assert torch.equal(narrow(None, torch.zeros(1, 300))[0], noise[1, :300])
        for row, token in ((0, 0), (1, 299), (1, 32_767), (2, 32_768), (2, 39_999)):
            assert float(noise[row, token]) == pytest.approx(splitmix64(7, "abc"[row], step, token), rel=1e-12)


def test_noise_is_made_where_the_logits_are() -> None:
    """On a device that holds shapes alone: nothing as wide as the vocabulary is made on the CPU and moved."""
    made: list[tuple[str, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            made.extend((t.device.type, t.numel()) for t in tree_leaves(output) if isinstance(t, torch.Tensor))
            return output

    with Watch():
        noise = GumbelNoise(0, [Request(str(n), "p") for n in range(4)])(None, torch.zeros(4, 1000, device="meta"))
    assert (noise.device.type, noise.dtype) == ("meta", torch.float64)
    assert max(size for device, size in made if device == "meta") >= 4000
    assert max((size for device, size in made if device == "cpu"), default=0) <= 4


def test_noise_is_finite_at_both_ends() -> None:
    """Keys whose first token draws the smallest and the largest number; an excluded token stays excluded."""
    mask = (1 << 64) - 1

    def unmixed(z: int) -> int:
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
            z = (z ^ (z >> shift) ^ (z >> 2 * shift)) * pow(factor, -1, 1 << 64) & mask
        return z

    noise = GumbelNoise(0, [Request(id, "p") for id in "abc"])
    noise.keys = [unmixed((unmixed(end) - 0x9E3779B97F4A7C15) & mask) for end in (0, 2**53 - 1, 2**53 - 1)]
    smallest, largest, excluded = noise(None, torch.tensor([[0.0], [0.0], [-math.inf]]))[:, 0].tolist()
    assert smallest == pytest.approx(-math.log(54 * math.log(2)))
    assert largest == pytest.approx(53 * math.log(2), rel=1e-3)
    assert excluded == -math.inf


SHIPPED = [
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 3},
    {"forced_eos_token_id": 7},
    {"suppress_tokens": list(range(40, 200))},
    {"begin_suppress_tokens": list(range(40, 200))},
    {"min_new_tokens": 5},
    {"bad_words_ids": [[n] for n in range(40, 200)]},
    {"exponential_decay_length_penalty": [1, 9.0]},
    {"sequence_bias": [[[50], 100.0]]},
    {"do_sample": True, "temperature": 9.0, "top_k": 3},
    {"num_return_sequences": 2, "num_beams": 2},
]


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda s: next(iter(s)))
def test_greedy_is_greedy_whatever_the_checkpoint_ships(
    shipped: dict, tiny_llama: Path, requests: list[Request], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | shipped))
    own = [c.text for c in opened(tiny_llama, max_new_tokens=8).complete(requests)]
    assert [c.text for c in opened(folder, max_new_tokens=8).complete(requests)] == own
    assert Checkpoint(folder).steers_generation == ("do_sample" not in shipped)
    assert not Checkpoint(tiny_llama).steers_generation


def test_gumbel_argmax_is_a_sample_of_the_softmax() -> None:
    """Four thousand draws of three tokens; a fourth is excluded, as a nucleus does it."""
    n, logits = 4000, torch.tensor([0.3, -1.0, 1.2, -math.inf])
    noise = GumbelNoise(0, [Request(str(number), "p") for number in range(n)])
    drawn = Counter(noise(None, logits.expand(n, 4)).argmax(dim=-1).tolist())
    for token, p in enumerate(logits.softmax(dim=0).tolist()):
        assert abs(drawn[token] / n - p) <= 4 * math.sqrt(p * (1 - p) / n), token


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (2.0, 1.0), (2.0, 0.6)])
def test_sampled_tokens_follow_temperature_and_nucleus(
    temperature: float, top_p: float, tiny_llama: Path, requests: list[Request]
) -> None:
    """First tokens of one prompt against the softmax of the logits / temperature, cut to its nucleus."""
    n, prompt = 600, requests[1].prompt
    engine = opened(tiny_llama, max_new_tokens=1, temperature=temperature, top_p=top_p, batch_size=100)
    engine.tokenizer.eos_token = "<|pad|>"
    with torch.no_grad():
        logits = engine.model(torch.tensor([chat_prompt_ids(engine.tokenizer, prompt)])).logits[0, -1]
    p, order = (logits.double() / temperature).softmax(dim=0).sort(descending=True)
    p = p * (p.cumsum(dim=0) - p < top_p)
    p /= p.sum()
    expected: Counter[str] = Counter()
    for token, share in zip(order.tolist(), p.tolist(), strict=True):
        expected[engine.tokenizer.decode([token], skip_special_tokens=True).strip()] += share  # type: ignore[assignment]
    drawn = Counter(c.text for c in engine.complete([Request(str(number), prompt) for number in range(n)]))
    for text, share in expected.most_common(5):
        assert abs(drawn[text] / n - share) <= 4 * math.sqrt(share * (1 - share) / n), text
    assert not [text for text in drawn if not expected[text]]
    assert expected.most_common(1)[0][1] < 0.999, "nothing to draw"
