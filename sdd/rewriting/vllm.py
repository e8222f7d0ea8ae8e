"""Generation by vLLM in this process, on one GPU; a model that wants several is served (`engine=openai`).

Prompts go to it as the token ids that every engine starts from, and its tokens are read as every engine's are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sdd.models.chats import stop_ids
from sdd.models.checkpoints import Checkpoint
from sdd.models.vllm import check_vllm
from sdd.rewriting.engines import HFEngine, Place, Request, seed_of


class VLLMEngine(HFEngine):
    """As `HFEngine`, but for who computes: `vllm.LLM` batches by itself, and draws by its own generator.

    Run here on a CPU alone (vLLM 0.32.0). Tests hold its calls to the package's signatures where that is installed.
    """

    kind = "vllm"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.context = self.max_prompt_tokens + self.max_new_tokens

    @property
    def longest_prompt(self) -> int:
        """It takes no prompt that leaves no room for a word of an answer."""
        return min(self.max_prompt_tokens, self.context - 1)

    def check(self, place: Place) -> None:
        check_vllm("engine=vllm", place.device, "engine=hf or openai")

    def open(self, checkpoint: Checkpoint, dtype: str, system_prompt: str | None, place: Place) -> None:
        from vllm import LLM  # type: ignore[import-not-found]

        context = checkpoint.config.get("max_position_embeddings")
        self.context = min(self.context, int(context)) if context else self.context
        self.llm = LLM(model=str(checkpoint.folder), **self.settings(dtype))
        self.tokenizer, self.system_prompt = checkpoint.tokenizer(), system_prompt
        self.ending_ids = checkpoint.ending_ids

    @property
    def stops(self) -> list[int]:
        return sorted({*stop_ids(self.tokenizer), *self.ending_ids})

    def settings(self, dtype: str) -> dict[str, Any]:
        """What the model is opened with, besides its folder."""
        return {
            "dtype": dtype,
            "seed": 0,
            "max_model_len": self.context,
            "trust_remote_code": False,
            "disable_log_stats": True,
        }

    def sampling(self, request: Request, stops: list[int]) -> dict[str, Any]:
        """The settings of `vllm.SamplingParams` for one request."""
        drawn: dict[str, Any] = {}
        if self.temperature > 0:
            drawn = {"top_p": self.top_p, "seed": seed_of(self.seed, request)}
        return {
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": list(stops),
            "detokenize": False,
            **drawn,
        }

    def _answers(
        self, requests: Sequence[Request], rows: Sequence[list[int]], stops: list[int]
    ) -> Iterator[tuple[int, list[int]]]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": row} for row in rows]
        how = [SamplingParams(**self.sampling(request, stops)) for request in requests]
        for index, output in enumerate(self.llm.generate(prompts, how, use_tqdm=False)):
            yield index, list(output.outputs[0].token_ids)
