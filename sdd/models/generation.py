"""What a checkpoint says of generation: where answers begin and end is obeyed, how they are chosen is not.

Penalties, beams, forced or suppressed tokens that a checkpoint ships would make "greedy" mean something else. Knows
nothing of files.
"""

from typing import Any

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What of a checkpoint's generation config is obeyed."""
OVERRULED = (
    *("do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache"),
    *("transformers_version", "_from_model_config", "trust_remote_code"),
)
"""What every call said itself before, or what steers nothing."""
STEERING = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p"), 1.0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "min_new_tokens", "exponential_decay_length_penalty")),
}
"""Settings of generation that old checkpoints keep in config.json, with the values at which they do nothing."""


def steers(config: dict[str, Any], generation: dict[str, Any]) -> bool:
    """Whether a `config.json` or a generation config has settings that would change greedy answers if obeyed."""
    shipped = {key: value for key, value in config.items() if key in STEERING} | generation
    neutral: tuple[Any, ...] = (None, False, [], {})
    return any(
        value not in neutral and value != STEERING.get(key)
        for key, value in shipped.items()
        if key not in (*ENDS, *OVERRULED)
    )


def plain_generation(shipped: Any) -> Any:
    """Where answers begin and end, as the checkpoint says it; how they are chosen is said by the config alone."""
    from transformers import GenerationConfig

    return GenerationConfig(**{key: getattr(shipped, key, None) for key in ENDS})
