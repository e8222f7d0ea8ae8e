"""Which GPUs work fits in, on formulas made for it."""

from sdd.planning.estimates import Estimate
from sdd.planning.fits import fits


def work(settings: dict[str, int | bool]) -> Estimate:
    """10 GB, and 1 GB for 64 tokens of a pass, a quarter of it where activations are made again in half of the time."""
    tokens, again = settings.get("tokens", 4096), settings.get("again", False)
    length = settings.get("length", 1024)
    held = max(tokens, length) / 64 / (4 if again else 1)
    return Estimate(100 * (1.5 if again else 1) + 4096 / tokens, (10 + held) * 1e9)


def test_what_fits_is_left_as_it_is_and_else_the_fastest_settings_are_taken() -> None:
    """74 GB; 42 at half of the tokens; never under 26 by tokens alone, for the longest row has 1,024; 26 where all is
    made again, and 18 at half of the tokens."""
    found = fits(work({}), work, {"tokens": 4096, "again": False}, {})
    assert found == {24: {"tokens": 2048, "again": True}, 48: {"tokens": 2048}, 80: {}}


def test_length_is_the_last_resort() -> None:
    def long(settings: dict[str, int | bool]) -> Estimate:
        return work({"tokens": 512, "length": 4096} | settings)

    less, last = {"tokens": 512}, {"length": 4096}
    assert fits(long({}), long, less, {})[24] is None
    assert fits(long({}), long, less, last)[24] == {"length": 512}


def test_what_nothing_helps_is_said() -> None:
    found = fits(Estimate(1, 90e9), lambda settings: Estimate(1, 90e9), {"tokens": 8, "again": True}, {})
    assert found == {24: None, 48: None, 80: None}
