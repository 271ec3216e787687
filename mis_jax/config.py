"""The configuration of a training run: a dataclass tree, read from YAML.

Unknown keys are refused. Every field is documented here, once; the command line shows the same
text and overrides any field (`--optimizer.learning-rate 5e-6`).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mis_jax.parsing import parse_yaml
from mis_jax.storage.files import read_text

Part = Literal["vision", "projector", "language"]
Dtype = Literal["float32", "bfloat16"]
_STRICT = ConfigDict(extra="forbid")
_MOST_SEQUENCES = 10**8  # of a run; its schedule holds them all


class Bound(NamedTuple):
    """What a number may be, in the annotation of its field; NaN passes no test."""

    test: Callable[[Any], bool]
    allowed: str  # said after "give"


def _at_least(least: int) -> Bound:
    return Bound(lambda value: value >= least, f"at least {least}")


def _at_most(most: int) -> Bound:
    return Bound(lambda value: value <= most, f"at most {most}")


# Bounds keep a slip of the finger from taking the machine: each is far above what any run has.
_MANY = _at_most(10**9)
_Count = Annotated[int, _at_least(1), _MANY]
_CountOrZero = Annotated[int, _at_least(0), _MANY]
_Tiles = Annotated[int, _at_least(1), _at_most(1024)]
_Devices = Annotated[int, _at_least(1), _at_most(2**20)]
_DevicesOrRest = Annotated[
    int, Bound(lambda value: value == -1 or value >= 1, "at least 1"), _at_most(2**20)
]
_Positive = Annotated[float, Bound(lambda value: 0 < value < math.inf, "a number above 0")]
_NotNegative = Annotated[float, Bound(lambda value: 0 <= value < math.inf, "0 or more")]
_Unbounded = Annotated[float, Bound(lambda value: value > 0, "more than 0 (.inf for none)")]
_Probability = Annotated[float, Bound(lambda value: 0 <= value < 1, "0 to below 1")]


def _check_bounds(section: str, config: Any) -> None:
    """ValueError for the first field of a dataclass whose value is not within its bounds."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value, optional = getattr(config, name), type(None) in get_args(hint)
        if value is None:
            continue
        for part in (hint, *get_args(hint)):
            for bound in getattr(part, "__metadata__", ()):
                if not bound.test(value):
                    raise ValueError(
                        f"{section}{name} is {_shown(value)}; give {bound.allowed}"
                        f"{' or leave it out' if optional else ''}"
                    )


@dataclass(frozen=True)
class Source:
    """One dataset of the training mixture."""

    __pydantic_config__ = _STRICT
    kind: Literal["mis", "sharegpt", "jsonl", "meta"]
    """Format. mis: a folder with the published `mis_<split>.json`, or one written by `data build`;
    sharegpt: a JSON list of conversations (also LLaVA and LLaMA-Factory); jsonl: InternVL's format,
    one JSON object per line; meta: InternVL's meta file, which names several jsonl files."""
    root: Path | None = None
    """Folder that image paths are relative to; for `mis`, the published or built folder."""
    path: Path | None = None
    """Annotation file (`sharegpt`, `jsonl`) or meta file (`meta`)."""
    split: str = "train"
    """Split to train on (`mis` only)."""
    count: _Count | None = None
    """Number of samples to draw, chosen by the seed; if unset, all."""
    weight: _Positive | None = None
    """Sampling weight relative to the other sources; set it for every source or for none."""
    augment: bool = False
    """JPEG augmentation: re-encode every tile with a random quality."""
    max_tiles: _Tiles | None = None
    """Maximum number of tiles per sample of this source; if unset, `data.max_tiles`."""

    def __post_init__(self) -> None:
        needed = "root" if self.kind == "mis" else "path"
        if getattr(self, needed) is None:
            raise ValueError(f"a source of kind '{self.kind}' needs the field '{needed}'")
        if self.kind == "meta" and self.root is not None:
            raise ValueError("root is not for kind 'meta', whose file names a root for each set")
        _check_bounds("", self)
        if self.weight is not None and self.count is not None:
            raise ValueError("count and weight exclude each other; give one of them")


