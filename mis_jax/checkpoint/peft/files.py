"""LoRA adapters in PEFT's format on disk, both ways, and the settings that go with them.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Sources: peft
`tuners/lora/config.py`, `utils/save_and_load.py`, `utils/other.py` (patterns).
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.dtype_cast import NUMPY_DTYPES, all_finite
from mis_jax.checkpoint.mapping import Layout, normal_key, rules
from mis_jax.checkpoint.peft.mapping import (
    Adapter,
    Factor,
    LinearModule,
    LoraPair,
    Settings,
    adapter_from_tensors,
    factor_problems,
    find_modules,
    linear_modules,
    pair_at,
    plain_key,
    value_problems,
)
from mis_jax.checkpoint.peft.patterns import name_pattern
from mis_jax.checkpoint.safetensors_reader import TensorFile, misfit
from mis_jax.model.config import InternVLConfig
from mis_jax.storage.files import write_text
from mis_jax.storage.folders import finished_folder
from mis_jax.storage.json_files import Fields, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = CONFIG, WEIGHTS
#: Ranks in the config.json of a model that upstream's scripts saved with its factors beside it.
LORA_FIELDS = "use_llm_lora", "use_backbone_lora"
_MOST_PATTERNS = 20_000  # one for each linear map of 1000 layers of both towers
_MOST_SAVED = 100
_PICKLED = "adapter_model.bin"
_MERGE = "merge it with peft (merge_and_unload, save_pretrained) and convert the merged model"
# Set, each of these makes the adapted model another one than W + scale * B @ A.
_REFUSED = (
    "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora",
    "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# These take something out of the base weights when the adapter is made, and again when it is loaded
_INIT_REFUSED = ("pissa", "corda", "olora", "loftq", "lora_ga")
_LAYERED = re.compile(r"(.+\.layers?)\.(\d+)\.(.+)")
_IN_MEMORY = {"hf": "model.", "internvl": ""}  # before the plain name, in the model that is wrapped
_PROJECTOR = {"hf": "multi_modal_projector", "internvl": "mlp1"}


def read_adapter(folder: Path, config: InternVLConfig) -> Adapter:
    """The adapter of a PEFT folder, for either layout of the model, in the dtype of the file.

    Parameters that were trained beside it (`modules_to_save`) come as arrays, of a tied model the
    embedding and the head each by itself. Raises ValueError: a
    file that is missing or broken, a setting that is no plain LoRA, or tensors that do not fit the
    model, all of them in one error.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder that holds {CONFIG}")
    if not (folder / CONFIG).exists():
        final = folder / "final"  # of a run, whose folder is soon given in its place
        where = f": {final}" if (final / CONFIG).exists() else ""
        raise ValueError(f"{folder / CONFIG}: no such file; give the folder of an adapter{where}")
    fields = Fields(folder / CONFIG, read_json(folder / CONFIG))
    of_name = _settings(fields)
    file = _open(folder)
    keys = {key: plain_key(key) for key in file.entries}
    names = dict.fromkeys(name for name, role in keys.values() if role != "weight")
    if not names:
        raise ValueError(f"{file.path}: no lora_A and lora_B in it; save the adapter again")
    layout, modules = find_modules(names, config)
    # What the model has not is told by the name that the file has for it.
    plain = {name: module or name for name, module in modules.items()}
    wrapped = {module: name for name, module in plain.items()}

    def settings(module: str) -> tuple[int, float]:
        return of_name(wrapped[module])

    found: list[str] = []
    tensors: dict[Factor, np.ndarray] = {}
    trained = _trained_keys(fields, [name for name, role in keys.values() if role == "weight"])
    saved: dict[str, np.ndarray] = {}
    for key, (name, role) in keys.items():
        entry = file.entries[key]
        if role == "weight" and name not in trained:
            found.append(f"tensor '{key}' is neither lora_A nor lora_B of a module")
        elif entry.dtype not in NUMPY_DTYPES:
            found.append(f"tensor '{key}' has dtype {entry.dtype}; supported: F32, BF16, F16")
        elif role == "weight":
            saved[name] = file.tensor(key).copy()
        elif (plain[name], role) in tensors:
            found.append(f"tensor '{key}' is there twice, under different names")
        else:
            tensors[plain[name], role] = file.tensor(key).copy()  # the file may be written again
    shapes = {factor: values.shape for factor, values in tensors.items()}
    found += factor_problems(shapes, layout, config, settings) + value_problems(tensors)
    own = _own_parameters(saved, config.untied, found)
    if "text.embedding" in own and fields.flag("ensure_weight_tying", False):
        own["text.head"] = own["text.embedding"]
    if found:
        raise misfit(file.path, found, "the adapter must be one of this model, saved by peft")
    _check_layers(fields, [linear_modules(layout, config)[module].layer for module in wrapped])
    return {**adapter_from_tensors(tensors, layout, config, settings), **own}


