"""Which answers were cut at the limit of generated tokens, counted anew from their texts.

Evaluations keep texts, not tokens. A checkpoint's own tokenizer counts them; a model may have written the same text in
other tokens, and an answer that ends by itself within `SLACK` tokens of the limit counts as cut.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from sdd.errors import UserError
from sdd.store.files import check_file

SLACK = 2
"""Tokens by which texts may come back shorter: a space at the start, half a character at the end."""
MOST_CHARACTERS = 64
"""Characters a token of which a text's beginning is counted."""


def cut_at(limit: int, folder: Path) -> Callable[[Sequence[str]], list[bool]] | None:
    """For each text whether it fills the limit, by the tokenizer of a checkpoint's folder; None without one."""
    from tokenizers import Tokenizer

    from sdd.models.panics import panics_told
    from sdd.models.tokenizers import check_tokenizer_files

    path = folder / "tokenizer.json"
    try:
        check_file(path, folder)
        check_tokenizer_files(folder, None)
        with panics_told("the tokenizer does not open"):
            tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        if isinstance(error, UserError | OSError) or type(error) is Exception:  # the library's own are plain ones
            return None
        raise
    tokenizer.no_truncation()
    tokenizer.no_padding()
    full = limit - SLACK

    def are_cut(texts: Sequence[str]) -> list[bool]:
        long = [number for number, text in enumerate(texts) if len(text.encode("utf-8", "replace")) >= full]
        begun = [texts[number][: MOST_CHARACTERS * limit] for number in long]
        with panics_told():
            counts = [len(code.ids) for code in tokenizer.encode_batch(begun, add_special_tokens=False)]
        cut = {number for number, count in zip(long, counts, strict=True) if count >= full}
        return [number in cut for number in range(len(texts))]

    return are_cut
