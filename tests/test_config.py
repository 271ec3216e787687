"""The configuration of a run: YAML in and out, every refusal, and the frozen list of options."""

import dataclasses
import inspect
import math
import re
import typing
from pathlib import Path

import pytest
import yaml

from mis_jax.config import (
    DataConfig,
    DtypeConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    Source,
    TrainConfig,
    changed_fields,
    config_text,
    load_config,
)

#: What `mis-jax train CONFIG --...` takes. It grows on purpose: change it together with the docs.
OPTIONS = {
    "model", "output", "seed",
    "data.sources", "data.sources.kind", "data.sources.root", "data.sources.path",
    "data.sources.split", "data.sources.count", "data.sources.weight", "data.sources.augment",
    "data.sources.max_tiles", "data.max_length", "data.max_tiles",
    "data.too_long", "data.packing", "data.pack_tiles", "data.tile_cache", "data.workers",
    "data.rows", "data.on_bad_sample",
    "train.epochs", "train.steps", "train.global_batch", "train.micro_batch", "train.freeze",
    "train.loss_reduction", "train.loss_average", "train.loss_group", "train.epoch_multiple",
    "train.remat", "train.attention", "train.unroll", "train.loss_chunk",
    "train.drop_path", "train.save_every", "train.save_minutes", "train.check_digests",
    "train.keep", "train.keep_best", "train.on_not_finite",
    "train.spike",
    "lora.rank", "lora.alpha", "lora.dropout", "lora.targets", "lora.base",
    "distributed.coordinator", "distributed.num_processes", "distributed.process_id",
    "distributed.timeout",
    "evaluation.every", "evaluation.benchmark", "evaluation.data_root", "evaluation.samples",
    "evaluation.judge", "evaluation.max_new_tokens",
    "log.wandb", "log.profile_start", "log.profile_steps",
    "optimizer.name", "optimizer.vision_learning_rate", "optimizer.projector_learning_rate",
    "optimizer.offload",
    "optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_ratio",
    "optimizer.weight_decay", "optimizer.clip", "optimizer.beta1", "optimizer.beta2",
    "optimizer.eps",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "mesh.slices",
    "train.final_dtype", "dtype.params", "dtype.compute", "dtype.moments", "dtype.gradients",
}  # fmt: skip

MINIMAL = """
model: checkpoints/internvl
output: runs/mine
data:
  sources:
    - {kind: mis, root: data/mis}
    - {kind: jsonl, path: general.jsonl, root: data, count: 500}
train: {epochs: 2}
"""


def option_paths(kind: type, prefix: str = "") -> list[str]:
    """Dotted paths of all fields, those of nested dataclasses and of lists of them included."""
    hints, found = typing.get_type_hints(kind), list[str]()
    for field in dataclasses.fields(kind):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        inner = next(filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))), None)
        if inner is None or inner is not hint:
            found.append(path)
        if inner is not None:
            found += option_paths(typing.cast(type, inner), f"{path}.")
    return found


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def edited(tmp_path: Path, **changes) -> Path:
    """MINIMAL with `section__field=value`; None takes a field out."""
    content = yaml.safe_load(MINIMAL)
    for name, value in changes.items():
        *sections, field = name.split("__")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
        if value is None:
            del node[field]
        else:
            node[field] = value
    return write(tmp_path, yaml.safe_dump(content))


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the callers look at the message
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_the_list_of_options_is_frozen():
    found = option_paths(RunConfig)
    assert len(found) == len(set(found))
    assert set(found) == OPTIONS


def test_every_field_is_documented():
    """Under the field; a section has the text of its class."""
    for kind in (
        Source,
        DataConfig,
        TrainConfig,
        OptimizerConfig,
        MeshConfig,
        DtypeConfig,
        RunConfig,
    ):
        assert kind.__doc__
        source, hints = inspect.getsource(kind), typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(hints[field.name]):
                below = source.split(f"\n    {field.name}: ", 1)[1].splitlines()[1]
                assert below.strip().startswith('"""'), (kind.__name__, field.name)