@dataclass(frozen=True)
class DataConfig:
    """Training data and how it is batched."""

    __pydantic_config__ = _STRICT
    sources: tuple[Source, ...]
    """Datasets of the training mixture."""
    max_length: Annotated[int, _at_least(1), _at_most(2**24)] = 8192
    """Maximum sequence length in tokens, image tokens included."""
    too_long: Literal["refuse", "truncate"] = "refuse"
    """Samples longer than `max_length`. refuse: treat as a bad sample; truncate: cut the end of the
    answer, never an image."""
    max_tiles: _Tiles = 6
    """Maximum number of tiles per sample, divided over its images; thumbnails are extra."""
    packing: bool = False
    """Pack several samples into each sequence of `max_length` tokens; they do not attend to each
    other."""
    pack_tiles: Annotated[int, _at_least(1), _at_most(2**16)] | None = None
    """Number of tiles per packed sequence; if unset, estimated from the sizes of the samples."""
    tile_cache: Path | None = None
    """Folder in which to cache decoded tiles for later epochs and runs; if unset, no cache."""
    workers: Annotated[int, _at_least(0), _at_most(1024)] = 0
    """Number of worker processes that load and tile images; 0 uses threads."""
    rows: Literal["strict", "upstream"] = "strict"
    """Which annotations are taken. strict: images and <image> agree, turns alternate, answers
    are not empty; upstream: whatever the official code trains on, as it reads it, each kind
    counted."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """Bad samples: a missing file, a damaged image, a wrong number of <image>, too many tokens.
    stop: list them all and stop; skip: leave them out."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one source")
        if self.pack_tiles is not None and not self.packing:
            raise ValueError("data.pack_tiles is of packed sequences; set data.packing: true")
        _check_bounds("data.", self)


