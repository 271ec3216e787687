"""LoRA adapters on their own: names, arithmetic, folders there and back, what is refused."""

import dataclasses
import functools
import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import KINDS, tiny_config

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import read_parameters
from mis_jax.checkpoint.parameter_source import ArrayParameterSource
from mis_jax.checkpoint.peft.files import official_settings, read_adapter, write_adapter
from mis_jax.checkpoint.peft.mapping import (
    LoraPair,
    Merged,
    adapter_from_tensors,
    factor_problems,
    linear_modules,
    pair_at,
    plain_key,
)
from mis_jax.model.family import published
from mis_jax.storage.json_files import Fields

Q, K, V = (f"text.layers.block.attention.{part}.kernel" for part in "qkv")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@functools.cache
def kernels(config) -> dict[str, tuple[int, ...]]:
    """Shapes of every kernel that an adapter may change."""
    return {
        name: shape
        for name, shape in nnx_state.shapes(config).items()
        if name.endswith(".kernel") and name != "vision.patch_embed.kernel"
    }


def random_pair(rng, shape, *, rank=3, scale=2.0, dtype=np.float32) -> LoraPair:
    *layers, width, out = shape
    a, b = rng.standard_normal((*layers, width, rank)), rng.standard_normal((*layers, rank, out))
    return LoraPair((a * width**-0.5).astype(dtype), (b * rank**-0.5).astype(dtype), scale)


def random_adapter(rng, config, **settings) -> dict[str, LoraPair]:
    return {name: random_pair(rng, shape, **settings) for name, shape in kernels(config).items()}


def with_shared_a(adapter):
    """The same adapter with one `a` for q, k and v, as a fused map has it."""
    result = dict(adapter)
    for name in adapter:
        if name.endswith((".k.kernel", ".v.kernel")):
            a = adapter[f"{name[: -len('k.kernel')]}q.kernel"].a
            result[name] = dataclasses.replace(adapter[name], a=a)
    return result


def assert_same_adapter(x, y) -> None:
    assert x.keys() == y.keys()
    for name in x:
        pairs = [(x[name], y[name])]
        if isinstance(x[name], tuple):
            pairs = list(zip(x[name], y[name], strict=True))
        for p, q in pairs:
            if p is None or q is None:
                assert p is q, name
                continue
            assert p.scale == q.scale, name
            for left, right in ((p.a, q.a), (p.b, q.b)):
                assert left.dtype == right.dtype and left.shape == right.shape, name
                assert left.tobytes() == right.tobytes(), name


def delta(adapter, name, layer) -> np.ndarray:
    pair = pair_at(adapter, name, layer)
    return pair.scale * (pair.a.astype(np.float64) @ pair.b.astype(np.float64))


def edit_config(folder, **changes) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | changes))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


@pytest.fixture
def folder(rng, tmp_path):
    """A sound adapter of the qwen2 model, to be spoilt."""
    config = tiny_config("qwen2")
    write_adapter(tmp_path / "a", random_adapter(rng, config), config, "hf", base="org/base")
    return tmp_path / "a"


# Names


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "language_model.base_model.model.model.layers.3.attention.wqkv.base_layer.weight",
            ("language_model.model.layers.3.attention.wqkv.weight", "weight"),
        ),
        (  # peft before 0.6
            "language_model.base_model.model.model.layers.3.attention.wqkv.weight",
            ("language_model.model.layers.3.attention.wqkv.weight", "weight"),
        ),
        (
            "language_model.base_model.model.model.layers.3.attention.wqkv.lora_A.default.weight",
            ("language_model.model.layers.3.attention.wqkv", "lora_a"),
        ),
        (
            "language_model.base_model.model.output.weight",
            ("language_model.output.weight", "weight"),
        ),
        (
            "vision_model.base_model.model.encoder.layers.0.attn.qkv.base_layer.bias",
            ("vision_model.encoder.layers.0.attn.qkv.bias", "weight"),
        ),
        (
            "vision_model.base_model.model.encoder.layers.0.attn.qkv.lora_B.default.weight",
            ("vision_model.encoder.layers.0.attn.qkv", "lora_b"),
        ),
        (
            "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.weight",
            ("model.language_model.layers.0.mlp.up_proj", "lora_b"),
        ),
        ("mlp1.1.weight", ("mlp1.1.weight", "weight")),
        (
            "vision_tower.encoder.layer.0.lambda_1",
            ("vision_tower.encoder.layer.0.lambda_1", "weight"),
        ),
        ("a.lora_magnitude_vector", ("a.lora_magnitude_vector", "weight")),
    ],
)
def test_keys_without_the_wrappers_of_peft(key, expected):
    assert plain_key(key) == expected