def test_the_smallest_file_and_its_defaults(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert config == RunConfig(
        model=Path("checkpoints/internvl"),
        output=Path("runs/mine"),
        data=DataConfig(
            sources=(
                Source("mis", root=Path("data/mis")),
                Source("jsonl", path=Path("general.jsonl"), root=Path("data"), count=500),
            )
        ),
        train=TrainConfig(epochs=2),
    )
    # InternVL's fine-tuning settings with MIRage's learning rate.
    assert config.optimizer == OptimizerConfig(5e-6, "cosine", 0.03, 0.05, 1.0, 0.9, 0.999, 1e-8)
    assert (config.data.max_length, config.data.max_tiles) == (8192, 6)
    assert (config.train.global_batch, config.train.freeze) == (128, ("vision",))
    assert config.train.save_every is None and config.train.save_minutes == 15


def test_round_trip(tmp_path):
    full = load_config(
        edited(
            tmp_path, seed=7, output="läufe/日本", optimizer__learning_rate=3e-7, mesh__tensor=2,
            optimizer__clip=math.inf, train__freeze=["vision", "projector"],
            dtype__params="bfloat16", data__on_bad_sample="skip",
        )
    )  # fmt: skip
    path = tmp_path / "saved.yaml"
    for config in (full, load_config(write(tmp_path, MINIMAL))):
        path.write_text(config_text(config), encoding="utf-8")
        assert load_config(path) == config


@pytest.mark.parametrize("written", ["5e-6", "5.0e-06", "0.000005", "'5e-6'"])
def test_numbers_that_yaml_takes_for_text(tmp_path, written):
    """YAML 1.1 reads 5e-6, without a point, as a string."""
    text = MINIMAL + f"optimizer: {{learning_rate: {written}}}\n"
    assert load_config(write(tmp_path, text)).optimizer.learning_rate == 5e-6


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=str)
def test_shipped_configurations_load(path):
    assert load_config(path).data.sources


def test_unknown_fields_are_all_named(tmp_path):
    path = edited(tmp_path, data__max_len=3, optimizer__lr=1, extra=0)
    message = refusal(path)
    for name in ("data.max_len", "optimizer.lr", "extra"):
        assert f"unknown field '{name}'; remove it or correct its spelling" in message
    text = MINIMAL.replace("count: 500", "number: 500")
    assert "unknown field 'data.sources.1.number'" in refusal(write(tmp_path, text))


@pytest.mark.parametrize("name", ["model", "output", "data", "train"])
def test_missing_fields(tmp_path, name):
    assert refusal(edited(tmp_path, **{name: None})) == f"field '{name}' is missing; add it"


