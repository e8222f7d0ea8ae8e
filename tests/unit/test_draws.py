"""Which rows are drawn by what the cut took from them, in which order, and which of them are duplicates."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from sdd.data import duplicates
from sdd.data.draws import Damage, by_damage, interleaved, shares_by_damage, split_rows, weights_by_damage
from sdd.data.duplicates import distinct, grams, similarity
from sdd.errors import UserError
from sdd.finetuning.module import TrainingRow, loss_sum
from sdd.finetuning.rows import KeptRows
from sdd.models.checkpoints import Checkpoint
from sdd.stages import damaged, draws, surprisals
from sdd.stages.runtime import Runtime
from sdd.stages.tuned import tokenized
from sdd.store import Recipe
from sdd.store.files import Lines, read_jsonl, write_jsonl
from sdd.tiny.tasks import instances

IDS = [f"r{number}" for number in range(60)]
DAMAGES = {id: Damage(number / 10, 5 + number % 3) for number, id in enumerate(IDS)}

# ---- orders -----------------------------------------------------------------------------------------------------


def test_at_temperature_0_the_largest_damage_comes_first_and_ties_stay() -> None:
    damages = {"a": Damage(1.0, 2), "b": Damage(3.0, 2), "c": Damage(1.0, 9), "d": Damage(-2.0, 1)}
    assert by_damage(["d", "c", "a", "x", "b", "y"], damages, 0.0, seed=0) == ["b", "c", "a", "d", "x", "y"]
    assert by_damage(["a", "c", "b"], damages, 0.0, seed=5) == ["b", "a", "c"]


def test_a_warmer_draw_differs_by_seed_prefers_damage_and_is_drawn_by_row() -> None:
    drawn = [by_damage(IDS, DAMAGES, 0.5, seed) for seed in range(20)]
    assert len({tuple(one[:10]) for one in drawn}) == 20
    assert all(sorted(one) == sorted(IDS) for one in drawn)
    first = [sum(DAMAGES[id].per_token for id in one[:10]) / 10 for one in drawn]
    assert min(first) > sum(one.per_token for one in DAMAGES.values()) / 60
    assert sum(first) / 20 < sum(one.per_token for one in list(DAMAGES.values())[-10:]) / 10
    assert by_damage(IDS[::-1], DAMAGES, 0.5, seed=3) == drawn[3], "noise goes with the row, not with its place"


def test_the_first_row_is_drawn_in_proportion_to_exp_of_damage() -> None:
    damages = {"a": Damage(0.0, 1), "b": Damage(2.0, 1)}  # one standard deviation is 1
    first = Counter(by_damage(["a", "b"], damages, 2.0, seed)[0] for seed in range(1_000))
    assert first["b"] / 1_000 == pytest.approx(math.e / (1 + math.e), abs=0.05)


def test_shares_follow_the_ratio_of_perplexities() -> None:
    domains = {"a": "x", "b": "x", "c": "y", "d": "z"}
    damages = {"a": Damage(1.0, 3), "b": Damage(5.0, 1), "c": Damage(0.0, 7)}
    shares = shares_by_damage(domains, damages)  # x: (1*3 + 5*1) / 4 = 2
    assert shares == pytest.approx({"x": math.exp(2) / (math.exp(2) + 1), "y": 1 / (math.exp(2) + 1)})
    assert shares_by_damage({"a": "x", "b": "y"}, {"a": Damage(2e3, 1), "b": Damage(0.0, 1)}) == {"x": 1.0, "y": 0.0}


def test_domains_have_their_share_of_tokens_and_give_it_up_when_they_run_out() -> None:
    ids = [*(f"x{n}" for n in range(40)), *(f"y{n}" for n in range(4)), *(f"z{n}" for n in range(40)), "long"]
    domains = {id: id[0] for id in ids}
    damages = {id: Damage(0.0, 2 if id[0] == "x" else 1) for id in ids[:-1]}
    order = interleaved(ids, domains, {"x": 0.5, "y": 0.25, "z": 0.25}, damages)
    assert sorted(order) == sorted(ids) and order[-1] == "long"
    for name in "xyz":
        assert [id for id in order if id[0] == name] == [id for id in ids if id[0] == name]

    def tokens(rows: list[str]) -> Counter[str]:
        return Counter(name for id in rows for name in id[0] * damages[id].tokens)

    assert tokens(order[:12]) == {"x": 8, "y": 4, "z": 4}
    later = tokens(order[12:48])
    assert later["y"] == 0 and later["x"] == pytest.approx(2 * later["z"], abs=2)


def test_weights_are_damage_and_1_on_average_over_tokens() -> None:
    damages = {"a": Damage(1.0, 2), "b": Damage(3.0, 2), "c": Damage(-1.0, 4)}
    assert weights_by_damage(["a", "b", "c", "long"], damages) == {"a": 1.0, "b": 3.0, "c": 0.0, "long": 1.0}
    shapes = ((5, 3, 1.0), (9, 3, 0.0), (3, 1, 3.0))
    rows = KeptRows(TrainingRow([0] * length, prompt, weight=weight) for length, prompt, weight in shapes)
    harmless = KeptRows([TrainingRow([0, 0], 1, weight=0.0)])
    draws.balance(rows)
    draws.balance(harmless)
    assert [row.weight for row in rows] == pytest.approx([1.25, 0.0, 3.75])
    assert [row.weight for row in harmless] == [1.0]


# ---- duplicates -------------------------------------------------------------------------------------------------


def test_similarity_is_that_of_word_5_grams() -> None:
    one, other = grams("a b c d e f"), grams("A  b c d e g")
    assert one == {"a b c d e", "b c d e f"} and similarity(one, other) == pytest.approx(1 / 3)
    assert grams("too short") == {"too short"} and grams("") == {""}
    assert distinct(["a b c d e f", "A b c d e g"], 1 / 3) == [0]
    assert distinct(["a b c d e f", "A b c d e g"], 0.34) == [0, 1]
    assert distinct(["x y", "X  Y", "x z", "x y"], 1.0) == [0, 2]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("bits", [64, 8, 0])
def test_no_pair_is_overlooked(threshold: float, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a comparison of all pairs; with hashes that collide, too, and looked at in many small batches."""
    if bits < 64:
        monkeypatch.setattr(duplicates, "hash", lambda gram: hash(gram) % (1 << bits), raising=False)
        monkeypatch.setattr(duplicates, "AT_ONCE", 100)
        monkeypatch.setattr(duplicates, "SORTED", 50)
    texts = [f"{row['prompt']} {row['reference']}" for row in ROWS]
    texts += [text.replace("the", "a") for text in texts[::3]] + [text + " again" for text in texts[::4]]
    sets, kept = [grams(text) for text in texts], list[int]()
    for index, own in enumerate(sets):
        if all(similarity(own, sets[other]) < threshold for other in kept):
            kept.append(index)
    assert distinct(texts, threshold) == kept
    assert len(kept) < len(texts) or threshold == 1.0


