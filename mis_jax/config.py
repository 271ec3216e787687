"""The configuration of a training run: a dataclass tree, read from YAML.

Unknown keys are refused. Every field is documented here, once; the command line shows the same
text and overrides any field (`--optimizer.learning-rate 5e-6`).
"""

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

Part = Literal["vision", "projector", "language"]
Dtype = Literal["float32", "bfloat16"]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Source:
    """One set of training samples."""

    __pydantic_config__ = _STRICT
    kind: Literal["mis", "sharegpt", "jsonl", "meta"]
    """mis: a folder with the published `mis_<split>.json`, or one that `data build` wrote;
    sharegpt: a JSON list of such samples, LLaVA's and LLaMA-Factory's included; jsonl: InternVL's
    one object a line; meta: InternVL's file that names several jsonl."""
    root: Path | None = None
    """Folder that image paths are relative to; for `mis` the published or built folder."""
    path: Path | None = None
    """The annotation file of `sharegpt` and `jsonl`, or the file of `meta`."""
    split: str = "train"
    """Split of `mis`."""
    count: int | None = None
    """Take so many samples, chosen by the seed; all without it."""
    weight: float | None = None
    """Share of an epoch, relative to the other sources' weights; every source has one, or none."""
    augment: bool = False
    """Encode its tiles as JPEG again, with a random quality."""
    max_tiles: int | None = None
    """Tiles of its samples, in the place of `data.max_tiles`."""

    def __post_init__(self) -> None:
        needed = "root" if self.kind == "mis" else "path"
        if getattr(self, needed) is None:
            raise ValueError(f"a source of kind '{self.kind}' needs the field '{needed}'")
        if self.kind == "meta" and self.root is not None:
            raise ValueError("root is not for kind 'meta', whose file names a root for each set")
        for name in ("count", "max_tiles"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; give at least 1 or leave it out")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; give a number above 0 or leave it out")
        if self.weight is not None and self.count is not None:
            raise ValueError("count and weight exclude each other; give one of them")


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on."""

    __pydantic_config__ = _STRICT
    sources: tuple[Source, ...]
    """Sets of samples, mixed as they come."""
    max_length: int = 8192
    """Tokens of a row; a longer sample is a bad sample."""
    too_long: Literal["refuse", "truncate"] = "refuse"
    """truncate: cut the end off an answer that is too long, never off an image."""
    max_tiles: int = 6
    """Tiles of a sample, divided over its images; thumbnails come on top."""
    packing: bool = False
    """Several samples a row of `max_length` tokens, each seeing itself alone."""
    pack_tiles: int | None = None
    """Tiles of a packed row; as many as go with its tokens, by the samples' sizes, without it."""
    tile_cache: Path | None = None
    """Folder that keeps decoded tiles, for later epochs and runs."""
    workers: int = 0
    """Processes that read and tile images; 0 reads in threads."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """A missing file, a truncated image, a wrong count of <image>, an over-long sample."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one source")
        if self.pack_tiles is not None:
            if not self.packing:
                raise ValueError("data.pack_tiles is of packed rows; set data.packing: true")
            _at_least("data.pack_tiles", self.pack_tiles, 1)
        _at_least("data.max_length", self.max_length, 1)
        _at_least("data.max_tiles", self.max_tiles, 1)
        _at_least("data.workers", self.workers, 0)


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and which parts."""

    __pydantic_config__ = _STRICT
    epochs: int | None = None
    """Passes over the data; give this or `steps`."""
    steps: int | None = None
    """Optimizer steps; give this or `epochs`."""
    global_batch: int = 128
    """Rows of an optimizer step."""
    micro_batch: int | None = None
    """Rows of a forward pass; gradients of the micro-batches of a step are accumulated."""
    freeze: tuple[Part, ...] = ("vision",)
    """Parts that stay bit-identical."""
    loss_reduction: Literal["token", "sample", "square"] = "token"
    """Weight of an answer token: 1, 1/n or 1/sqrt(n) for an answer of n tokens."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again instead of keeping."""
    unroll: bool = False
    """Write the layers out instead of scanning them: slower to compile, faster to run."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        for name in ("global_batch", "save_every", "keep"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("epochs", "steps", "micro_batch"):
            if getattr(self, name) is not None:
                _at_least(f"train.{name}", getattr(self, name), 1)
        if self.micro_batch and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch {self.micro_batch} does not divide "
                f"train.global_batch {self.global_batch}"
            )
        if set(self.freeze) == {"vision", "projector", "language"}:
            raise ValueError("train.freeze names every part; leave at least one to train")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, as InternVL's scripts run it; every tensor decays."""

    __pydantic_config__ = _STRICT
    learning_rate: float = 5e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to 0, or constant."""
    warmup_ratio: float = 0.03
    """Share of the steps that the learning rate rises linearly from 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest global norm of the gradient; .inf does not clip."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        # Written so that a value that is no number is refused too.
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"optimizer.warmup_ratio is {self.warmup_ratio}; give 0 to 1")
        for name in ("learning_rate", "eps"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"optimizer.{name} is {value}; give a number above 0")
        if not self.clip > 0:
            raise ValueError(f"optimizer.clip is {self.clip}; give more than 0 (.inf for none)")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"optimizer.{name} is {value}; give 0 to below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}; give 0 or more")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1 and takes the rest."""

    __pydantic_config__ = _STRICT
    data: int = 1
    """Copies of the model, each with its own rows."""
    fsdp: int = -1
    """Shards of every parameter, each with its own rows."""
    tensor: int = 1
    """Shards of heads and feed-forward columns."""
    context: int = 1
    """Shards of the sequence (not available yet: 1)."""

    def __post_init__(self) -> None:
        if self.context != 1:
            raise ValueError(
                f"mesh.context is {self.context}: not available in this version, set it to 1"
            )
        for axis in ("data", "fsdp", "tensor"):
            size = getattr(self, axis)
            if size != -1:
                _at_least(f"mesh.{axis}", size, 1)


@dataclass(frozen=True)
class DtypeConfig:
    """Number formats."""

    __pydantic_config__ = _STRICT
    params: Dtype = "float32"
    """Of the parameters that are trained."""
    compute: Dtype = "bfloat16"
    """Of activations; products accumulate in float32."""
    moments: Dtype = "float32"
    """Of AdamW's first moment; the second is float32."""


