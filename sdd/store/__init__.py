"""The recipe store: addresses, locks, atomic publication, manifests. See `recipe.py` and `store.py`."""

from sdd.store.digests import file_digest, remembered_digest, write_atomically
from sdd.store.recipe import Recipe, canonical, digest_of
from sdd.store.stages import ANALYSES, STAGES, Stage
from sdd.store.store import SCRATCH, TIMINGS, Builder, Store, read_manifest, share

__all__ = [
    "ANALYSES",
    "SCRATCH",
    "STAGES",
    "TIMINGS",
    "Builder",
    "Recipe",
    "Stage",
    "Store",
    "canonical",
    "digest_of",
    "file_digest",
    "read_manifest",
    "remembered_digest",
    "share",
    "write_atomically",
]