def test_modules_of_a_published_size():
    """Five maps a layer of InternLM2, four of the tower, two of the projector."""
    modules = linear_modules("internvl", published("internvl2_5-8b"))
    assert len(modules) == 32 * 5 + 24 * 4 + 2
    assert modules["language_model.model.layers.31.attention.wqkv"].shape == (6144, 4096)
    assert modules["vision_model.encoder.layers.0.attn.qkv"].shape == (3072, 1024)


# Merging


def test_rows_of_a_merged_kernel_have_the_bits_of_the_whole(rng):
    """A device's shard is what a conversion writes, and what a device alone has."""
    base, pair = (
        rng.standard_normal((1, 900, 300)).astype(np.float32),
        random_pair(rng, (1, 900, 300)),
    )
    source = Merged(ArrayParameterSource({Q: base}), {Q: pair})
    whole = source.read(Q, 0)
    for rows in (slice(0, 225), slice(225, 450), slice(7, 8), slice(130, 900), slice(400, 400)):
        assert np.array_equal(source.read(Q, 0, rows), whole[rows]), rows


def test_merged_sums_in_float32_and_leaves_rounding_to_the_writer(rng):
    shape = (3, 8, 5)
    base = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    pair = random_pair(rng, shape, dtype=ml_dtypes.bfloat16, scale=0.3)
    source = Merged(ArrayParameterSource({Q: base}), {Q: pair})
    exact = base.astype(np.float64) + [delta({Q: pair}, Q, layer) for layer in range(3)]
    assert source.read(Q).dtype == np.float32
    wide = Merged(ArrayParameterSource({Q: base.astype(np.float32)}), {Q: pair})
    np.testing.assert_allclose(wide.read(Q), exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(source.read(Q), wide.read(Q))
    for layer in range(3):
        np.testing.assert_array_equal(source.read(Q, layer), source.read(Q)[layer])
        np.testing.assert_allclose(
            wide.read(Q, layer, slice(2, 7)), exact[layer, 2:7], rtol=1e-5, atol=1e-6
        )
    np.testing.assert_array_equal(source.read(Q, None, slice(1, 3)), source.read(Q)[1:3])
    assert source.read(Q, None, slice(3, 3)).shape == (0, 8, 5)


def test_what_is_not_adapted_passes_untouched():
    """To the last bit: -0 + 0 would be +0."""
    base = ArrayParameterSource(
        {Q: np.full((2, 4, 4), -0.0, np.float32), "text.norm.scale": -np.zeros(4)}
    )
    zero = LoraPair(np.zeros((4, 1), np.float32), np.zeros((1, 4), np.float32), 1.0)
    source = Merged(base, {Q: (None, zero)})
    assert np.signbit(source.read(Q, 0)).all() and np.signbit(source.read("text.norm.scale")).all()
    assert np.signbit(source.read(Q)[0]).all() and not np.signbit(source.read(Q)[1]).any()


def test_a_sum_beyond_float16_is_told():
    pair = LoraPair(np.full((4, 1), 300, np.float32), np.full((1, 4), 300, np.float32), 1.0)
    name = "projector.first.kernel"
    source = Merged(ArrayParameterSource({name: np.ones((4, 4), np.float16)}), {name: pair})
    with pytest.raises(ValueError, match=rf"{name}.*beyond float16.*bfloat16"):
        read_parameters(source, {name: (4, 4)}, "float16", 4)


# Folders


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("layout", ["hf", "internvl"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, layout, dtype, rng, tmp_path):
    config = tiny_config(kind)
    adapter = random_adapter(rng, config, dtype=dtype, scale=1 / 3)
    if layout == "internvl":
        adapter = with_shared_a(adapter)
    write_adapter(tmp_path / "a", adapter, config, layout, base="org/base")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS]
    assert_same_adapter(adapter, read_adapter(tmp_path / "a", config))
    content = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert content["r"] == 3 and content["lora_alpha"] == 1
    assert content["base_model_name_or_path"] == "org/base" and not content["rank_pattern"]
    with pytest.raises(ValueError, match="exists already"):
        write_adapter(tmp_path / "a", adapter, config, layout, base="org/base")


@pytest.mark.parametrize("kind", ["internlm2", "qwen3"])
def test_round_trip_of_some_layers_with_their_own_rank_and_scale(kind, rng, tmp_path):
    config = tiny_config(kind, "rms_norm")
    shapes = kernels(config)
    pair = random_pair(rng, shapes[Q][1:], rank=5, scale=0.7)
    adapter = {
        Q: (pair, None, random_pair(rng, shapes[Q][1:], rank=2, scale=11 / 2)),
        "text.layers.block.down.kernel": random_pair(rng, shapes["text.layers.block.down.kernel"]),
        "projector.second.kernel": random_pair(rng, shapes["projector.second.kernel"], rank=49,
                                               scale=1 / 49),
    }  # fmt: skip
    write_adapter(tmp_path / "a", adapter, config, "hf", base="org/base")
    assert_same_adapter(adapter, read_adapter(tmp_path / "a", config))


@pytest.mark.parametrize("case", ["own", "two alike", "without k", "scales"])
def test_parts_of_a_fused_map_with_factors_of_their_own(case, rng, tmp_path):
    """q, k and v go into one `wqkv` of a higher rank, which adds the same to each."""
    config = tiny_config("internlm2")
    adapter = {name: p for name, p in random_adapter(rng, config).items() if name in (Q, K, V)}
    rank = {"own": 9, "two alike": 6, "without k": 6, "scales": 9}[case]
    if case == "two alike":
        adapter[V] = dataclasses.replace(adapter[V], a=adapter[Q].a)
    if case == "without k":
        del adapter[K]
    if case == "scales":
        adapter[K] = dataclasses.replace(adapter[K], scale=0.37)
    write_adapter(tmp_path / "a", adapter, config, "internvl", base="org/base")
    back = read_adapter(tmp_path / "a", config)
    for layer in range(config.text.num_layers):
        for name in (Q, K, V):
            got, b = delta(back, name, layer), back[name].b
            assert back[name].rank == rank
            if name not in adapter:
                assert not got.any() and not b.any()
                continue
            tolerance = 1e-6 if case == "scales" else 1e-13  # b is rounded where scales differ
            expected = delta(adapter, name, layer)
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.language_model.", "language_model.model."),  # transformers before 4.52
        ("model.vision_tower.", "vision_tower."),
        ("lora_A.weight", "lora_A.default.weight"),
    ],
)
def test_other_names_of_the_same_modules(old, new, rng, tmp_path, folder):
    expected = read_adapter(folder, tiny_config("qwen2"))
    edit_tensors(folder, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})
    assert_same_adapter(expected, read_adapter(folder, tiny_config("qwen2")))