@dataclass(frozen=True)
class RunConfig:
    """A fine-tuning run."""

    __pydantic_config__ = _STRICT
    model: Path
    """Checkpoint to start from, in any of the three formats."""
    output: Path
    """Folder of the run; an interrupted run goes on from what it finds there."""
    data: DataConfig
    train: TrainConfig
    seed: int = 0
    """Order of the samples and choice of `count`."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dtype: DtypeConfig = field(default_factory=DtypeConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # what grain's shuffling takes
            raise ValueError(f"seed is {self.seed}; give 0 to {2**32 - 1}")


def load_config(path: Path) -> RunConfig:
    """Read a YAML file; every unknown, missing or wrong field is named in one error."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the YAML file of a run") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())  # YAML's own has a picture of the place, in lines
        raise ValueError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path}: empty or not a mapping; see the example in `mis-jax train --help`"
        )
    try:
        return TypeAdapter(RunConfig).validate_python(raw)
    except ValidationError as error:
        lines = "; ".join(_problem(problem) for problem in error.errors())
        raise ValueError(f"{path}: {lines}") from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration so that `load_config` gives it back; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False), encoding="utf-8")
    os.replace(partial, path)


def changed_fields(before: RunConfig, after: RunConfig) -> list[str]:
    """Dotted names of the fields that differ, such as 'train.global_batch'."""
    return _differing(asdict(before), asdict(after), "")


def _problem(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "unexpected_keyword_argument":
            return f"unknown field '{name}'; remove it or correct its spelling"
        case "missing" | "missing_argument":
            return f"field '{name}' is missing; add it"
        case "value_error":  # one of the refusals above, most of which name the field in full
            return message if not name or message.startswith(name) else f"field '{name}': {message}"
        case "tuple_type":
            message = "give a list"
        case "dataclass_type":
            message = "give a mapping of fields"
    return f"field '{name}': {message} (found {problem['input']!r:.60})"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _differing(before: dict[str, Any], after: dict[str, Any], prefix: str) -> list[str]:
    names: list[str] = []
    for key, value in after.items():
        if isinstance(value, dict):
            names += _differing(before[key], value, f"{prefix}{key}.")
        elif before[key] != value:
            names.append(f"{prefix}{key}")
    return names


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; give at least {least}")
