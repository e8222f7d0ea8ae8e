"""Calibration texts of corpora, of WikiText-2's lines and pages, and of fine-tuning rows."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdd.data.instruct import GSM8K
from sdd.data.texts import CorpusTexts, DatasetTexts, LocalTexts, WikiText2
from sdd.errors import UserError

TEXT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text"
files_at_hand = pytest.mark.skipif(not TEXT.is_dir(), reason="the public data files are not beside the checkout")


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_corpus_gives_its_first_texts_or_a_nested_sample(tmp_path: Path) -> None:
    path = written(tmp_path / "c.jsonl", [{"text": f"text number {n}"} for n in range(50)])
    assert CorpusTexts(3, path).texts() == LocalTexts(3, path).texts() == [f"text number {n}" for n in range(3)]
    assert CorpusTexts(3, path).spec() == LocalTexts(3, path).spec(), "the same texts are the same work"
    samples = [CorpusTexts(n, path, seed=5).texts() for n in (4, 20)]
    assert samples[0] == samples[1][:4]
    assert samples[1] != CorpusTexts(20, path, seed=6).texts()
    assert set(samples[1]) < set(CorpusTexts(50, path).texts())


def test_texts_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": ["one text", "two texts"], "url": ["a", "b"]}), path)
    assert LocalTexts(2, str(path)).texts() == CorpusTexts(2, str(path)).texts() == ["one text", "two texts"]
    pq.write_table(pa.table({"page": ["one text"]}), path)
    for kind in (LocalTexts, CorpusTexts):
        with pytest.raises(UserError) as caught:
            kind(2, str(path)).texts()
        assert str(caught.value) == f"calibration.path={path}: no column 'text'; the file has page"


def test_empty_documents_are_a_mistake_in_ones_own_file_and_passed_over_in_a_corpus(tmp_path: Path) -> None:
    path = written(tmp_path / "c.jsonl", [{"text": ""}, {"text": "word"}, {"text": "two words"}])
    assert CorpusTexts(3, path).texts() == ["two words"]
    with pytest.raises(UserError, match="line 1 has no text in the field 'text'"):
        LocalTexts(3, path).texts()
    nothing = written(tmp_path / "n.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match="has no text of two words or more"):
        CorpusTexts(3, nothing).texts()
    wrong = written(tmp_path / "w.jsonl", [{"txt": "two words"}])
    with pytest.raises(UserError, match="line 1 has no field 'text'"):
        CorpusTexts(3, wrong).texts()


LINES = [
    "",
    " = One = \n",
    "",
    " A line . \n",
    " = = Part = = \n",
    " = \n",
    "",
    " More . \n",
    "",
    " = Two = \n",
    "",
    " End . \n",
]
ONE = " = One = \n \n A line . \n = = Part = = \n = \n \n More . \n \n"
TWO = " = Two = \n \n End . \n"


def test_wikitext_lines_are_put_together_into_articles(tmp_path: Path) -> None:
    path = written(tmp_path / "w.jsonl", [{"text": line} for line in LINES])
    assert WikiText2(5, path).texts() == [ONE, TWO]
    assert WikiText2(1, path).texts() == [ONE]
    pages = written(tmp_path / "p.jsonl", [{"page": "one page"}, {"page": "another page"}])
    assert WikiText2(5, pages).texts() == ["one page", "another page"]
    with pytest.raises(UserError, match="line 1 has no field 'text' or 'page'"):
        WikiText2(5, written(tmp_path / "x.jsonl", [{"txt": "a b"}])).texts()


@files_at_hand
@pytest.mark.data
def test_the_published_lines_make_the_published_pages() -> None:
    """The page file also cuts at two lines within an article that only look like a title (" = 1 henry and ... = ")."""
    of_lines = WikiText2(100, str(TEXT / "wikitext2_raw_test_lines.jsonl")).texts()
    of_pages = WikiText2(100, str(TEXT / "wikitext2_raw_test_pages.jsonl")).texts()
    assert "".join(of_lines).split() == "".join(of_pages).split()
    assert (len(of_lines), len(of_pages)) == (60, 62)
    same = [text.split() for text in of_lines if text.split() in [page.split() for page in of_pages]]
    assert len(same) == 59


@files_at_hand
@pytest.mark.data
def test_the_real_corpora() -> None:
    c4 = CorpusTexts(64, str(TEXT / "c4.jsonl.gz")).texts()
    assert c4[0].startswith("Beginners BBQ Class") and len(set(c4)) == 64
    mixed = CorpusTexts(256, str(TEXT / "redpajama_sample.jsonl.gz"), seed=0).texts()
    with gzip.open(TEXT / "redpajama_sample.jsonl.gz", "rt", encoding="utf-8") as file:
        subset = {row["text"]: row["red_pajama_subset"] for row in map(json.loads, file)}
    assert len({subset[text] for text in mixed}) >= 3, "the first rows are all of one source"


def test_the_fine_tuning_rows_as_texts(tmp_path: Path) -> None:
    path = written(tmp_path / "g.jsonl", [{"question": f"q {n}?", "answer": f"#### {n}"} for n in range(9)])
    source = GSM8K(path, num_rows=6, seed=1)
    texts = DatasetTexts(4, source, source.spec())
    assert texts.texts() == [f"{e.prompt}\n\n{e.reference}" for e in source.examples()[:4]]
    assert texts.spec() == DatasetTexts(4, source, source.spec()).spec()
    other = GSM8K(path, num_rows=6, seed=2)
    assert texts.spec()["texts"] != DatasetTexts(4, other, other.spec()).spec()["texts"]