@pytest.mark.parametrize("layout", ["hf", "internvl"])
def test_round_trip_with_a_trained_projector(layout, rng, tmp_path):
    config = tiny_config("qwen2")
    projector = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in nnx_state.shapes(config).items()
        if name.startswith("projector.")
    }
    pair = random_pair(rng, kernels(config)[Q])
    write_adapter(tmp_path / "a", {Q: pair, **projector}, config, layout, base="b")
    back = dict(read_adapter(tmp_path / "a", config))
    assert_same_adapter({Q: pair}, {Q: back.pop(Q)})
    assert back.keys() == projector.keys()
    zeros = {name: np.zeros_like(value) for name, value in projector.items()}
    source = Merged(ArrayParameterSource(zeros), back)
    for name, value in projector.items():
        np.testing.assert_array_equal(source.read(name), value)
        np.testing.assert_array_equal(source.read(name, None, slice(1, 3)), value[1:3])

    def spoil(tensors):
        first = next(key for key in tensors if key.endswith("1.weight") and "lora" not in key)
        tensors[first] = tensors[first][:1]
        tensors[first.replace("1.weight", "1.gain")] = tensors[first]
        norm = next(key for key in tensors if key.endswith("bias"))
        tensors[norm][0] = np.nan

    edit_tensors(tmp_path / "a", spoil)
    with pytest.raises(ValueError, match="3 problems") as error:
        read_adapter(tmp_path / "a", config)
    for expected in ("no parameter of this model", "the model asks for (24, 64)", "holds NaN"):
        assert expected in str(error.value), expected