@dataclass(frozen=True)
class TrainConfig:
    """Duration, batch size, trained parts, memory and checkpoints."""

    __pydantic_config__ = _STRICT
    epochs: _Count | None = None
    """Number of training epochs; set this or `steps`."""
    steps: _Count | None = None
    """Number of optimizer steps; set this or `epochs`."""
    epoch_multiple: _Count | None = None
    """The official code's number of steps: repeat the first sequences of every epoch up to a
    multiple of this (its per-device batch times its GPUs), take the whole steps of an epoch times
    the epochs, and drop what is left at the end. If unset, every sequence is trained on once an
    epoch, and the last step of the run may be smaller."""
    global_batch: _Count = 128
    """Number of sequences per optimizer step, over all devices."""
    micro_batch: _Count | None = None
    """Number of sequences per forward pass, over all devices; gradients are accumulated up to
    `global_batch`; if unset, equal to it."""
    freeze: tuple[Part, ...] = ("vision",)
    """Parts that are not trained: vision, projector, language. The targets of LoRA are always
    frozen."""
    loss_reduction: Literal["token", "sample", "square"] = "token"
    """Loss weight of each token of an answer of n tokens: 1 (token), 1/n (sample) or 1/sqrt(n)
    (square)."""
    loss_average: Literal["global", "micro"] = "global"
    """Mean of the loss of a step. global: over all its loss tokens; micro: over groups of
    `loss_group` sequences first, then over the groups, as the official code does."""
    loss_group: _Count | None = None
    """Number of consecutive sequences of a group of `loss_average: micro`: the official code's
    per-device batch, or with its `loss_reduction_all_gather` that times its GPUs."""
    remat: Literal["none", "full", "dots", "attention", "offload"] = "none"
    """Activation checkpointing (rematerialization): none; full: recompute whole layers; dots: keep
    matrix products; attention: keep attention outputs; offload: full, with layer inputs in host
    memory."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto is splash on TPU, cudnn on CUDA (bfloat16), xla elsewhere."""
    unroll: bool = False
    """Unroll the layers instead of scanning over them: slower to compile, faster to run."""
    loss_chunk: _Count = 1024
    """Number of tokens per sequence whose logits are computed at once."""
    drop_path: _Probability = 0.0
    """Maximum stochastic depth rate of the vision tower, rising linearly over its layers."""
    save_every: _Count | None = None
    """Save a checkpoint every N steps; if unset, every fifth of the run."""
    save_minutes: _Unbounded = 15.0
    """Also save a checkpoint when the last one is this many minutes old; .inf disables it."""
    check_digests: bool = True
    """Verify the SHA-256 digests of a checkpoint before resuming from it."""
    keep: _Count = 2
    """Number of most recent checkpoints to keep."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest attack success rate in `evaluation`."""
    final_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the trained model in `final/`; if unset, `dtype.params`."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """Loss or gradient that is NaN or infinite: stop the run or skip the step; either way the batch
    is saved in the output folder."""
    spike: Annotated[float, Bound(lambda value: value > 1, "more than 1")] | None = None
    """Skip a step whose gradient norm exceeds this many times its running mean; if unset, off."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        _check_bounds("train.", self)
        if self.steps and self.steps * self.global_batch > _MOST_SEQUENCES:
            raise ValueError(
                f"train.steps {self.steps} times train.global_batch {self.global_batch} is more "
                f"than {_MOST_SEQUENCES} sequences; lower one of them"
            )
        if (self.loss_average == "micro") != (self.loss_group is not None):
            raise ValueError(
                "train.loss_group is of train.loss_average: micro; give both or leave both out"
            )
        for name in ("micro_batch", "loss_group", "epoch_multiple"):
            if (part := getattr(self, name)) and self.global_batch % part:
                raise ValueError(
                    f"train.{name} {part} does not divide train.global_batch {self.global_batch}"
                )


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters, set up as in InternVL's fine-tuning scripts."""

    __pydantic_config__ = _STRICT
    rank: Annotated[int, _at_least(0), _at_most(2**16)] = 0
    """LoRA rank; 0 disables LoRA and trains the parameters themselves."""
    alpha: _Positive | None = None
    """LoRA alpha: the update is scaled by alpha / rank; if unset, twice the rank."""
    dropout: _Probability = 0.05
    """Dropout probability of the adapters' inputs, in training."""
    targets: tuple[Literal["vision", "language"], ...] = ("language",)
    """Parts whose linear layers get adapters: vision, language or both."""
    base: Literal["none", "int8", "nf4"] = "none"
    """Quantization of the frozen base weights (QLoRA): none, int8 or nf4."""

    def __post_init__(self) -> None:
        _check_bounds("lora.", self)
        if self.rank and not self.targets:
            raise ValueError("lora.targets is empty; name vision, language or both")
        if self.base != "none" and not self.rank:
            raise ValueError("lora.base is for adapters; set lora.rank")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, as in InternVL's scripts; weight decay applies to every tensor."""

    __pydantic_config__ = _STRICT
    learning_rate: _Positive = 5e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate schedule after the warm-up: cosine decay to 0, or constant."""
    warmup_ratio: Annotated[float, Bound(lambda value: 0 <= value <= 1, "0 to 1")] = 0.03
    """Fraction of the steps used for linear warm-up from 0."""
    weight_decay: _NotNegative = 0.05
    """Weight decay (decoupled, as in AdamW)."""
    clip: _Unbounded = 1.0
    """Maximum global gradient norm; .inf disables clipping."""
    beta1: _Probability = 0.9
    """Exponential decay rate of the first moment."""
    beta2: _Probability = 0.999
    """Exponential decay rate of the second moment."""
    eps: _Positive = 1e-8
    """Epsilon added to the denominator of the update."""
    vision_learning_rate: _Positive | None = None
    """Peak learning rate of the vision tower; if unset, `learning_rate`."""
    projector_learning_rate: _Positive | None = None
    """Peak learning rate of the projector; if unset, `learning_rate`."""
    offload: bool = False
    """Keep the optimizer moments in host memory between steps."""
    name: Literal["adamw", "adafactor"] = "adamw"
    """Optimizer; adafactor stores factored second moments and no first moments."""

    def __post_init__(self) -> None:
        _check_bounds("optimizer.", self)


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one axis may be -1 (all remaining devices)."""

    __pydantic_config__ = _STRICT
    data: _DevicesOrRest = 1
    """Data-parallel replicas of the model."""
    fsdp: _DevicesOrRest = -1
    """Fully sharded data parallelism: shards of every parameter."""
    tensor: _DevicesOrRest = 1
    """Tensor parallelism: shards of heads and MLP columns."""
    context: _DevicesOrRest = 1
    """Context parallelism: shards of the sequence."""
    slices: _Devices = 1
    """Number of slices connected by the data-center network; each holds `data` replicas."""

    def __post_init__(self) -> None:
        _check_bounds("mesh.", self)