# ---- draws of a student -----------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"validation_rows": 10, "num_rows": None}
ROWS = [
    {"id": task.id, "prompt": task.prompt, "reference": task.reference, "target": task.gold}
    for task in instances("pool", 0, 60)
]
DOMAINS = {row["id"]: row["id"].split("-")[0] for row in ROWS}


@pytest.fixture(scope="module")
def of_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Damage as if it had been measured; the last row is too long for that."""
    folder = tmp_path_factory.mktemp("damaged")
    rows = [{"id": row["id"], "damage": (7 * n % 60) / 10, "tokens": 3 + n % 5} for n, row in enumerate(ROWS[:-1])]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def ids_of(settings: Mapping[str, Any], seed: int, damaged: Path | None) -> tuple[list[str], list[str]]:
    return drawn_of(ROWS, settings, seed, damaged)


def drawn_of(
    rows: list[dict[str, Any]], settings: Mapping[str, Any], seed: int, damaged: Path | None
) -> tuple[list[str], list[str]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        write_jsonl(path, rows)
        drawn, held_out = draws.drawn({**SETTINGS, **settings}, seed, Lines(path), damaged, DOMAINS)
        return [row["id"] for row in drawn], [row["id"] for row in held_out]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"deduplicate": 0.05},
        {"choose": "damage", "choose_temperature": 0.5},
        {"choose": "damage", "choose_temperature": 0.5, "domains": "damage", "deduplicate": 0.9},
        {"weights": "damage"},
    ],
)
def test_every_draw_is_nested_holds_out_the_same_rows_and_differs_by_seed(settings: dict, of_rows: Path) -> None:
    damaged = of_rows if draws.needs_damage(settings) else None
    plain = split_rows(ROWS, 10, 20, seed=1)
    drawn, held_out = ids_of({**settings, "num_rows": 20}, 1, damaged)
    assert held_out == [row["id"] for row in plain[1]] and not set(drawn) & set(held_out)
    assert drawn == ids_of({**settings, "num_rows": 40}, 1, damaged)[0][:20]
    assert drawn != ids_of({**settings, "num_rows": 20}, 2, damaged)[0]
    assert (drawn == [row["id"] for row in plain[0]]) is ("choose" not in settings and "deduplicate" not in settings)


def test_duplicates_go_for_an_earlier_or_a_held_out_row(of_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, held_out = ids_of({"deduplicate": 1.0}, 0, None)
    assert len(drawn) == 50
    free = next(row for row in ROWS if row["id"] in drawn)
    out = next(row for row in ROWS if row["id"] in held_out)
    rows = [*ROWS, *({**row, "id": f"again-{row['id']}", "target": "another arm's"} for row in (free, out))]
    kept = set(drawn_of(rows, {"deduplicate": 1.0}, 0, None)[0])
    first = {row["id"] for row in split_rows(rows, 10, None, 0)[1]}
    twins = [{row["id"], f"again-{row['id']}"} for row in (free, out)]
    assert all(len(twin & (kept | first)) == 1 or twin <= first for twin in twins)
    with pytest.raises(UserError, match=r"finetune.deduplicate=1 leaves 50 rows"):
        ids_of({"deduplicate": 1.0, "num_rows": 51}, 0, None)


def test_a_number_of_target_tokens_bounds_a_draw(tokenizer: Any) -> None:
    rows = ROWS[:6]
    whole, _ = tokenized(tokenizer, rows, None, 256)
    tokens = [len(row.ids) - row.prompt_length for row in whole]
    assert list(tokenized(tokenizer, rows, None, 256, sum(tokens[:3]))[0]) == whole[:3]
    assert list(tokenized(tokenizer, rows, None, 256, sum(tokens[:4]) - 1)[0]) == whole[:3]
    assert list(tokenized(tokenizer, rows, None, 256, sum(tokens))[0]) == list(whole)
    with pytest.raises(UserError, match=f"the 6 rows beside the held-out ones have {sum(tokens)} target tokens"):
        tokenized(tokenizer, rows, None, 256, sum(tokens) + 1)


@pytest.mark.parametrize("cut", [False, True])
def test_a_row_counts_as_often_as_its_weight_says(cut: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the weight is the row twice, gradients included; logits in chunks or all at once."""
    from sdd.forward import chunks

    if cut:
        monkeypatch.setattr(chunks, "MOST_LOGITS", 0)
        monkeypatch.setattr(chunks, "CHUNK_TOKENS", 3)
    model = Checkpoint(tiny_llama).model("float32")
    head = model.get_output_embeddings().weight.requires_grad_(True)
    one, other = TrainingRow([1, 7, 9, 30, 41, 8], 2), TrainingRow([1, 5, 6, 3], 1)

    def of(*rows: TrainingRow) -> tuple[float, torch.Tensor, int]:
        head.grad = None
        loss, count = loss_sum(model, rows)
        loss.backward()
        return float(loss.detach()), head.grad.clone(), count

    weighed = of(dataclasses.replace(one, weight=2.0), dataclasses.replace(other, weight=0.0))
    twice = of(one, one)
    assert weighed[0] == pytest.approx(twice[0], rel=1e-5) and torch.allclose(weighed[1], twice[1], atol=1e-4)
    assert weighed[2] == 7


