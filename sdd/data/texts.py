"""Running text that a metric is measured on: local files, corpora on the hub, and the fine-tuning rows themselves."""

import random
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

from sdd.config.parts import id_of
from sdd.data import Example, own_settings
from sdd.data.files import data_files, read_rows, text_of
from sdd.data.hub import Repository, fetched_rows, streamed_rows
from sdd.errors import UserError
from sdd.models.chats import task_text
from sdd.store import digest_of
from sdd.untrusted import expanded


class LocalTexts:
    """The field `text` of the first `num_texts` rows of a JSONL, JSONL.gz or Parquet file."""

    def __init__(self, num_texts: int, path: str | None = None) -> None:
        if path is None:
            raise UserError("calibration.path is not set; name a JSONL or Parquet file whose rows have `text`")
        self.path, self.num_texts = expanded(path), num_texts

    def texts(self) -> list[str]:
        files = data_files(self.path, "calibration.path")
        rows = islice(read_rows(files, "calibration.path", ["text"]), self.num_texts)
        texts = [text_of(row, "text", place) for place, row in rows]
        if not texts:
            raise UserError(f"calibration.path={self.path} is empty; it needs rows with the field 'text'")
        return texts

    def spec(self) -> dict[str, Any]:
        """What recipes say of these texts."""
        return {"texts": digest_of(self.texts())}


class CorpusTexts:
    """`num_texts` documents of a corpus, from a local file or the hub: the first ones, or a sample drawn by `seed`.

    A document of fewer than two words is passed over: it has no two tokens to speak of, and is nobody's mistake.
    """

    columns: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(
        self,
        num_texts: int,
        path: str | None = None,
        hub: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if path is None and not hub:
            raise UserError("calibration.path is not set; name a JSONL or Parquet file whose rows have `text`")
        self.num_texts, self.seed = num_texts, seed
        self.path = None if path is None else expanded(path)
        self.repository = Repository.of(hub, "calibration") if path is None and hub else None

    def documents(self, rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[str]:
        """The corpus's documents, in its order."""
        for place, row in rows:
            if not (isinstance(text := row.get("text"), str) and not text.strip()):
                yield text_of(row, "text", place)

    def texts(self) -> list[str]:
        if self.repository is None:
            assert self.path is not None
            rows = read_rows(data_files(self.path, "calibration.path"), "calibration.path", self.columns)
        elif self.repository.stream:
            rows = iter(streamed_rows(self.repository, "calibration", 2 * self.num_texts, self.seed))
        else:
            rows = iter(fetched_rows(self.repository, "calibration", self.columns))
        documents = (text for text in self.documents(rows) if len(text.split()) > 1)
        if self.seed is None or (self.repository is not None and self.repository.stream):
            texts = list(islice(documents, self.num_texts))
        else:
            texts = list(documents)
            random.Random(self.seed).shuffle(texts)
            del texts[self.num_texts :]
        if not texts:
            name = self.path or (self.repository and self.repository.repository)
            raise UserError(f"calibration: {name} has no text of two words or more")
        return texts

    def spec(self) -> dict[str, Any]:
        """What recipes say of these texts: their digest, or without asking the hub, where and how they are drawn."""
        if self.repository is None:
            return {"texts": digest_of(self.texts())}
        source = {
            "_target_": id_of(self),
            "hub": self.repository.spec(),
            "num_texts": self.num_texts,
            "seed": self.seed,
            **own_settings(self, CorpusTexts),
        }
        return {"texts": digest_of(source), "source": source}


_TITLE = re.compile(r" = (?!=).*(?<!=) = \n?")


class WikiText2(CorpusTexts):
    """Articles of WikiText-2 (arXiv 1609.07843), from rows of whole pages (`page`) or of single lines (`text`).

    A third of the published lines are empty and others are headings, so that lines are no texts: they are put together
    again into the articles that they were cut from.
    """

    columns = ()

    def documents(self, rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[str]:
        lines: list[str] = []
        blank = True
        for place, row in rows:
            if "page" in row:
                yield text_of(row, "page", place)
                continue
            line = row.get("text")
            if not isinstance(line, str):
                raise UserError(f"{place} has no field 'text' or 'page'")
            if blank and _TITLE.fullmatch(line):
                if any(map(str.strip, lines)):
                    yield "".join(lines)
                lines = []
            blank = not line.strip()
            lines.append(" \n" if blank else line)
        if any(map(str.strip, lines)):
            yield "".join(lines)


class DatasetTexts:
    """Fine-tuning rows as running text, the task and below it its reference answer: the first `num_texts` of them."""

    def __init__(self, num_texts: int, dataset: Any, dataset_spec: dict[str, Any]) -> None:
        self.num_texts, self.dataset, self.dataset_spec = num_texts, dataset, dataset_spec

    def texts(self) -> list[str]:
        return [conversation(example) for example in self.dataset.examples()[: self.num_texts]]

    def spec(self) -> dict[str, Any]:
        return {"texts": digest_of([self.dataset_spec, self.num_texts]), "dataset": self.dataset_spec}


def conversation(example: Example) -> str:
    return f"{task_text(example.prompt, example.before)}\n\n{example.reference}"