@dataclass(frozen=True)
class DistributedConfig:
    """Multi-process setup; leave empty on TPU pods and Slurm, where JAX detects it."""

    __pydantic_config__ = _STRICT
    coordinator: str | None = None
    """Address of process 0, as HOST:PORT."""
    num_processes: _Count | None = None
    """Total number of processes."""
    process_id: int | None = None
    """Index of this process, starting from 0."""
    timeout: Annotated[int, _at_least(10), _MANY] = 60
    """Seconds without a heartbeat after which another process is considered lost."""

    def __post_init__(self) -> None:
        _check_bounds("distributed.", self)
        given = [self.coordinator, self.num_processes, self.process_id]
        if any(x is None for x in given) and any(x is not None for x in given):
            raise ValueError(
                "distributed: give all of coordinator, num_processes and process_id, or none"
            )
        last = (self.num_processes or 1) - 1
        if self.process_id is not None and not 0 <= self.process_id <= last:
            raise ValueError(f"distributed.process_id is {self.process_id}; give 0 to {last}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out samples during training."""

    __pydantic_config__ = _STRICT
    every: _CountOrZero = 0
    """Evaluate every N steps; 0 disables it."""
    benchmark: str = "mis_hard"
    """Benchmark id."""
    data_root: Path = Path("data")
    """Folder with one subfolder of files per benchmark."""
    samples: _Count = 32
    """Number of samples to evaluate, from the start of the benchmark."""
    judge: str = "rules"
    """Judge that labels the answers."""
    max_new_tokens: _Count = 256
    """Maximum number of tokens to generate per answer."""

    def __post_init__(self) -> None:
        _check_bounds("evaluation.", self)


@dataclass(frozen=True)
class LogConfig:
    """Logging in addition to metrics.jsonl and TensorBoard."""

    __pydantic_config__ = _STRICT
    wandb: str | None = None
    """Weights & Biases project to log to; needs the extra `wandb`."""
    profile_start: _CountOrZero = 0
    """First step to profile; 0 disables profiling. The trace is written to the output folder."""
    profile_steps: _Count = 3
    """Number of steps to profile."""

    def __post_init__(self) -> None:
        _check_bounds("log.", self)


@dataclass(frozen=True)
class DtypeConfig:
    """Data types."""

    __pydantic_config__ = _STRICT
    params: Dtype = "float32"
    """Data type of the trained parameters."""
    compute: Dtype = "bfloat16"
    """Data type of activations and frozen parameters; matrix products accumulate in float32."""
    moments: Dtype = "float32"
    """Data type of the optimizer moments; bfloat16 state is rounded stochastically."""
    gradients: Dtype = "float32"
    """Data type of the gradients accumulated over micro-batches."""


@dataclass(frozen=True)
class RunConfig:
    """A fine-tuning run."""

    __pydantic_config__ = _STRICT
    model: Path
    """Checkpoint to start from (any of the three layouts); `plan` also accepts a model name."""
    output: Path
    """Output folder of the run; an interrupted run resumes from it."""
    data: DataConfig
    train: TrainConfig
    seed: Annotated[int, Bound(lambda value: 0 <= value < 2**32, f"0 to {2**32 - 1}")] = 0
    """Random seed for the order of the samples, the choice of `count`, and dropout."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dtype: DtypeConfig = field(default_factory=DtypeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def final_dtype(self) -> str:
        """Data type of the model or adapter in `final/`."""
        return self.train.final_dtype or self.dtype.params

    def __post_init__(self) -> None:
        _check_bounds("", self)
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
        raw = parse_yaml(read_text(Path(path)))
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


def _shown(value: float) -> str:
    """Numbers of thousands of digits are not printed."""
    long = isinstance(value, int) and abs(value) >= 10**40
    return "a number of more than 40 digits" if long else str(value)
