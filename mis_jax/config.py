"""The configuration of a training run: a dataclass tree, read from YAML.

Unknown keys are refused. Every field is documented here, once; the command line shows the same
text and overrides any field (`--optimizer.learning-rate 5e-6`).
"""

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mis_jax.parsing import parse_yaml

Part = Literal["vision", "projector", "language"]
Dtype = Literal["float32", "bfloat16"]
_STRICT = ConfigDict(extra="forbid")
# Bounds keep a slip of the finger from taking the machine: each is far above what any run has.
_MANY = 10**9
_MOST_TILES = 1024
_MOST_PACKED_TILES = 2**16
_LONGEST_ROW = 2**24  # tokens
_MOST_DEVICES = 2**20
_MOST_ROWS = 10**8  # of a run; the plan of a run holds them all


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
        for name, most in (("count", _MANY), ("max_tiles", _MOST_TILES)):
            if (value := getattr(self, name)) is None:
                continue
            if value < 1:
                raise ValueError(f"{name} is {_shown(value)}; give at least 1 or leave it out")
            if value > most:
                raise ValueError(f"{name} is {_shown(value)}; give at most {most} or leave it out")
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
            _between("data.pack_tiles", self.pack_tiles, 1, _MOST_PACKED_TILES)
        _between("data.max_length", self.max_length, 1, _LONGEST_ROW)
        _between("data.max_tiles", self.max_tiles, 1, _MOST_TILES)
        _between("data.workers", self.workers, 0, 1024)


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
    """Parts that stay bit-identical; with LoRA all three may, which its targets do anyway."""
    loss_reduction: Literal["token", "sample", "square"] = "token"
    """Weight of an answer token: 1, 1/n or 1/sqrt(n) for an answer of n tokens."""
    remat: Literal["none", "full", "dots", "attention", "offload"] = "none"
    """What the backward pass computes again instead of keeping: nothing; a whole layer; all but
    matrix products; all but attention's output; a whole layer, its input waiting in host memory."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Kernel of attention: auto is splash on TPU, cudnn on CUDA (bfloat16), xla elsewhere."""
    unroll: bool = False
    """Write the layers out instead of scanning them: slower to compile, faster to run."""
    loss_chunk: int = 1024
    """Tokens of a row whose logits are held at once; those without loss never get any."""
    drop_path: float = 0.0
    """Largest chance that a branch of a vision layer is dropped, rising linearly over layers."""
    save_every: int | None = None
    """Steps between checkpoints; a fifth of the run without it."""
    save_minutes: float = 15.0
    """Longest time between checkpoints, whatever the steps; .inf saves by steps alone."""
    check_digests: bool = True
    """Compare a checkpoint with the digests of its files before the run goes on from it."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = False
    """Keep the checkpoint of the lowest attack success rate of `evaluation` too."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite ends the run, or its step is left out. Either way the
    batch is kept in the run's folder."""
    spike: float | None = None
    """Leave out a step whose gradient norm exceeds so many times the running mean; none without."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        for name in ("global_batch", "keep", "loss_chunk"):
            _between(f"train.{name}", getattr(self, name), 1)
        if not self.save_minutes > 0:
            raise ValueError(
                f"train.save_minutes is {self.save_minutes}; give more than 0 (.inf for never)"
            )
        for name in ("epochs", "steps", "micro_batch", "save_every"):
            if getattr(self, name) is not None:
                _between(f"train.{name}", getattr(self, name), 1)
        if self.steps and self.steps * self.global_batch > _MOST_ROWS:
            raise ValueError(
                f"train.steps {self.steps} times train.global_batch {self.global_batch} is more "
                f"than {_MOST_ROWS} rows; lower one of them"
            )
        if self.micro_batch and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch {self.micro_batch} does not divide "
                f"train.global_batch {self.global_batch}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"train.drop_path is {self.drop_path}; give 0 to below 1")
        if self.spike is not None and not self.spike > 1:
            raise ValueError(f"train.spike is {self.spike}; give more than 1, or leave it out")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen linear maps, as InternVL's scripts set them."""

    __pydantic_config__ = _STRICT
    rank: int = 0
    """Rank of the adapters; 0 trains the parameters themselves."""
    alpha: float | None = None
    """Scale of an adapter times its rank; twice the rank without it."""
    dropout: float = 0.05
    """Chance that an input of an adapter is dropped in training."""
    targets: tuple[Literal["vision", "language"], ...] = ("language",)
    """Parts whose linear maps get an adapter."""
    base: Literal["none", "int8", "nf4"] = "none"
    """Number format of the adapted kernels, which are frozen; none is that of `dtype.compute`."""

    def __post_init__(self) -> None:
        _between("lora.rank", self.rank, 0, 2**16)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; give 0 to below 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha}; give a number above 0")
        if self.rank and not self.targets:
            raise ValueError("lora.targets is empty; name vision, language or both")
        if self.base != "none" and not self.rank:
            raise ValueError("lora.base is for adapters; set lora.rank")


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
    vision_learning_rate: float | None = None
    """Peak of the vision tower; `learning_rate` without it."""
    projector_learning_rate: float | None = None
    """Peak of the projector; `learning_rate` without it."""
    offload: bool = False
    """Keep moments in host memory between steps."""
    name: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps the second moments of a matrix by row and column, and no first ones."""

    def __post_init__(self) -> None:
        # Written so that a value that is no number is refused too.
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"optimizer.warmup_ratio is {self.warmup_ratio}; give 0 to 1")
        for name in ("learning_rate", "vision_learning_rate", "projector_learning_rate", "eps"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
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
    """Shards of the sequence."""
    slices: int = 1
    """Slices joined by the data-centre network, each with copies of its own: `data` times over."""

    def __post_init__(self) -> None:
        for axis in ("data", "fsdp", "tensor", "context"):
            size = getattr(self, axis)
            if size != -1:
                _between(f"mesh.{axis}", size, 1, _MOST_DEVICES)
        _between("mesh.slices", self.slices, 1, _MOST_DEVICES)


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other; empty on TPU pods and Slurm, which tell JAX."""

    __pydantic_config__ = _STRICT
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """Processes in all."""
    process_id: int | None = None
    """Number of this one, from 0."""
    timeout: int = 60
    """Seconds without a sign of life after which another process counts as lost."""

    def __post_init__(self) -> None:
        given = [self.coordinator, self.num_processes, self.process_id]
        if any(x is None for x in given) and any(x is not None for x in given):
            raise ValueError(
                "distributed: give all of coordinator, num_processes and process_id, or none"
            )
        if self.num_processes is not None and self.process_id is not None:
            _between("distributed.num_processes", self.num_processes, 1)
            if not 0 <= self.process_id < self.num_processes:
                raise ValueError(
                    f"distributed.process_id is {self.process_id}; give 0 to "
                    f"{self.num_processes - 1}"
                )
        _between("distributed.timeout", self.timeout, 10)


