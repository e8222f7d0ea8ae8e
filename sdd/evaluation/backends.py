"""Who computes for lm-eval: a transformers model in this process (`hf`), or vLLM in it (`vllm`).

A server is the business of `server`. Each is a model class of lm-eval's with this project's chats before it among its
bases, so that the same tokens go to every backend.
"""

from functools import cache
from pathlib import Path
from typing import Any

from sdd.evaluation.chats import Chats, ChatsElsewhere
from sdd.evaluation.generation import FullBatches
from sdd.evaluation.likelihoods import SharedPrefixes
from sdd.models.control import is_masked
from sdd.models.panics import panics_told
from sdd.models.rendering import TEMPLATE_VALUES


@cache
def _hf() -> Any:
    from lm_eval.models.huggingface import HFLM

    class HFChats(Chats, SharedPrefixes, FullBatches, HFLM):
        """lm-eval's wrapper of a transformers model, with likelihoods and answers by this project's loops."""

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **named: Any,
        ) -> Any:
            if not is_masked(string):
                with panics_told():
                    return super().tok_encode(string, add_special_tokens, left_truncate_len, **named)
            ids = self.ids_of(string, add_special_tokens)
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> Any:
            if not any(map(is_masked, strings)):
                with panics_told():
                    return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
            rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
            side, self.tokenizer.padding_side = self.tokenizer.padding_side, padding_side
            batch = self.tokenizer.pad({"input_ids": rows}, padding="longest", return_tensors="pt")
            self.tokenizer.padding_side = side
            return batch["input_ids"], batch["attention_mask"]

        def tok_decode(self, *args: Any, **named: Any) -> Any:
            with panics_told("the tokenizer gives up on an answer"):
                return super().tok_decode(*args, **named)

    return HFChats


def in_process(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """A transformers model, open already."""
    return _hf()(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, chat_template_args=TEMPLATE_VALUES)


@cache
def _vllm() -> Any:
    from lm_eval.models.vllm_causallms import VLLM

    class VLLMChats(ChatsElsewhere, VLLM):
        """lm-eval's own vLLM model."""

    return VLLMChats


def vllm_settings(folder: Path, dtype: str) -> dict[str, Any]:
    """What lm-eval's vLLM model is opened with; vLLM batches by itself."""
    return {"pretrained": str(folder), "dtype": dtype, "batch_size": "auto", "trust_remote_code": False}


def by_vllm(folder: Path, tokenizer: Any, dtype: str) -> Any:
    """A stock checkpoint, opened by vLLM. Run here on a CPU alone (vLLM 0.32.0)."""
    language_model = _vllm()(**vllm_settings(folder, dtype))
    language_model.tokenizer = tokenizer
    return language_model