def _trained_keys(fields: Fields, names: Sequence[str]) -> set[str]:
    """Those of the plain keys that belong to a module of `modules_to_save`, of which each has one.

    Raises ValueError: the file lacks a module.
    """
    modules = fields.get("modules_to_save", [])
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        fields.refuse("modules_to_save", "a list of names of modules")
    if len(modules) > _MOST_SAVED:
        fields.refuse("modules_to_save", f"at most {_MOST_SAVED} modules")
    if fields.flag("ensure_weight_tying", False):  # peft saves the head, too, and does not list it
        modules = [*modules, *(n.removesuffix(".weight") for n in names if "lm_head" in n)]
    of = {module: [n for n in names if f".{module}." in f".{n}"] for module in modules}
    if not all(of.values()):
        fields.refuse("modules_to_save", f"modules whose tensors are in {WEIGHTS}")
    return {name for found in of.values() for name in found}


def _own_parameters(
    saved: Mapping[str, np.ndarray], config: InternVLConfig, found: list[str]
) -> dict[str, np.ndarray]:
    """Tensors of `modules_to_save` as our parameters; what does not fit is added to `found`.

    They tell their layout by themselves: the modules of a language model may be those of both.
    """
    layouts: tuple[Layout, ...] = "internvl", "hf"
    shapes = nnx_state.shapes(config)
    known = {
        (layout, rule.theirs): rule
        for layout in layouts
        for rule in rules(layout, config)
        if not rule.per_layer
    }
    result: dict[str, np.ndarray] = {}
    for name, values in saved.items():
        keys = [(layout, normal_key(layout, name)) for layout in layouts]
        rule = next((known[key] for key in keys if key in known), None)
        if rule is None:
            found.append(f"tensor '{name}' is trained, which is no parameter of this model")
            continue
        wanted = tuple(rule.codec.their_shape([shapes[our] for our in rule.ours], config))
        if values.shape != wanted:
            found.append(f"tensor '{name}' has shape {values.shape}, the model asks for {wanted}")
        elif not all_finite(values):
            found.append(f"tensor '{name}' holds NaN or infinite values")
        else:
            result |= zip(rule.ours, rule.codec.to_ours(values, config), strict=True)
    return result


def _open(folder: Path) -> TensorFile:
    if (folder / WEIGHTS).is_file():
        return TensorFile(folder / WEIGHTS)
    found = f", only the pickled {_PICKLED}, which is never opened" if _has_pickle(folder) else ""
    raise ValueError(
        f"{folder / WEIGHTS}: no such file{found}; save the adapter with peft's "
        "save_pretrained(DIR, safe_serialization=True)"
    )


def _has_pickle(folder: Path) -> bool:
    return (folder / _PICKLED).exists()


def _settings(fields: Fields) -> Settings:
    """Rank and scale by the module's name in the model that was wrapped."""
    fields.one_of("peft_type", ("LORA",))
    fields.one_of("bias", ("none",), "none")
    for name in _REFUSED:
        if fields.values.get(name):
            fields.refuse(name, f"left out, null or false; {_MERGE}")
    init = fields.get("init_lora_weights", True)
    if str(init).lower().startswith(_INIT_REFUSED):
        fields.refuse("init_lora_weights", f"those that leave the base weights alone; {_MERGE}")
    rank, alpha = fields.count("r"), fields.number("lora_alpha")
    ranks = fields.section("rank_pattern", {})
    alphas = fields.section("alpha_pattern", {})
    for patterns in (ranks, alphas):
        if len(patterns.values) > _MOST_PATTERNS:
            raise ValueError(
                f"{fields.path}: field '{patterns.prefix[:-1]}' has {len(patterns.values)} "
                f"patterns; give at most {_MOST_PATTERNS}"
            )
    rank_of = [(_pattern(ranks, key), ranks.count(key)) for key in ranks.values]
    alpha_of = [(_pattern(alphas, key), alphas.number(key)) for key in alphas.values]
    rank_stabilised = fields.flag("use_rslora", False)

    @functools.cache
    def settings(name: str) -> tuple[int, float]:
        r = next((value for matches, value in rank_of if matches(name)), rank)
        top = next((value for matches, value in alpha_of if matches(name)), alpha)
        return r, top / (math.sqrt(r) if rank_stabilised else r)

    return settings


def _pattern(fields: Fields, key: str) -> Callable[[str], bool]:
    """A key of `rank_pattern` or `alpha_pattern`."""
    try:
        return name_pattern(key)
    except ValueError as error:
        raise ValueError(
            f"{fields.path}: field '{fields.prefix}{key:.100}' is no pattern of names that is "
            f"understood ({error}); write the names of the modules, with .* or (a|b)"
        ) from None


def _check_layers(fields: Fields, layers: Iterable[int | None]) -> None:
    listed = fields.get("layers_to_transform", None)
    if listed is None or listed == []:
        return
    allowed = listed if isinstance(listed, list) else [listed]
    other = [layer for layer in layers if layer not in allowed]
    if other:
        fields.refuse(
            "layers_to_transform", f"every layer that {WEIGHTS} adapts, {other[0]} among them"
        )


