"""Every published size against the parameter totals of its checkpoint; nothing is allocated."""

import pytest

from mis_jax.checkpoint import nnx_state
from mis_jax.model.family import FAMILY, published

VIT_300M, VIT_6B = 304_012_288, 5_536_496_000
# Totals printed from models built of the published config.json files.
TOTALS = {
    "internvl2_5-1b": 938_193_024,
    "internvl2_5-2b": 2_205_754_368,
    "internvl2_5-4b": 3_712_637_952,
    "internvl2_5-8b": 8_075_365_376,
    "internvl2_5-26b": 25_514_186_112,
    "internvl2_5-38b": 38_388_164_992,
    "internvl2_5-78b": 78_408_318_336,
    "internvl3-1b": 938_193_024,
    "internvl3-2b": 2_088_957_440,
    "internvl3-8b": 7_944_373_760,
    "internvl3-14b": 15_117_256_704,
    "internvl3-38b": 38_388_164_992,
    "internvl3-78b": 78_408_318_336,
    "internvl3_5-1b": 1_060_897_792,
}
# Where only rounded ones are published: language model and total, in thousand millions.
ROUNDED = {
    "internvl3-9b": (8.80, 9.14),
    "internvl3_5-1b": (0.752, 1.061),
    "internvl3_5-2b": (2.032, 2.348),
    "internvl3_5-4b": (4.411, 4.732),
    "internvl3_5-8b": (8.191, 8.528),
    "internvl3_5-14b": (14.768, 15.120),
    "internvl3_5-38b": (32.762, 38.390),
}
WITH_6B = {name for name in FAMILY if name.endswith(("-26b", "-38b", "-78b"))}


def test_every_member_has_a_total():
    assert set(TOTALS) | set(ROUNDED) == set(FAMILY)


@pytest.mark.parametrize("name", TOTALS)
def test_exact_total(name):
    assert sum(nnx_state.count(FAMILY[name]).values()) == TOTALS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_total(name):
    counts = nnx_state.count(FAMILY[name])
    text, total = ROUNDED[name]
    digits = 3 if name.startswith("internvl3_5") else 2
    assert round(counts["text"] / 1e9, digits) == pytest.approx(text)
    assert round(sum(counts.values()) / 1e9, digits) == pytest.approx(total)


@pytest.mark.parametrize("name", FAMILY)
def test_tower_and_image_settings(name):
    config = FAMILY[name]
    assert nnx_state.count(config)["vision"] == (VIT_6B if name in WITH_6B else VIT_300M)
    assert config.tokens_per_tile == 256
    assert config.image_token_id < config.text.vocab_size
    assert not config.text.tie_embeddings


def test_projector_of_the_8b():
    assert nnx_state.count(published("internvl2_5-8b"))["projector"] == 33_570_816


def test_unknown_name_tells_the_known_ones():
    assert published("InternVL2_5-8B") is FAMILY["internvl2_5-8b"]
    with pytest.raises(ValueError, match=r"'internvl9-1b' is not known.*internvl3_5-38b"):
        published("internvl9-1b")
