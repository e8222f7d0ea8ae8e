"""At how many positions training makes logits at once, and how many states are kept: facts that it shares with its
estimate; no library.

Logits at every target token of a pass would be most of its memory under a large vocabulary. Those of cross-entropy are
made together up to a limit. Beyond it, and where a teacher's are made beside them, they are made in chunks, and again
in the backward pass.
"""

MOST_LOGITS = 1 << 25
"""Logits that are there at once without a teacher's, 134 MB in float32."""
CHUNK_TOKENS = 256
"""Positions of a chunk: 131 MB a float32 tensor at a vocabulary of 128,256."""

KEPT_STATES = 8 << 30
"""Bytes of the states that one pass leaves for later ones: a million tokens of 2,048 float32 numbers."""


def is_cut(positions: float, vocabulary: int) -> bool:
    """Whether cross-entropy at so many positions is taken in chunks."""
    return positions * vocabulary > MOST_LOGITS