WRONG = {
    "optimizer__learning_rate": ("fast", "field 'optimizer.learning_rate': .*number.*found 'fast'"),
    "seed": (1.5, "field 'seed': .*integer.*found 1.5"),
    "model": (5, "field 'model': .*path.*found 5"),
    "data__max_length": ([1], r"field 'data.max_length': .*integer.*found \[1\]"),
    "data__packing": ("maybe", "field 'data.packing': .*boolean.*found 'maybe'"),
    "data__sources": ({"kind": "mis"}, "field 'data.sources': give a list"),
    "data__on_bad_sample": ("ask", "field 'data.on_bad_sample': .*'stop' or 'skip'.*found 'ask'"),
    "train": ([], r"field 'train': give a mapping of fields \(found \[\]\)"),
    "train__freeze": ("vision", "field 'train.freeze': give a list"),
    "dtype__params": ("int8", "field 'dtype.params': .*'float32' or 'bfloat16'"),
    "optimizer__schedule": ("linear", "field 'optimizer.schedule': .*'cosine' or 'constant'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types(tmp_path, name):
    value, message = WRONG[name]
    assert re.match(message, refusal(edited(tmp_path, **{name: value})))


REFUSED = [
    (dict(data__sources=[]), "data.sources is empty; name at least one source"),
    (dict(data__sources=[{"kind": "mis"}]), "a source of kind 'mis' needs the field 'root'"),
    (dict(data__sources=[{"kind": "jsonl"}]), "a source of kind 'jsonl' needs the field 'path'"),
    (dict(data__sources=[{"kind": "sharegpt"}]), "'sharegpt' needs the field 'path'"),
    (
        dict(data__sources=[{"kind": "mis", "root": "a", "count": 0}]),
        "field 'data.sources.0': count is 0; give at least 1 or leave it out",
    ),
    (
        dict(data__sources=[{"kind": "mis", "root": "a", "max_tiles": 0}]),
        "field 'data.sources.0': max_tiles is 0; give at least 1 or leave it out",
    ),
    (
        dict(data__sources=[{"kind": "mis", "root": "a", "weight": 0}]),
        "field 'data.sources.0': weight is 0.0; give a number above 0 or leave it out",
    ),
    (
        dict(data__sources=[{"kind": "mis", "root": "a", "weight": math.nan}]),
        "field 'data.sources.0': weight is nan; give a number above 0",
    ),
    (
        dict(data__sources=[{"kind": "mis", "root": "a", "weight": 1, "count": 1}]),
        "field 'data.sources.0': count and weight exclude each other; give one of them",
    ),
    (dict(data__sources=[{"kind": "meta"}]), "a source of kind 'meta' needs the field 'path'"),
    (
        dict(data__sources=[{"kind": "meta", "path": "a", "root": "b"}]),
        "field 'data.sources.0': root is not for kind 'meta', whose file names a root for each",
    ),
    (
        dict(data__pack_tiles=8),
        "data.pack_tiles is of packed sequences; set data.packing: true",
    ),
    (dict(data__max_length=0), "data.max_length is 0; give at least 1"),
    (dict(data__max_tiles=-1), "data.max_tiles is -1; give at least 1"),
    (dict(data__workers=-1), "data.workers is -1; give at least 0"),
    (dict(train__epochs=None), "give exactly one of train.epochs and train.steps"),
    (dict(train__steps=3), "give exactly one of train.epochs and train.steps"),
    (dict(train__epochs=0), "train.epochs is 0; give at least 1"),
    (dict(train__epochs=None, train__steps=-3), "train.steps is -3; give at least 1"),
    (dict(train__global_batch=0), "train.global_batch is 0; give at least 1"),
    (dict(train__micro_batch=0), "train.micro_batch is 0; give at least 1"),
    (dict(train__micro_batch=-2), "train.micro_batch is -2; give at least 1"),
    (
        dict(train__micro_batch=3, train__global_batch=8),
        "train.micro_batch 3 does not divide train.global_batch 8",
    ),
    (
        dict(train__loss_average="micro"),
        "train.loss_group is of train.loss_average: micro; give both or leave both out",
    ),
    (
        dict(train__loss_average="micro", train__loss_group=3, train__global_batch=8),
        "train.loss_group 3 does not divide train.global_batch 8",
    ),
    (
        dict(train__epoch_multiple=3, train__global_batch=8),
        "train.epoch_multiple 3 does not divide train.global_batch 8",
    ),
    (dict(train__save_every=0), "train.save_every is 0; give at least 1"),
    (dict(train__save_minutes=0), "train.save_minutes is 0.0; give more than 0"),
    (dict(train__keep=0), "train.keep is 0; give at least 1"),
    (dict(train__freeze=["language", "vision", "projector"]), "train.freeze names every part"),
    (
        dict(train__freeze=[], lora={"rank": 4}),
        "train.freeze leaves vision to train, which LoRA does not; add it there, or to",
    ),
    (
        dict(train__freeze=["vision"], lora={"rank": 4, "targets": ["vision"]}),
        "train.freeze leaves language to train, which LoRA does not",
    ),
    (dict(optimizer__warmup_ratio=1.5), "optimizer.warmup_ratio is 1.5; give 0 to 1"),
    (dict(optimizer__learning_rate=0), "optimizer.learning_rate is 0.0; give a number above 0"),
    (dict(optimizer__learning_rate=math.nan), "optimizer.learning_rate is nan"),
    (dict(optimizer__learning_rate=math.inf), "optimizer.learning_rate is inf"),
    (dict(optimizer__eps=0), "optimizer.eps is 0.0; give a number above 0"),
    (dict(optimizer__clip=0), "optimizer.clip is 0.0; give more than 0"),
    (dict(optimizer__beta1=1), "optimizer.beta1 is 1.0; give 0 to below 1"),
    (dict(optimizer__beta2=-0.1), "optimizer.beta2 is -0.1; give 0 to below 1"),
    (dict(optimizer__weight_decay=-1), "optimizer.weight_decay is -1.0; give 0 or more"),
    (dict(mesh__context=0), "mesh.context is 0; give at least 1"),
    (dict(mesh__fsdp=0), "mesh.fsdp is 0; give at least 1"),
    (dict(mesh__tensor=-2), "mesh.tensor is -2; give at least 1"),
    (dict(seed=-1), "seed is -1; give 0 to 4294967295"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_values_that_make_no_sense(tmp_path, changes, message):
    assert message in refusal(edited(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty or not a mapping"),
        ("- model", "empty or not a mapping"),
        ("model: [", "not valid YAML: while parsing"),
        ("a: b: c", "not valid YAML: mapping values are not allowed here"),
        ("1: 2\nmodel: m", "field '1': Keys should be strings"),
    ],
)
def test_files_that_hold_no_configuration(tmp_path, text, message):
    assert message in refusal(write(tmp_path, text))


def test_a_missing_and_a_binary_file(tmp_path):
    assert refusal(tmp_path / "none.yaml") == "no such file; give the YAML file of a run"
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    assert refusal(path).startswith("not valid YAML")


def test_changed_fields(tmp_path):
    before = load_config(write(tmp_path, MINIMAL))
    assert changed_fields(before, before) == []
    after = dataclasses.replace(
        before,
        seed=1,
        data=dataclasses.replace(before.data, sources=before.data.sources[:1], max_tiles=3),
        optimizer=dataclasses.replace(before.optimizer, clip=2.0),
    )
    names = ["data.sources", "data.max_tiles", "seed", "optimizer.clip"]
    assert changed_fields(before, after) == names


@pytest.mark.parametrize("freeze", [["language", "vision", "projector"], ["vision"]])
def test_lora_trains_beside_frozen_parts(tmp_path, freeze):
    """As the official scripts freeze all three."""
    path = edited(tmp_path, train__freeze=freeze, lora={"rank": 4})
    assert load_config(path).train.freeze == tuple(freeze)


def test_configurations_are_frozen(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.epochs = 3  # type: ignore[misc]
    assert isinstance(config.data.sources, tuple)


def test_numbers_beyond_reason_are_refused(tmp_path):
    """Each would take the memory or the processes of the machine before anything is trained."""
    missed = {}
    for name, value, message in (
        ("data__workers", 10**9, "data.workers is 1000000000; give at most 1024"),
        ("data__max_length", 10**12, "data.max_length is 1000000000000; give at most 16777216"),
        ("data__max_tiles", 10**9, "data.max_tiles is 1000000000; give at most 1024"),
        ("train__global_batch", 10**90, "a number of more than 40 digits; give at most"),
        ("train__epochs", 10**18, "train.epochs is 1000000000000000000; give at most"),
        ("lora__rank", 10**9, "lora.rank is 1000000000; give at most 65536"),
        ("mesh__data", 10**9, "mesh.data is 1000000000; give at most 1048576"),
        ("optimizer__learning_rate", float("nan"), "optimizer.learning_rate is nan"),
    ):
        if message not in (found := refusal(edited(tmp_path, **{name: value}))):
            missed[name] = found
    assert missed == {}
    steps = {"train__epochs": None, "train__steps": 10**8, "train__global_batch": 128}
    assert "is more than 100000000 sequences" in refusal(edited(tmp_path, **steps))


@pytest.mark.parametrize("text", ["[" * 10_000, "a: &a [*a]", "a: " + "1" * 5000, "a: 1\na: 2"])
def test_yaml_without_bounds_is_one_line(tmp_path, text):
    assert refusal(write(tmp_path, text)).startswith("not valid YAML: ")


def test_a_folder_is_no_configuration(tmp_path):
    assert "cannot be read (Is a directory); give a YAML file" in refusal(tmp_path)