@pytest.mark.parametrize(
    ("kind", "layout", "part"),
    [
        ("qwen3", "internvl", "language_model."),
        ("internlm2", "internvl", "language_model."),
        ("internlm2", "internvl", "vision_model."),
        ("internlm2", "hf", "model.language_model."),
        ("qwen2", "hf", "model.vision_tower."),
    ],
)
def test_an_adapter_of_a_part_of_the_model(kind, layout, part, rng, tmp_path):
    """The part was wrapped alone, as upstream's scripts do."""
    config = tiny_config(kind)
    root = "text." if "language" in part else "vision."
    adapter = {k: p for k, p in random_adapter(rng, config).items() if k.startswith(root)}
    adapter = with_shared_a(adapter)
    write_adapter(tmp_path / "a", adapter, config, layout, base="org/base")
    edit_tensors(
        tmp_path / "a", lambda tensors: {k.replace(part, "", 1): v for k, v in tensors.items()}
    )
    assert_same_adapter(adapter, read_adapter(tmp_path / "a", config))


def test_patterns_and_rank_stabilised_scale(rng, tmp_path):
    """The first pattern that matches the end of a module's name counts, as in peft."""
    config = tiny_config("qwen2")
    adapter = {Q: random_pair(rng, (3, 24, 24), rank=4), K: random_pair(rng, (3, 24, 12), rank=2)}
    write_adapter(tmp_path / "a", adapter, config, "hf", base="org/base")
    edit_config(
        tmp_path / "a",
        r=4,
        lora_alpha=8,
        rank_pattern={"k_proj": 2, "self_attn.*": 4},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3, "nowhere": 99},
        use_rslora=True,
        init_lora_weights="gaussian",
        target_modules=["q_proj", "k_proj"],
        layers_to_transform=[0, 1, 2],
    )
    back = read_adapter(tmp_path / "a", config)
    assert [pair_at(back, Q, layer).scale for layer in range(3)] == [4, 1.5, 4]
    assert back[K].scale == 8 / 2**0.5


def test_an_interrupted_write_leaves_nothing(rng, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    config = tiny_config("qwen2")
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "a", random_adapter(rng, config), config, "hf", base="b")
    assert not list(tmp_path.iterdir())


# Refusals


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform"),
        ({"layers_to_transform": 1}, "layers_to_transform"),
        ({"r": None}, "r"),
        ({"r": 0}, "r"),
        ({"lora_alpha": "high"}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj"),
        ({"alpha_pattern": {"q_proj[": 1}}, "alpha_pattern.q_proj["),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"r": 10**30}, "r"),
        ({"lora_alpha": 10**40}, "lora_alpha"),
        ({"rank_pattern": {"(a+)+": 1}}, "rank_pattern.(a+)+"),
        ({"alpha_pattern": {r"(q)_proj\1": 1}}, r"alpha_pattern.(q)_proj\1"),
        ({"rank_pattern": dict.fromkeys(map(str, range(20_001)), 1)}, "rank_pattern"),
        ({"modules_to_save": 7}, "modules_to_save"),
        ({"modules_to_save": ["lm_head"] * 101}, "modules_to_save"),
    ],
)
def test_settings_that_are_refused(changes, field, folder):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=re.escape(f"field '{field}'")) as error:
        read_adapter(folder, tiny_config("qwen2"))
    assert str(error.value).startswith(str(folder / CONFIG)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": []},
        {"layers_to_transform": None},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": False},
        {"bias": None},
        {"use_dora": False, "fan_in_fan_out": False},
    ],
)
def test_settings_that_change_nothing(changes, folder):
    expected = read_adapter(folder, tiny_config("qwen2"))
    edit_config(folder, **changes)
    assert_same_adapter(expected, read_adapter(folder, tiny_config("qwen2")))


