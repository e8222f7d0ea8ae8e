"""How far a student has moved from the model that it was cut from, and how far its targets were from that model.

    similarity   cosine of the sentence embeddings of the student's answer and of the unpruned model's own to the same
                 prompt, in [-1, 1]: the measure of arXiv 2410.09982, after SDFT (arXiv 2402.13669)
    KL           KL(teacher || student) in nats per token, over the unpruned model's own greedy answers
    NLL          negative log-likelihood in nats per token of the unpruned model on answers to train on: low where the
                 answers are such as it would give itself

The embedder is a sentence-transformers model in a folder; nothing in it is run, and only stock modules are opened.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.forward.teacher_forcing import Row, per_token
from sdd.store import digest_of, remembered_digest
from sdd.untrusted import expanded

EMBEDDER_MODULES = ("Transformer", "Pooling", "Normalize")
"""What an embedder may be made of; its file of modules could name any class that is installed."""
EMBEDDER_FILES = ("*.json", "*.txt", "*.safetensors", "*/config.json")


def token_kl(teacher: Any, student: Any, rows: Sequence[Row], batch_size: int) -> list[list[float]]:
    """KL(teacher || student) at every token of every row's answer, in nats."""
    from sdd.forward.losses import forward_kl

    return per_token(lambda tokens, p, q: forward_kl(q, p), rows, batch_size, teacher, student)


def token_nll(
    model: Any, rows: Sequence[Row], batch_size: int, of_row: Callable[..., Any] = list, kept: Path | None = None
) -> list[Any]:
    """Negative log-likelihood of every token of every row's answer, in nats; or what `of_row` makes of a row's. In
    files named after `kept` they outlast a kill."""
    import torch

    def nll(tokens: Any, logits: Any) -> Any:
        return torch.nn.functional.cross_entropy(logits, tokens, reduction="none")

    return per_token(nll, rows, batch_size, model, of_row=of_row, kept=kept)


def cosine(x: Any, y: Any) -> Any:
    """Cosine of paired vectors: (B, D), (B, D) -> (B,) in [-1, 1], in float64; 0 where a vector is 0."""
    import torch

    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
    return torch.nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1.0, 1.0)


def histogram(values: Sequence[float], bins: int = 40) -> dict[str, list]:
    """Counts of values between -1 and 1 in equal bins; `edges` has one number more than `counts`."""
    bars = [0] * bins
    for value in values:
        bars[min(bins - 1, max(0, int((value + 1) / 2 * bins)))] += 1
    return {"edges": [2 * edge / bins - 1 for edge in range(bins + 1)], "counts": bars}


# ---- the embedder -----------------------------------------------------------------------------------------------


def embedder_folder(path: str, revision: str | None, fetch: bool = True) -> Path | None:
    """The folder of an embedder named by a folder or a hub id; None where it would have to be fetched and may not."""
    folder = expanded(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        options: dict[str, Any] = {"revision": revision, "allow_patterns": list(EMBEDDER_FILES)}
        try:
            folder = Path(snapshot_download(path, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            if not fetch:
                return None
            folder = _fetched(path, options)
        except ValueError:
            raise UserError(f"analysis.embedder={path}: no such folder") from None
    _check_embedder(folder, path)
    return folder


def _fetched(path: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, **options))
    except Exception as error:
        raise UserError(
            f"analysis.embedder={path}: neither a folder nor in the Hugging Face cache, and it cannot be fetched "
            f"({type(error).__name__}); name a folder, or set analysis.embedder=null to do without"
        ) from None


def _check_embedder(folder: Path, path: str) -> None:
    try:
        types = [str(module["type"]) for module in json.loads((folder / "modules.json").read_text())]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"analysis.embedder={path}: no valid modules.json; is this a sentence-transformers model?"
        ) from None
    for kind in types:
        if not (kind.startswith("sentence_transformers.") and kind.rsplit(".", 1)[-1] in EMBEDDER_MODULES):
            raise UserError(f"analysis.embedder={path}: made of {kind}, which is not opened here; choose another")
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"analysis.embedder={path}: no model.safetensors; pickled weights can run code")


def embedder_digest(folder: Path, memory: Path) -> str:
    """Digest of the files that decide an embedding."""
    files = sorted({file for pattern in EMBEDDER_FILES for file in folder.glob(pattern)})
    return digest_of({str(file.relative_to(folder)): remembered_digest(file, memory) for file in files})


def similarities(folder: Path, texts: Sequence[str], others: Sequence[str], device: str) -> list[float]:
    """Cosine of the embeddings of paired texts."""
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(
        str(folder),
        device=device,
        trust_remote_code=False,
        local_files_only=True,
        model_kwargs={"use_safetensors": True, "dtype": "float32"},
    )
    encode = partial(embedder.encode, convert_to_tensor=True, show_progress_bar=False)
    x, y = encode(list(texts)), encode(list(others))
    cosines: list[float] = cosine(x, y).tolist()
    return cosines