def official_settings(fields: Fields) -> Settings:
    """Rank and scale in a checkpoint that upstream's scripts saved unmerged, from its config.json.

    Their alpha is twice the rank (`wrap_llm_lora`, `wrap_backbone_lora`), so the scale is 2.
    """

    def settings(module: str) -> tuple[int, float]:
        text = module.startswith("language_model.")
        field = LORA_FIELDS[0] if text else LORA_FIELDS[1]
        if not fields.values.get(field):
            fields.refuse(
                field,
                f"the rank of the LoRA tensors beside it, of '{module}' for one; take config.json "
                "from the run that saved them",
            )
        return fields.count(field), 2.0

    return settings


def write_adapter(
    folder: Path, adapter: Adapter, config: InternVLConfig, layout: Layout, *, base: str
) -> None:
    """Write a folder that PEFT loads over the model `base` of that layout; whole or not at all.

    Of parameters that were trained themselves there may be the projector's, all of them. Names are
    those of transformers' InternVLForConditionalGeneration (`hf`) or of upstream's
    InternVLChatModel (`internvl`). Raises ValueError when the folder exists, OSError when the disk
    does not take it.
    """
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, tuple[int, float]] = {}
    for module, linear in linear_modules(layout, config).items():
        pairs = [pair_at(adapter, name, linear.layer) for name in linear.rule.ours]
        joined = _joined(pairs, linear, config)
        if joined is None:
            continue
        a, b, scale = joined
        name = _IN_MEMORY[layout] + module
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b)
        settings[name] = len(a), _alpha(scale, len(a))
    content = _adapter_config(settings, base)
    arrays = {name: value for name, value in adapter.items() if isinstance(value, np.ndarray)}
    for rule in rules(layout, config) if arrays else ():
        if rule.ours[0].startswith("projector."):
            values = rule.codec.to_theirs([arrays.pop(name) for name in rule.ours], config)
            key = f"base_model.model.{_IN_MEMORY[layout]}{rule.theirs}"
            tensors[key] = np.ascontiguousarray(values)
            content["modules_to_save"] = [_PROJECTOR[layout]]
    assert not arrays, sorted(arrays)
    with finished_folder(folder) as work:
        path = work / WEIGHTS
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from None
        path.chmod(0o644)  # safetensors writes through a private temporary file
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_text(work / CONFIG, text)


def _joined(
    pairs: Sequence[LoraPair | None], linear: LinearModule, config: InternVLConfig
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """A [rank, in], B [out, rank] and scale of one of their maps, from the pairs of its parts.

    Parts with the same `a` share it. Others each have their own components, in which the rows of
    the other parts are zero: the same sum, of a higher rank.
    """
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return None
    starts: list[int] = []  # where the components of each present pair begin
    factors: list[np.ndarray] = []
    for index, pair in enumerate(present):
        twin = next((i for i in range(index) if np.array_equal(present[i].a, pair.a)), None)
        starts.append(sum(a.shape[1] for a in factors) if twin is None else starts[twin])
        factors += [pair.a] if twin is None else []
    a = np.concatenate(factors, axis=1)
    scale = present[0].scale
    same = all(pair.scale == scale for pair in present)
    dtype = np.result_type(*(pair.b.dtype for pair in present)) if same else np.float32
    start = iter(starts)
    parts = []
    for pair, width in zip(pairs, linear.outs, strict=True):
        part = np.zeros((a.shape[1], width), dtype)
        if pair is not None:
            begin = next(start)
            b = pair.b if pair.scale == scale else pair.b.astype(dtype) * (pair.scale / scale)
            part[begin : begin + pair.rank] = b
        parts.append(part)
    return a.T, linear.rule.codec.to_theirs(parts, config), scale


def _alpha(scale: float, rank: int) -> float:
    """The alpha of that scale: the whole number, where one gives the scale to the last bit."""
    whole = round(scale * rank)
    return whole if whole / rank == scale else scale * rank


def _adapter_config(settings: dict[str, tuple[int, float]], base: str) -> dict[str, Any]:
    (rank, alpha), _ = Counter(settings.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in settings.items() if r != rank},
        "alpha_pattern": {name: top for name, (_, top) in settings.items() if top != alpha},
        "target_modules": _exactly(settings),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _exactly(names: Iterable[str]) -> str:
    """A regular expression for these modules and no other: both towers have a `q_proj`."""
    alone, layers = [], {}
    for name in names:
        if match := _LAYERED.fullmatch(name):
            layers.setdefault((match[1], match[3]), []).append(match[2])
        else:
            alone.append(re.escape(name))
    ends: dict[tuple[str, str], list[str]] = {}
    for (stack, end), numbers in layers.items():
        ends.setdefault((stack, "|".join(numbers)), []).append(re.escape(end))
    return "|".join(
        [
            rf"{re.escape(stack)}\.(?:{numbers})\.(?:{'|'.join(names)})"
            for (stack, numbers), names in ends.items()
        ]
        + alone
    )