def test_every_tensor_that_does_not_fit_is_told(folder):
    layer = "base_model.model.model.language_model.layers"

    def spoil(tensors):
        del tensors[f"{layer}.0.mlp.up_proj.lora_A.weight"]
        del tensors[f"{layer}.1.mlp.up_proj.lora_B.weight"]
        tensors[f"{layer}.7.mlp.up_proj.lora_A.weight"] = np.zeros((3, 24), np.float32)
        tensors[f"{layer}.0.mlp.gate_proj.lora_A.weight"] = np.zeros((3, 25), np.float32)
        tensors[f"{layer}.1.mlp.gate_proj.lora_A.weight"] = np.zeros((5, 24), np.float32)
        tensors[f"{layer}.0.self_attn.q_proj.lora_B.weight"][0, 0] = np.nan
        tensors[f"{layer}.1.self_attn.q_proj.lora_B.weight"][0, 0] = -np.inf
        tensors[f"{layer}.0.self_attn.q_proj.lora_magnitude_vector"] = np.zeros(24, np.float32)
        tensors[f"{layer}.2.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 24), np.float64)
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 24), np.float32)
        tensors["base_model.model.language_model.model.layers.0.mlp.down_proj.lora_A.weight"] = (
            np.zeros((3, 40), np.float32)
        )

    edit_tensors(folder, spoil)
    with pytest.raises(ValueError, match="12 problems") as error:
        read_adapter(folder, tiny_config("qwen2"))
    text = str(error.value)
    assert text.startswith(str(folder / WEIGHTS))
    for expected in (
        "missing tensor 'language_model.layers.0.mlp.up_proj.lora_A.weight' (3, 24)",
        "missing tensor 'language_model.layers.1.mlp.up_proj.lora_B.weight' (40, 3)",
        "'model.language_model.layers.7.mlp.up_proj'",
        "'language_model.layers.0.mlp.gate_proj.lora_A.weight' has shape (3, 25)",
        "'language_model.layers.1.mlp.gate_proj.lora_A.weight' has shape (5, 24)",
        "'language_model.layers.0.self_attn.q_proj.lora_B.weight' holds NaN",
        "'language_model.layers.1.self_attn.q_proj.lora_B.weight' holds NaN",
        "q_proj.lora_magnitude_vector' is neither",
        "has dtype F64",
        "missing tensor 'language_model.layers.2.self_attn.q_proj.lora_A.weight'",
        "'lm_head'",
        "down_proj.lora_A.weight' is there twice",
    ):
        assert expected in text, expected


def test_pickled_adapters_are_never_opened(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"pickled.*never opened.*safe_serialization=True"):
        read_adapter(folder, tiny_config("qwen2"))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: no such file; save the adapter"):
        read_adapter(folder, tiny_config("qwen2"))


def test_files_that_are_missing_or_broken(folder):
    config = tiny_config("qwen2")
    with pytest.raises(ValueError, match="no such folder"):
        read_adapter(folder / "deeper", config)
    save_file({"x": np.zeros(1, np.float32)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="no lora_A and lora_B in it"):
        read_adapter(folder, config)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_adapter(folder, config)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_adapter(folder, config)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=rf"{CONFIG}: no such file"):
        read_adapter(folder, config)


def test_an_adapter_of_another_model(rng, tmp_path):
    config = tiny_config("qwen2")
    write_adapter(tmp_path / "a", random_adapter(rng, config), config, "hf", base="b")
    with pytest.raises(ValueError, match="must be one of this model"):
        read_adapter(tmp_path / "a", tiny_config("qwen2", hidden_size=32, num_heads=4))


def test_settings_of_an_unmerged_checkpoint(tmp_path):
    path = tmp_path / "config.json"
    settings = official_settings(Fields(path, {"use_llm_lora": 16, "use_backbone_lora": 0}))
    assert settings("language_model.model.layers.0.attention.wo") == (16, 2.0)
    with pytest.raises(ValueError, match=r"config.json: field 'use_backbone_lora' is 0"):
        settings("vision_model.encoder.layers.0.attn.qkv")


def test_factors_beside_weights(rng):
    """What the shard reader does with an unmerged checkpoint: shapes first, then values."""
    config = tiny_config("internlm2")
    module = "language_model.model.layers.1.attention.wqkv"
    factors = {
        (module, "lora_a"): rng.standard_normal((4, 24)).astype(np.float32),
        (module, "lora_b"): rng.standard_normal((48, 4)).astype(np.float32),
    }
    shapes = {factor: values.shape for factor, values in factors.items()}
    assert not factor_problems(shapes, "internvl", config, lambda _: (4, 2.0))
    assert len(factor_problems(shapes, "internvl", config, lambda _: (8, 2.0))) == 2
    adapter = adapter_from_tensors(factors, "internvl", config, lambda _: (4, 2.0))
    assert adapter.keys() == {Q, K, V}
    fused = 2.0 * factors[module, "lora_b"] @ factors[module, "lora_a"]
    # two key/value heads of 6, each with two query heads: q q k v, q q k v
    rows = fused.reshape(2, 4, 6, 24)
    for name, part in ((Q, rows[:, :2]), (K, rows[:, 2:3]), (V, rows[:, 3:])):
        assert pair_at(adapter, name, 0) is None and pair_at(adapter, name, 2) is None
        np.testing.assert_allclose(delta(adapter, name, 1), part.reshape(-1, 24).T, atol=1e-5)