@dataclass(frozen=True)
class EvaluationConfig:
    """Answers to held-out samples during training."""

    __pydantic_config__ = _STRICT
    every: int = 0
    """Steps between evaluations; 0 is never."""
    benchmark: str = "mis_hard"
    """Name of the benchmark."""
    data_root: Path = Path("data")
    """Folder that holds the benchmarks' files."""
    samples: int = 32
    """Samples that are answered, the first of the benchmark."""
    judge: str = "rules"
    """Who decides whether an answer is safe."""
    max_new_tokens: int = 256
    """Length of an answer."""

    def __post_init__(self) -> None:
        _between("evaluation.every", self.every, 0)
        _between("evaluation.samples", self.samples, 1)
        _between("evaluation.max_new_tokens", self.max_new_tokens, 1)


@dataclass(frozen=True)
class LogConfig:
    """Where numbers go beside metrics.jsonl and TensorBoard."""

    __pydantic_config__ = _STRICT
    wandb: str | None = None
    """Project of Weights & Biases; needs the extra `wandb`."""
    profile_start: int = 0
    """First step of a profile in the run's folder; 0 is no profile."""
    profile_steps: int = 3
    """Steps of the profile."""

    def __post_init__(self) -> None:
        _between("log.profile_start", self.profile_start, 0)
        _between("log.profile_steps", self.profile_steps, 1)


@dataclass(frozen=True)
class DtypeConfig:
    """Number formats."""

    __pydantic_config__ = _STRICT
    params: Dtype = "float32"
    """Of the parameters that are trained."""
    compute: Dtype = "bfloat16"
    """Of activations; products accumulate in float32."""
    moments: Dtype = "float32"
    """Of AdamW's moments; what is bfloat16 between steps is rounded stochastically."""
    gradients: Dtype = "float32"
    """Of the sum of gradients over micro-batches."""


@dataclass(frozen=True)
class RunConfig:
    """A fine-tuning run."""

    __pydantic_config__ = _STRICT
    model: Path
    """Checkpoint to start from, in any of the three formats; `plan` takes a family's name too."""
    output: Path
    """Folder of the run; an interrupted run goes on from what it finds there."""
    data: DataConfig
    train: TrainConfig
    seed: int = 0
    """Order of the samples and choice of `count`."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dtype: DtypeConfig = field(default_factory=DtypeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # what grain's shuffling takes
            raise ValueError(f"seed is {self.seed}; give 0 to {2**32 - 1}")
        trained = [part for part in get_args(Part) if part not in self.train.freeze]
        if self.lora.rank:
            for part in trained:  # LoRA trains the projector beside it, or nothing
                if part not in ("projector", *self.lora.targets):
                    raise ValueError(
                        f"train.freeze leaves {part} to train, which LoRA does not; add it there, "
                        "or to lora.targets for adapters of its own"
                    )
        elif not trained:
            raise ValueError("train.freeze names every part; leave at least one to train")


def load_config(path: Path) -> RunConfig:
    """Read a YAML file; every unknown, missing or wrong field is named in one error."""
    try:
        raw = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the YAML file of a run") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid YAML: {error}; correct the file") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path}: empty or not a mapping; see the example in `mis-jax train --help`"
        )
    try:
        return TypeAdapter(RunConfig).validate_python(raw)
    except ValidationError as error:
        lines = "; ".join(_problem(problem) for problem in error.errors())
        raise ValueError(f"{path}: {lines}") from None


def config_text(config: RunConfig) -> str:
    """The YAML of a configuration, which `load_config` reads back."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False)


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration so that `load_config` gives it back; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(config_text(config), encoding="utf-8")
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


def _between(name: str, value: int, least: int, most: int = _MANY) -> None:
    if value < least:
        raise ValueError(f"{name} is {_shown(value)}; give at least {least}")
    if value > most:
        raise ValueError(f"{name} is {_shown(value)}; give at most {most}")


def _shown(value: int) -> str:
    """Numbers of thousands of digits are not printed."""
    return str(value) if abs(value) < 10**40 else "a number of more than 40 digits"
