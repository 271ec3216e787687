"""FLOPs by formula against figures that were worked out by hand for InternVL2.5-8B."""

import pytest

from mis_jax import flops
from mis_jax.checkpoint import nnx_state
from mis_jax.model.family import published

MODEL = published("internvl2_5-8b")
TERA = 1e12
# tokens, tiles; forward of the language model and of the tower; a step in which all is trained, all
# but the tower, and adapters on the language model alone. The last counts the projector twice,
# which `training` does not: nothing before the adapters needs a gradient.
SAMPLES = [
    (1112, 2, 16.7, 1.45, 54.5, 51.6, 34.9),
    (2136, 6, 32.6, 4.34, 111.2, 102.5, 69.8),
    (4184, 14, 66.2, 10.13, 229.6, 209.3, 142.9),
    (7256, 26, 120.6, 18.8, 419.5, 381.9, 260.9),
]


def _forward(tokens: int, tiles: int, **options) -> flops.Work:
    return flops.forward(MODEL, tokens=tokens, tiles=tiles, squares=tokens**2, **options)


def test_the_parts_of_a_forward_pass() -> None:
    work = flops.forward(MODEL, tokens=1, tiles=1, squares=0)
    assert (work.decoder + work.head) / 1e9 == pytest.approx(14.717, abs=5e-4)
    assert work.decoder / 1e9 == pytest.approx(13.959, abs=5e-4)
    assert work.vision / 1e9 == pytest.approx(723.6, abs=0.05)
    assert work.projector / 1e9 == pytest.approx(17.2, abs=0.05)


@pytest.mark.parametrize(("tokens", "tiles", "text", "tower", "full", "frozen", "lora"), SAMPLES)
def test_the_table_of_samples(tokens, tiles, text, tower, full, frozen, lora) -> None:
    work = _forward(tokens, tiles)
    assert work.language / TERA == pytest.approx(text, abs=0.05)
    assert work.vision / TERA == pytest.approx(tower, abs=0.02)
    assert flops.training(work) / TERA == pytest.approx(full, abs=0.06)
    assert flops.training(work, ["vision"]) / TERA == pytest.approx(frozen, abs=0.06)
    adapters = flops.training(work, ["vision"], lora_on=["language"])
    assert (adapters + work.projector) / TERA == pytest.approx(lora, abs=0.06)


def test_the_share_of_causal_attention() -> None:
    for tokens, share in ((1112, 1.9), (4184, 6.9), (7256, 11.4)):
        work = _forward(tokens, 0)
        assert 100 * work.attention / work.language == pytest.approx(share, abs=0.06)
        assert _forward(tokens, 0, causal=False).attention == 2 * work.attention


def test_packed_samples_do_not_look_at_each_other() -> None:
    one = _forward(512, 0)
    packed = flops.forward(MODEL, tokens=4 * 512, tiles=0, squares=4 * 512**2)
    assert packed.total == pytest.approx(4 * one.total)
    assert packed.total < _forward(4 * 512, 0).total


def test_logits_of_some_tokens_alone() -> None:
    some = _forward(1000, 0, head_tokens=10)
    assert some.head == _forward(10, 0).head
    assert some.decoder == _forward(1000, 0).decoder


@pytest.mark.parametrize(
    ("freeze", "lora", "factors"),
    [
        ([], [], (3, 3, 3)),
        (["vision"], [], (1, 3, 3)),
        (["vision", "projector"], [], (1, 1, 3)),
        (["projector", "language"], [], (3, 2, 2)),  # gradients pass through to the tower
        (["vision", "language"], [], (1, 3, 2)),
        (["vision"], ["language"], (1, 1, 2)),
        ([], ["vision", "language"], (2, 2, 2)),
    ],
)
def test_what_a_part_costs_in_training(freeze, lora, factors) -> None:
    work = _forward(1000, 4)
    expected = sum(
        factor * part
        for factor, part in zip(factors, (work.vision, work.projector, work.language), strict=True)
    )
    assert flops.training(work, freeze, lora_on=lora) == pytest.approx(expected)


@pytest.mark.parametrize(
    "name", ["internvl2_5-1b", "internvl2_5-26b", "internvl3-9b", "internvl3_5-4b"]
)
def test_the_linear_maps_are_the_parameters(name: str) -> None:
    config = published(name)
    count = nnx_state.count(config)
    work = flops.forward(config, tokens=1, tiles=1, squares=0)
    embedding = config.text.vocab_size * config.text.hidden_size
    assert work.language == pytest.approx(2 * (count["text"] - embedding), rel=1e-3)
    vectors = 2 * config.projector_input_size + 2 * config.text.hidden_size  # norm and biases
    assert work.projector == 2 * config.tokens_per_tile * (count["projector"] - vectors)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_chips_by_the_name_that_jax_gives(kind: str, name: str) -> None:
    assert flops.chip_of(kind) is flops.CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100"])
def test_other_chips_have_no_peak(kind: str) -> None:
    assert flops.chip_of(kind) is None
