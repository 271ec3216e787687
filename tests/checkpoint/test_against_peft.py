"""Adapters that peft opens and makes, on transformers' model and in upstream's own layout."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_lora_peft import (
    K,
    Q,
    V,
    assert_same_adapter,
    kernels,
    random_adapter,
    random_pair,
    with_shared_a,
)
from tiny_models import random_batch, random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import convert, write_checkpoint
from mis_jax.checkpoint.load import Checkpoint, open_checkpoint, read_checkpoint
from mis_jax.checkpoint.parameter_source import ArrayParameterSource
from mis_jax.checkpoint.peft.files import official_settings, read_adapter, write_adapter
from mis_jax.checkpoint.peft.mapping import (
    Adapter,
    Merged,
    adapter_from_tensors,
    factor_problems,
    plain_key,
    value_problems,
)
from mis_jax.storage.json_files import Fields

if sys.version_info >= (3, 12):  # where the project does not install torch
    pytest.importorskip("peft")
import torch
from peft import LoraConfig, PeftModel, get_peft_model

sys.path.append(str(Path(__file__).parent.parent / "parity"))
import reference as ref
from transformers import InternVLForConditionalGeneration

TOLERANCE = 1e-4  # of logits
ULPS = 2e-6  # of float32 weights: two orders of summation
TEXT_TARGETS = {  # upstream's wrap_llm_lora
    "internlm2": [
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"
    ],
    "qwen2": [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
    ],
}  # fmt: skip
VISION_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]  # wrap_backbone_lora
RANK = 4
_DEPRECATED = ".*is_gradient_checkpointing"  # of transformers, which peft still asks for
pytestmark = pytest.mark.filterwarnings(f"ignore:{_DEPRECATED}:FutureWarning")


def merged(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    source = Merged(ArrayParameterSource(base.arrays), adapter)
    arrays = {name: source.read(name) for name in base.arrays}
    return Checkpoint(base.config, arrays, base.dtype, base.folder, base.source)


def assert_close(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=ULPS, atol=ULPS, err_msg=name)


def assert_all_changed(base: dict, got: dict, names) -> None:
    """These and no others."""
    changed = {name for name in base if np.any(np.asarray(base[name]) != np.asarray(got[name]))}
    assert changed == set(names)


# transformers' model


def opened(folder: Path) -> InternVLForConditionalGeneration:
    return InternVLForConditionalGeneration.from_pretrained(folder).eval()


def logits(model, batch) -> np.ndarray:
    rows = len(batch.input_ids)
    tiles = batch.tiles.reshape(rows, -1, *batch.tiles.shape[1:])
    valid = batch.tile_mask.reshape(rows, -1)
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(batch.input_ids).long(),
            attention_mask=torch.from_numpy((batch.segment_ids > 0).astype(np.int64)),
            pixel_values=ref.pixel_values([t[v] for t, v in zip(tiles, valid, strict=True)]),
        )
    return output.logits.numpy()[batch.segment_ids > 0]


@pytest.mark.parametrize("kind", ["internlm2", "qwen2", "qwen3"])
def test_peft_opens_our_adapter(kind, rng, tmp_path):
    """Over transformers' model, with the logits of the merged model; ranks and layers differ."""
    config = tiny_config(kind)
    base = random_checkpoint(config, rng, tmp_path / "start")
    # No larger than the weights they change, or rounding alone would come near the tolerance.
    adapter = random_adapter(rng, config, scale=0.5)
    shape = kernels(config)[Q][1:]
    pairs = [
        random_pair(rng, shape, rank=rank, scale=scale) for rank, scale in ((6, 1 / 3), (3, 1))
    ]
    adapter[Q] = (pairs[0], None, pairs[1])
    write_adapter(tmp_path / "a", adapter, config, "hf", base=str(tmp_path / "hf"))
    write_checkpoint(base, tmp_path / "hf", "hf")
    write_checkpoint(merged(base, adapter), tmp_path / "merged", "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of missing keys and of idle patterns
        warnings.filterwarnings("ignore", _DEPRECATED, FutureWarning)
        theirs = PeftModel.from_pretrained(opened(tmp_path / "hf"), str(tmp_path / "a"))
    result = theirs.load_adapter(str(tmp_path / "a"), "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "again" in key]
    adapted = [name for name, _ in theirs.named_modules() if name.endswith(".lora_A")]
    assert len(adapted) == 3 * 7 - 1 + 2 * 6 + 2
    batch = random_batch(rng)
    got = logits(theirs.eval(), batch)
    assert np.abs(got - logits(opened(tmp_path / "merged"), batch)).max() <= TOLERANCE
    assert np.abs(got - logits(opened(tmp_path / "hf"), batch)).max() > 0.1


@pytest.mark.parametrize(
    ("text", "tower", "settings"),
    [
        ("llama", "layer_norm", dict(r=4, lora_alpha=8, target_modules="all-linear")),
        (
            "qwen2",
            "rms_norm",
            dict(
                r=4,
                lora_alpha=6,
                target_modules=["q_proj", "v_proj", "fc1", "linear_2"],
                rank_pattern={"v_proj": 2, r"language_model.*q_proj": 8},
                alpha_pattern={"model.vision_tower.encoder.layer.0.attention.q_proj": 9},
            ),
        ),
        (
            "qwen3",
            "layer_norm",
            dict(
                r=4,
                lora_alpha=6,
                use_rslora=True,
                target_modules=["down_proj", "projection_layer", "fc2"],
                layers_to_transform=[0, 2],
            ),
        ),
    ],
)
def test_an_adapter_that_peft_trained(text, tower, settings, rng, tmp_path):
    """Merged, it gives the weights that peft merges."""
    model = ref.reference_model(ref.reference_config(text, tower), int(rng.integers(2**31)))
    base = read_checkpoint(ref.save(model, tmp_path / "hf"))
    theirs = get_peft_model(
        model, LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        ids = torch.from_numpy(rng.integers(3, 80, (2, 9)))
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a", base.config)
    got = merged(base, adapter)
    assert_all_changed(base.arrays, got.arrays, adapter)
    expected = read_checkpoint(ref.save(theirs.merge_and_unload(), tmp_path / "merged"))
    assert_close(got.arrays, expected.arrays)
    if settings["target_modules"] == "all-linear":
        assert adapter.keys() == kernels(base.config).keys()


@pytest.mark.parametrize(
    ("modules", "tied"),
    [
        (["embed_tokens"], False),
        (["lm_head"], False),
        (["embed_tokens", "lm_head"], False),
        (["embed_tokens"], True),
        (["embed_tokens", "lm_head"], True),
    ],
)
def test_an_embedding_or_a_head_that_was_trained_on_a_tied_model(modules, tied, rng, tmp_path):
    """PEFT trains copies: the model it leaves has a head of its own, unless it tied them again."""
    start = ref.reference_config("qwen2", "layer_norm", tied=True)
    model = ref.reference_model(start, int(rng.integers(2**31)))
    ref.save(model, tmp_path / "hf")
    settings = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
        modules_to_save=modules, ensure_weight_tying=tied,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied weights
        theirs = get_peft_model(model, settings)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    ids = torch.from_numpy(rng.integers(3, 80, (2, 9)))
    theirs(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs.save_pretrained(str(tmp_path / "a"))
    ours = open_checkpoint(tmp_path / "hf", tmp_path / "a")
    assert ours.config.text.tie_embeddings == tied
    convert(ours, tmp_path / "merged", "hf")
    models = opened(tmp_path / "merged"), theirs.eval(), opened(tmp_path / "hf")
    with torch.no_grad():
        got, expected, before = (model(input_ids=ids).logits for model in models)
    assert (got - expected).abs().max() <= TOLERANCE
    assert (got - before).abs().max() > 0.1


def with_projector(rng, adapter: Adapter, base: Checkpoint) -> dict:
    """The adapter of the language model, beside a projector that was trained itself."""
    result: dict = {name: pair for name, pair in adapter.items() if name.startswith("text.")}
    for name, value in base.arrays.items():
        if name.startswith("projector."):
            noise = 0.1 * rng.standard_normal(value.shape)
            result[name] = (value + noise).astype(np.float32)
    return result


def test_peft_opens_an_adapter_with_a_trained_projector(rng, tmp_path):
    config = tiny_config("qwen2")
    base = random_checkpoint(config, rng, tmp_path / "start")
    adapter = with_projector(rng, random_adapter(rng, config, scale=0.5), base)
    write_adapter(tmp_path / "a", adapter, config, "hf", base=str(tmp_path / "hf"))
    write_checkpoint(base, tmp_path / "hf", "hf")
    write_checkpoint(merged(base, adapter), tmp_path / "merged", "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", _DEPRECATED, FutureWarning)
        theirs = PeftModel.from_pretrained(opened(tmp_path / "hf"), str(tmp_path / "a"))
    batch = random_batch(rng)
    got = logits(theirs.eval(), batch)
    assert np.abs(got - logits(opened(tmp_path / "merged"), batch)).max() <= TOLERANCE
    # And we read what peft writes of it.
    theirs.save_pretrained(str(tmp_path / "again"))
    again = read_adapter(tmp_path / "again", config)
    assert again.keys() == adapter.keys()
    assert_close(merged(base, again).arrays, merged(base, adapter).arrays)


# Upstream's layout: modules of the same names, without their code


class Part(torch.nn.Module):
    """A module whose children are made from the names of tensors."""

    def insert(self, path: list[str], linears: set[str], full: str, value: torch.Tensor) -> None:
        name, *rest = path
        if not rest:
            self.register_parameter(name, torch.nn.Parameter(value))
            return
        here = full[: len(full) - len(".".join(rest)) - 1]
        if name not in self._modules:
            if here in linears:
                self.add_module(name, torch.nn.Linear(1, 1, bias=False))
            else:
                self.add_module(name, Part())
        child = self._modules[name]
        if isinstance(child, Part):
            child.insert(rest, linears, full, value)
            return
        child.register_parameter(rest[0], torch.nn.Parameter(value))
        child.out_features, child.in_features = child.weight.shape

    def prepare_inputs_for_generation(self, *_):
        """Peft asks for it where the task is CAUSAL_LM."""
        raise NotImplementedError


def upstream_model(tensors: dict[str, np.ndarray]) -> Part:
    linears = {
        key.removesuffix(".weight")
        for key, value in tensors.items()
        if key.endswith(".weight") and value.ndim == 2 and "embed" not in key
    }
    model = Part()
    for key, value in tensors.items():
        model.insert(key.split("."), linears, key, torch.tensor(np.asarray(value)))
    return model


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy() for key, value in model.state_dict().items()}


def upstream_tensors(checkpoint: Checkpoint, folder: Path) -> dict[str, np.ndarray]:
    write_checkpoint(checkpoint, folder, "internvl")
    return load_file(folder / "model.safetensors")


def lora(targets: list[str]) -> LoraConfig:
    """As upstream: alpha twice the rank. B is random instead of zero, as if trained."""
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, init_lora_weights=False)


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
def test_adapter_of_upstreams_language_model_alone(kind, rng, tmp_path):
    """`wqkv` fused, one A for three; keys without 'language_model.'."""
    base = random_checkpoint(tiny_config(kind), rng, tmp_path / "start")
    model = upstream_model(upstream_tensors(base, tmp_path / "internvl"))
    language = get_peft_model(model.language_model, lora(TEXT_TARGETS[kind]))
    language.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a", base.config)
    if kind == "internlm2":
        np.testing.assert_array_equal(adapter[Q].a, adapter[V].a)
    got = merged(base, adapter)
    assert_all_changed(base.arrays, got.arrays, [n for n in kernels(base.config) if "text" in n])
    model.language_model = language.merge_and_unload()
    assert_close(upstream_tensors(got, tmp_path / "merged"), tensors_of(model))


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
def test_adapter_of_upstreams_whole_model(kind, rng, tmp_path):
    base = random_checkpoint(tiny_config(kind, "rms_norm"), rng, tmp_path / "start")
    model = upstream_model(upstream_tensors(base, tmp_path / "internvl"))
    targets = [*TEXT_TARGETS[kind], *VISION_TARGETS, "mlp1.1", "mlp1.3"]
    wrapped = get_peft_model(model, lora(targets))
    wrapped.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a", base.config)
    assert adapter.keys() == kernels(base.config).keys()
    expected = tensors_of(wrapped.merge_and_unload())
    assert_close(upstream_tensors(merged(base, adapter), tmp_path / "merged"), expected)


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
@pytest.mark.parametrize("old_names", [False, True])
def test_checkpoint_that_upstream_saved_unmerged(kind, old_names, rng, tmp_path):
    """Every tensor is found under its plain key, and the sums are those of peft."""
    base = random_checkpoint(tiny_config(kind), rng, tmp_path / "start")
    plain = upstream_tensors(base, tmp_path / "internvl")
    model = upstream_model(plain)
    model.language_model = get_peft_model(model.language_model, lora(TEXT_TARGETS[kind]))
    model.vision_model = get_peft_model(model.vision_model, lora(VISION_TARGETS))
    saved = tensors_of(model)
    if old_names:
        saved = {key.replace(".base_layer.", "."): value for key, value in saved.items()}
    assert any("language_model.base_model.model.model.layers.0" in key for key in saved)
    weights, factors = {}, {}
    for key, value in saved.items():
        name, role = plain_key(key)
        if role == "weight":
            weights[name] = value
        else:
            factors[name, role] = value
    assert weights.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(weights[name], value)
    fields = Fields(tmp_path / "config.json", dict(use_llm_lora=RANK, use_backbone_lora=RANK))
    settings = official_settings(fields)
    shapes = {factor: value.shape for factor, value in factors.items()}
    assert not factor_problems(shapes, "internvl", base.config, settings)
    assert not value_problems(factors)
    adapter = adapter_from_tensors(factors, "internvl", base.config, settings)
    model.language_model = model.language_model.merge_and_unload()
    model.vision_model = model.vision_model.merge_and_unload()
    got = upstream_tensors(merged(base, adapter), tmp_path / "merged")
    assert_close(got, tensors_of(model))


@pytest.mark.parametrize("case", ["shared", "own", "q and v"])
@pytest.mark.parametrize("kind", ["internlm2", "qwen3"])
def test_peft_opens_our_adapter_over_upstreams_layout(kind, case, rng, tmp_path):
    """Parts of a fused map with their own factors go into one of a higher rank."""
    base = random_checkpoint(tiny_config(kind), rng, tmp_path / "start")
    adapter = random_adapter(rng, base.config)
    if case == "shared":
        adapter = with_shared_a(adapter)
    if case == "q and v":
        adapter = {name: adapter[name] for name in (Q, V)}
        assert K not in adapter
    write_adapter(tmp_path / "a", adapter, base.config, "internvl", base="org/base")
    model = upstream_model(upstream_tensors(base, tmp_path / "internvl"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = PeftModel.from_pretrained(model, str(tmp_path / "a"))
    got = tensors_of(theirs.merge_and_unload())
    assert_close(got, upstream_tensors(merged(base, adapter), tmp_path / "merged"))
    content = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    highest = max([content["r"], *content["rank_pattern"].values()])
    assert highest == {"shared": 3, "own": 9, "q and v": 6 if kind == "internlm2" else 3}[case]
    if case == "shared":
        assert_same_adapter(adapter, read_adapter(tmp_path / "a", base.config))
