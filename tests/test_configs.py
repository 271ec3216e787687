"""The shipped configurations: every one loads, and says what its source says."""

from pathlib import Path

import pytest

from mis_jax.config import RunConfig, changed_fields, load_config
from mis_jax.model.family import FAMILY

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ALL = sorted(CONFIGS.rglob("*.yaml"))
MIRAGE = load_config(CONFIGS / "mirage_8b.yaml")
# What a variant for other hardware may change: where and how, not what is computed.
PLACEMENT = {
    "output", "mesh", "dtype", "train.micro_batch", "train.remat", "train.attention",
    "train.unroll", "train.loss_chunk", "data.max_length", "data.packing", "data.pack_tiles",
    "train.global_batch", "train.loss_group", "train.epoch_multiple", "optimizer.offload",
}  # fmt: skip
SAMPLE_TOKENS = 1112  # two tiles and 600 tokens of text, as most samples of MIS


def _name(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def test_every_configuration_loads_and_writes_into_a_folder_of_its_name() -> None:
    assert len(ALL) > 20
    for path in ALL:
        config = load_config(path)  # an error names the file
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path
        assert len(text.splitlines()) < 45, path
        folder = path.parent.name
        prefix = f"{folder}_" if folder == "internvl2_5" else ""
        assert config.output == Path("runs") / f"{prefix}{path.stem}", path


def test_every_model_can_be_planned_without_weights() -> None:
    models = {_name(p): load_config(p).model.name.lower() for p in ALL if p.stem != "mini"}
    assert {name: model for name, model in models.items() if model not in FAMILY} == {}


def test_mirage_as_the_paper_states_it() -> None:
    assert MIRAGE.optimizer.learning_rate == 5e-6
    assert MIRAGE.optimizer.warmup_ratio == 0.03
    assert MIRAGE.train.epochs == 2
    assert MIRAGE.train.freeze == ("vision",)
    mis, general = MIRAGE.data.sources
    assert (mis.kind, mis.count, general.count) == ("mis", None, 500)
    assert _official_batch(MIRAGE) == (4, 8, 4)


def _official_batch(config: RunConfig) -> tuple[int, int, int]:
    """Rows on a GPU, GPUs and accumulations of the official run, whose mean of losses is taken."""
    train = config.train
    assert train.loss_average == "micro" and train.epoch_multiple == train.micro_batch
    assert train.loss_group and train.epoch_multiple
    gpus = train.epoch_multiple // train.loss_group
    return train.loss_group, gpus, train.global_batch // train.epoch_multiple


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "freeze"),
    [
        ("textual_sft_8b", 2e-5, 2, ("vision", "projector")),
        ("vlguard_p_8b", 5e-6, 3, ("vision",)),
        ("vlguard_r_8b", 5e-6, 3, ("vision",)),
        ("mirage_8b_refusal_labels", 5e-6, 2, ("vision",)),
        ("mirage_8b_text_only", 5e-6, 2, ("vision",)),
        ("mirage_8b_without_general", 5e-6, 2, ("vision",)),
    ],
)
def test_controls_and_baselines_differ_as_the_paper_states_it(name, rate, epochs, freeze) -> None:
    config = load_config(CONFIGS / "paper" / f"{name}.yaml")
    assert config.optimizer.learning_rate == rate
    assert (config.train.epochs, config.train.freeze) == (epochs, freeze)
    stated = {
        "output", "data.sources", "train.epochs", "train.freeze", "optimizer.learning_rate"
    }  # fmt: skip
    assert set(changed_fields(MIRAGE, config)) <= stated


@pytest.mark.parametrize("path", sorted((CONFIGS / "hardware").iterdir()), ids=_name)
def test_a_hardware_variant_computes_the_same(path: Path) -> None:
    config = load_config(path)
    changed = {
        name for name in changed_fields(MIRAGE, config) if name.split(".")[0] not in PLACEMENT
    }
    assert changed <= PLACEMENT
    assert _samples(config) == pytest.approx(_samples(MIRAGE), rel=0.1)


def _samples(config: RunConfig) -> float:
    """Samples of an optimizer step, if packed rows are full."""
    a_row = config.data.max_length / SAMPLE_TOKENS if config.data.packing else 1
    return config.train.global_batch * a_row


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("size", "rate", "decay", "drop_path", "full", "lora"),
    [
        ("1b", 4e-5, 0.01, 0.1, (4, 8, 4), (4, 2, 2)),
        ("2b", 4e-5, 0.01, 0.1, (4, 8, 4), (4, 2, 2)),
        ("4b", 4e-5, 0.01, 0.1, (4, 8, 4), (4, 2, 2)),
        ("8b", 4e-5, 0.05, 0.1, (4, 8, 4), (4, 2, 2)),
        ("26b", 2e-5, 0.05, 0.4, (2, 8, 8), (2, 2, 4)),
        ("38b", 2e-5, 0.05, 0.4, (2, 16, 4), (2, 2, 4)),
        ("78b", 2e-5, 0.05, 0.4, (1, 32, 4), (1, 8, 2)),
    ],
)
def test_the_official_recipes(size, rate, decay, drop_path, full, lora, kind) -> None:
    config = load_config(CONFIGS / "internvl2_5" / f"{size}_{kind}.yaml")
    assert config.model.name.lower() == f"internvl2_5-{size}"
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (rate, decay)
    assert (config.train.epochs, config.data.max_tiles, config.data.max_length) == (1, 6, 8192)
    assert _official_batch(config) == (full if kind == "full" else lora)
    if kind == "full":
        assert (config.train.global_batch, config.train.freeze) == (128, ("vision",))
        assert (config.train.drop_path, config.lora.rank) == (drop_path, 0)
    else:
        assert (config.train.global_batch, config.train.drop_path) == (16, 0.0)
        assert config.train.freeze == ("vision", "projector")
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
        assert config.lora.targets == ("language",)


def test_mini_is_the_quickstarts_fine_tuning(tmp_path: Path) -> None:
    from mis_jax.quickstart import fine_tuning_config

    here = load_config(CONFIGS / "mini.yaml")
    there = fine_tuning_config(tmp_path, "train", tmp_path / "data" / "mini_train.json", 0)
    places = {"model", "output", "data.sources", "data.on_bad_sample"}
    assert set(changed_fields(there, here)) <= places
    assert [s.count for s in here.data.sources] == [s.count for s in there.data.sources]


@pytest.mark.parametrize("path", ALL, ids=_name)
def test_a_recipe_saves_at_least_five_times_whatever_its_steps(path: Path) -> None:
    assert load_config(path).train.save_every is None  # a fifth of the run
    assert load_config(path).train.save_minutes <= 15
