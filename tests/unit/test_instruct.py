"""Public datasets: how their rows become examples, from JSONL, Parquet and folders, and what is said of broken ones."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdd.answers import equal, extract
from sdd.data import Example
from sdd.data.instruct import GSM8K, Alpaca, Dolly, OpenMathInstruct1, OpenMathInstruct2
from sdd.data.local import LocalRows
from sdd.data.mixture import Mixture, part_of
from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint

INSTRUCT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "instruct"
files_at_hand = pytest.mark.skipif(not INSTRUCT.is_dir(), reason="the public data files are not beside the checkout")

ROWS: dict[type, dict[str, Any]] = {
    GSM8K: {"question": "How many?", "answer": "She has 48/2 = <<48/2=24>>24 clips.\n#### 24"},
    Dolly: {"instruction": "Who?", "context": "It was Ann.", "response": "Ann.", "category": "closed_qa"},
    Alpaca: {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    OpenMathInstruct1: {
        "question": "1+1?",
        "generated_solution": "It is \\boxed{2}.",
        "expected_answer": "2",
        "is_correct": True,
        "dataset": "gsm8k",
    },
    OpenMathInstruct2: {
        "problem": "1+1?",
        "generated_solution": "It is \\boxed{2}.",
        "expected_answer": "2",
        "problem_source": "augmented_math",
    },
}
EXAMPLES = {
    GSM8K: Example("0", "How many?", "She has 48/2 = 24 clips.\n#### 24", "24"),
    Dolly: Example("0", "Who?\n\nIt was Ann.", "Ann.", group="closed_qa"),
    Alpaca: Example("0", "Add.\n\n1 and 2", "3"),
    OpenMathInstruct1: Example("0", "1+1?", "It is \\boxed{2}.", "2", group="gsm8k"),
    OpenMathInstruct2: Example("0", "1+1?", "It is \\boxed{2}.", "2", group="augmented_math"),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_row_is_one_example_whatever_the_file(kind: Any, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, [ROWS[kind]])
    assert kind(str(path)).examples() == [EXAMPLES[kind]]


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.jsonl.gz", "train.parquet", "data/train-0-of-1.parquet", "x.jsonl"]
)
def test_a_folder_stands_for_its_training_split(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d" / name, [ROWS[GSM8K]])
    if name != "x.jsonl":
        write(tmp_path / "d" / "test.jsonl", [ROWS[GSM8K] | {"question": "of the test split"}])
    source = GSM8K(str(tmp_path / "d"))
    assert source.examples() == [EXAMPLES[GSM8K]]
    assert source.spec() == GSM8K(str(path)).spec(), "the place is not in the key"


def test_the_shards_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    for number in (1, 0, 2):
        rows = [{"question": f"{number} {n}", "answer": "#### 1"} for n in range(2)]
        write(tmp_path / f"train-{number:05d}-of-00003.parquet", rows)
    source = GSM8K(str(tmp_path))
    assert [(e.id, e.prompt) for e in source.examples()] == [
        (str(number), text) for number, text in enumerate(["0 0", "0 1", "1 0", "1 1", "2 0", "2 1"])
    ]
    digest = source.spec()["digest"]
    write(tmp_path / "train-00002-of-00003.parquet", [{"question": "other", "answer": "#### 1"}])
    assert GSM8K(str(tmp_path)).spec()["digest"] != digest


def test_rows_without_what_they_may_lack() -> None:
    assert Dolly.example(Dolly.__new__(Dolly), ROWS[Dolly] | {"context": ""}, "7", "line 8").prompt == "Who?"
    assert Alpaca.example(Alpaca.__new__(Alpaca), ROWS[Alpaca] | {"input": "  "}, "7", "line 8").prompt == "Add."


def test_rows_that_a_dataset_is_better_off_without(tmp_path: Path) -> None:
    """The published Alpaca has empty outputs; the others keep the ids of their places."""
    path = write(tmp_path / "a.jsonl", [ROWS[Alpaca], ROWS[Alpaca] | {"output": " "}, ROWS[Alpaca]])
    assert [e.id for e in Alpaca(str(path)).examples()] == ["0", "2"]
    with pytest.raises(UserError, match=r"dataset\.num_rows=3, but .*a\.jsonl has 2 rows"):
        Alpaca(str(path), num_rows=3).examples()
    wrong = ROWS[OpenMathInstruct1] | {"is_correct": False}
    path = write(tmp_path / "o.jsonl", [wrong, ROWS[OpenMathInstruct1]])
    assert [e.id for e in OpenMathInstruct1(str(path)).examples()] == ["1"]


BROKEN = {
    "no final answer": (GSM8K, {"answer": "It is 24."}, "the field 'answer' has no final answer after '####'"),
    "empty question": (GSM8K, {"question": ""}, "has no text in the field 'question'"),
    "null response": (Dolly, {"response": None}, "has no text in the field 'response'"),
    "number for output": (Alpaca, {"output": 3}, "has no text in the field 'output'"),
    "null solution": (OpenMathInstruct2, {"generated_solution": None}, "has no text in the field 'generated_solution'"),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(("kind", "change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_row_is_named(kind: Any, change: dict[str, Any], message: str, name: str, tmp_path: Path) -> None:
    place = "line 1" if name == "a.jsonl" else "row 1"
    path = write(tmp_path / name, [ROWS[kind] | change])
    with pytest.raises(UserError) as caught:
        kind(str(path)).examples()
    assert str(caught.value).startswith(f"dataset.path={path}: {place}")
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_parquet_without_a_column_is_refused_by_its_name(kind: Any, tmp_path: Path) -> None:
    for column in kind.columns:
        rest = {key: value for key, value in ROWS[kind].items() if key != column}
        path = write(tmp_path / "a.parquet", [rest])
        with pytest.raises(UserError) as caught:
            kind(str(path)).examples()
        assert str(caught.value) == f"dataset.path={path}: no column {column!r}; the file has {', '.join(rest)}"


def test_damaged_parquet_and_folders_without_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [ROWS[GSM8K]] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: not a complete Parquet file"):
        GSM8K(str(path)).examples()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: the folder has no train\.jsonl, train\.jsonl\.gz, train\.parquet"):
        GSM8K(str(tmp_path / "empty")).examples()
    with pytest.raises(UserError, match="no such file or folder"):
        GSM8K(str(tmp_path / "nowhere")).examples()


# ---- local ------------------------------------------------------------------------------------------------------


def test_named_fields(tmp_path: Path) -> None:
    row = {"q": "p", "a": "r", "uid": 7, "label": 4, "prompt": "not this"}
    fields = {"prompt": "q", "reference": "a", "id": "uid", "answer": "label"}
    for name in ("a.jsonl", "a.parquet"):
        path = write(tmp_path / name, [row])
        source = LocalRows(str(path), fields=fields)
        assert source.examples() == [Example("7", "p", "r", "4")]
        assert source.spec()["fields"] == fields
        with pytest.raises(UserError, match="'solution'"):
            LocalRows(str(path), fields=fields | {"reference": "solution"}).examples()
    with pytest.raises(UserError, match=r"dataset\.fields\.answr is no field of a row"):
        LocalRows(str(path), fields={"answr": "label"})
    assert LocalRows(str(path)).fields is None


# ---- mixtures ---------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Any]:
    """Makers of two sources of 40 and 30 rows."""
    many = write(tmp_path / "m.jsonl", [{"question": f"m{n}", "answer": f"#### {n}"} for n in range(40)])
    few = write(tmp_path / "f.jsonl", [ROWS[Dolly] | {"instruction": f"f{n}"} for n in range(30)])
    return {"math": lambda n: GSM8K(str(many), n), "dolly": lambda n: Dolly(str(few), n)}


def test_a_mixture_is_made_by_weight_and_smaller_ones_are_its_prefixes(parts: dict[str, Any]) -> None:
    weights = {"math": 3.0, "dolly": 1.0}
    whole = Mixture(parts, weights, 40).examples()
    names = [part_of(e.id) for e in whole]
    assert (names.count("math"), names.count("dolly")) == (30, 10)
    for n in (1, 2, 5, 13, 39):
        mixed = Mixture(parts, weights, n).examples()
        assert mixed == whole[:n]
        assert abs([part_of(e.id) for e in mixed].count("math") - 0.75 * n) < 1
    assert len({e.id for e in whole}) == 40
    assert [e.id.removeprefix("math/") for e in whole if part_of(e.id) == "math"] == [
        e.id for e in parts["math"](30).examples()
    ]
    assert {e.group for e in whole} == {"math", "dolly/closed_qa"}


def test_the_order_in_which_parts_are_named_counts_nothing(parts: dict[str, Any]) -> None:
    weights = {"math": 1.0, "dolly": 1.0}
    one, other = Mixture(parts, weights, 20), Mixture(dict(reversed(parts.items())), weights, 20)
    assert one.examples() == other.examples()
    assert one.spec() == other.spec()
    assert one.spec() != Mixture(parts, {"math": 2.0, "dolly": 1.0}, 20).spec()
    assert one.spec()["parts"]["dolly"]["digest"] == parts["dolly"](10).spec()["digest"]


def test_mistakes_of_a_mixture(parts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"dataset\.num_rows is not set; a mixture needs"):
        Mixture(parts, {"math": 1.0, "dolly": 1.0})
    with pytest.raises(UserError, match="two parts or more"):
        Mixture({"math": parts["math"]}, {"math": 1.0}, 4)
    with pytest.raises(UserError, match=r"dataset\.parts\.dolly: dataset\.num_rows=40, but .* has 30 rows"):
        Mixture(parts, {"math": 1.0, "dolly": 1.0}, 80).examples()


# ---- real files -------------------------------------------------------------------------------------------------


@files_at_hand
@pytest.mark.data
@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [
        (GSM8K, "gsm8k", 7473),
        (Dolly, "dolly", 15011),
        (Alpaca, "alpaca/train.jsonl.gz", 9225),
        (Alpaca, "alpaca/extra.jsonl.gz", 7252),
        (Alpaca, "alpaca_gpt4_demo", 999),
        (OpenMathInstruct1, "openmathinstruct1", 100),
        (OpenMathInstruct2, "openmathinstruct2", 100),
    ],
)
def test_every_row_of_the_real_files(kind: Any, name: str, count: int) -> None:
    examples = kind(str(INSTRUCT / name)).examples()
    assert len(examples) == count
    assert all(e.prompt.strip() and e.reference.strip() for e in examples)
    assert not [e for e in examples if kind is GSM8K and "<<" in e.reference]
    if kind is GSM8K:
        assert all(equal(extract(e.reference, "gsm8k") or "", e.answer or "") for e in examples)


# ---- a mixture through the stages -------------------------------------------------------------------------------


def test_every_part_is_rewritten_by_its_template_and_checked_by_its_rule(tmp_path: Path) -> None:
    """By the embedded teacher. The first reference of each part is wrong; only a part with an answer rule minds."""
    from sdd.models.chats import REWRITE_TEMPLATE, rewrite_prompt
    from sdd.rewriting.engines import HFEngine, Place, Request
    from sdd.stages.rewrites import build as build_rewrites
    from sdd.stages.runtime import Runtime
    from sdd.stages.sources import TEACHER
    from sdd.stages.targets import build as build_targets
    from sdd.store import Recipe
    from sdd.tiny.tasks import instances

    parts = {}
    for at, name in enumerate(("leaky", "loose", "strict")):
        tasks = list(instances("pool", 3, 6, ["arithmetic"]))[2 * at : 2 * at + 2]
        rows = [{"prompt": task.prompt, "reference": task.reference} for task in tasks]
        rows[0]["reference"] = "#### 7777"
        path = write(tmp_path / f"{name}.jsonl", rows)
        parts[name] = lambda n, path=str(path): LocalRows(path, n)
    source = Mixture(parts, dict.fromkeys(parts, 1.0), 6)
    runtime = Runtime(sources={"teacher": TEACHER, **source.sources()})
    templates = {"leaky": "{prompt}", "loose": REWRITE_TEMPLATE, "strict": "{prompt}"}
    engine = HFEngine(max_new_tokens=64)
    spec = {
        "teacher": "teacher",
        "dtype": "float32",
        "dataset": {"_target_": "sdd.data.mixture.Mixture", **source.spec()},
        "template": templates,
        "system_prompt": None,
        "engine": engine.spec(),
    }
    rewrites, targets = tmp_path / "rewrites", tmp_path / "targets"
    rewrites.mkdir()
    targets.mkdir()
    recipe = Recipe("rewrites", 1, spec)
    build_rewrites(runtime, recipe, {}, rewrites)
    examples = source.examples()
    engine.open(Checkpoint(TEACHER), "float32", None, Place(batch_size=16))
    asked: dict[str, dict[str, str]] = {}
    for template in set(templates.values()):
        chosen = [e for e in examples if template == templates[part_of(e.id)] or part_of(e.id) == "loose"]
        requests = [Request(e.id, rewrite_prompt(template, e.prompt, e.reference)) for e in chosen]
        asked[template] = {completion.id: completion.text for completion in engine.complete(requests)}
    made = [json.loads(line) for line in (rewrites / "rewrites.jsonl").open()]
    assert [row["id"] for row in made] == [e.id for e in examples]
    assert {row["id"]: row["rewrite"] for row in made} == {
        e.id: asked[templates[part_of(e.id)]][e.id] for e in examples
    }
    loose = [e.id for e in examples if part_of(e.id) == "loose"]
    assert any(asked["{prompt}"][id] != asked[REWRITE_TEMPLATE][id] for id in loose), "else no template would show"

    rules = {"leaky": "none", "loose": "none", "strict": "anywhere"}
    selection = {"rule": rules, "leak_phrases": {"leaky": ["the answer is"], "loose": [], "strict": []}}
    spec = {"mode": "self_distill", **selection, "select": True, "gold_share": 0.0}
    build_targets(runtime, Recipe("targets", 1, spec, {"rewrites": recipe}), {"rewrites": rewrites}, targets)
    reasons = {row["id"]: row["reason"] for row in map(json.loads, (targets / "train.jsonl").open())}
    ids = {part: [e.id for e in examples if part_of(e.id) == part] for part in parts}
    assert [[reasons[id] for id in ids[part]] for part in parts] == [["leak", "leak"], ["ok", "ok"], ["answer", "ok"]]
    groups = json.loads((targets / "summary.json").read_text())["groups"]
    assert groups == {"leaky": 2, "loose": 2, "strict": 2}


def test_a_folder_of_one_file_and_the_file_are_one_source(tmp_path: Path) -> None:
    """Evaluation may read the same file under the same digest: it must not be handed the folder."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "It is 2.\\n#### 2"}\n')
    of_folder, of_file = GSM8K(folder).sources(), GSM8K(folder / "train.jsonl").sources()
    assert of_folder == of_file == {GSM8K(folder).spec()["digest"]: folder / "train.jsonl"}