# ---- what the cut took ------------------------------------------------------------------------------------------


def test_damage_is_what_the_cut_took_from_a_target(tiny_llama: Path, sharded_llama: Path, tmp_path: Path) -> None:
    """The two random models stand in for a model and its cut; a row that one of them was not shown is left out."""
    targets, first, second = tmp_path / "targets", tmp_path / "surprisals", tmp_path / "damaged"
    for folder in (targets, first, second):
        folder.mkdir()
    rows = [{**row, "source": "rewrite", "reason": "ok"} for row in ROWS[:6]]
    rows[2] |= {"reference": "long " * 200}
    write_jsonl(targets / "train.jsonl", rows)
    runtime = Runtime(sources={"m": tiny_llama}, inference_batch_size=2)
    spec = {"model": "m", "dtype": "float32", "system_prompt": None, "max_length": 200}
    surprisals.build(runtime, Recipe("surprisals", 1, spec), {"targets": targets}, first)
    recipe = Recipe("damaged", 1, {"dtype": "float32", "system_prompt": None})
    inputs = {"targets": targets, "surprisals": first, "pruned": sharded_llama}
    damaged.build(runtime, recipe, inputs, second)
    records = list(read_jsonl(second / "rows.jsonl"))
    assert [record["id"] for record in records] == [row["id"] for row in rows if row is not rows[2]]
    from sdd.models.chats import training_ids

    checkpoint = Checkpoint(tiny_llama)
    ids, prompt = training_ids(checkpoint.tokenizer(), rows[0]["prompt"], rows[0]["target"], None)
    nll = []
    for folder in (tiny_llama, sharded_llama):
        with torch.no_grad():
            logits = Checkpoint(folder).model("float32")(torch.tensor([ids])).logits[0, prompt - 1 : -1]
        nll.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]))))
    assert records[0]["tokens"] == len(ids) - prompt
    assert records[0]["damage"] == pytest.approx(nll[1] - nll[0], abs=1e-4)
    facts = json.loads((second / "damaged.json").read_text())
    total = sum(record["damage"] * record["tokens"] for record in records) / sum(row["tokens"] for row in records)
    assert facts["rows"] == 5 and facts["damage"] == pytest.approx(total)
