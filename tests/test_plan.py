"""`mis-jax plan`: programs compiled for TPUs that are not here, and what is read from them."""

import dataclasses
import importlib.util
import json
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_world import run_config, write_yaml

from mis_jax import cli, flops
from mis_jax.config import MeshConfig
from mis_jax.model.family import published
from mis_jax.plan import Plan, model_config, plan
from mis_jax.plan.advice import advice
from mis_jax.plan.collectives import Collective, Sum, collectives, sums
from mis_jax.plan.compile import Memory, compile_for
from mis_jax.plan.generation import GenerationShape
from mis_jax.plan.roofline import roofline
from mis_jax.plan.shape import training_shape
from mis_jax.plan.topology import Topology, open_topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)"
)
MIB = 2**20


# ---------------------------------------------------------------------------------------------
# Collectives


def _compiled_text(topology: Topology) -> str:
    """Five gathers of 1 MiB, one sum of 4 MiB and one scattered sum of 2 MiB among four chips."""
    mesh = Mesh(np.array(topology.devices), ("x",))

    @jax.shard_map(mesh=mesh, in_specs=(P("x"), P("x")), out_specs=(P(), P(), P("x")))
    def program(few, many):
        def once(total, _):
            gathered = jax.lax.all_gather(few * (1 + total.sum()), "x", tiled=True)
            return total + gathered.sum(0, keepdims=True), None

        start = jnp.zeros((1, 256), jnp.float32)
        total, _ = jax.lax.scan(once, jax.lax.pcast(start, "x", to="varying"), None, length=5)
        return (
            jax.lax.pmax(total, "x"),
            jax.lax.psum(many, "x"),
            jax.lax.psum_scatter(2 * many[: MIB // 2], "x", tiled=True),
        )

    shape = lambda n, *rest: jax.ShapeDtypeStruct(  # noqa: E731
        (n, *rest), jnp.float32, sharding=NamedSharding(mesh, P("x"))
    )
    return jax.jit(program).lower(shape(1024, 256), shape(4 * MIB)).compile().as_text()


@needs_libtpu
def test_collectives_of_a_compiled_program_with_known_bytes() -> None:
    found = collectives(_compiled_text(open_topology("v5e:2x2")), 4)
    assert {one.group for one in found} == {4}
    total = sums(found)
    assert total["all-gather"] == Sum(5, 5 * MIB)
    # 1 KiB is the maximum; a scattered sum may be written as a sum with a slice behind it.
    summed = total["all-reduce"].bytes + total.get("reduce-scatter", Sum(0, 0)).bytes
    assert summed == 4 * MIB + 2 * MIB + 1024


GPU_TEXT = """HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%scatter (p: f32[64,8]) -> f32[16,8] {
  ROOT %reduce-scatter.1 = f32[16,8]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], \
dimensions={0}, to_apply=%add
}

%inner (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}
  %agd = bf16[32,8]{1,0} all-gather-done(%ag)
  %rs = ((f32[64,8]), f32[16,8], s32[]) async-start(%y), calls=%scatter
  %rsd = f32[16,8] async-done(%rs), calls=%scatter
}

%inner_end (t: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], f32[4]) while(%t), condition=%inner_end, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  %p = (f32[10]{0}, f32[10]{0}) collective-permute-start(%z), source_target_pairs={{0,1}}
}

%outer_end (t: (s32[], f32[4])) -> pred[] {
  %end = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%until_done (t: (s32[], f32[4])) -> pred[] {
  %chunk = s32[] constant(1024)
  %i = s32[] get-tuple-element(%t), index=0
  %place = s32[] multiply(%i, %chunk)
  %count = s32[] get-tuple-element(%t), index=1
  ROOT %more = pred[] compare(%place, %count), direction=LT
}

%once (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a2a = (f32[8]{0}, f32[8]{0}) all-to-all(%u, %v), \
replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'x'}
  %alone = f32[1024]{0} all-reduce(%u), replica_groups={{0},{1}}, to_apply=%add
}

ENTRY %main (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %first = (s32[], f32[4]) while(%t), condition=%outer_end, body=%outer
  %second = (s32[], f32[4]) while(%first), condition=%until_done, body=%once
  %rss = ((f32[24]{0}), f32[3]{0}) reduce-scatter-start(%x), replica_groups={}
  ROOT %all = f32[100]{0} all-reduce(%q), replica_groups={}, to_apply=%add
}
"""


def test_collectives_by_loops_groups_and_kinds() -> None:
    found = {one.kind: one for one in collectives(GPU_TEXT, 8) if one.bytes != 96}
    assert Collective("reduce-scatter", 96, 8, 1) in collectives(GPU_TEXT, 8)
    assert found == {
        "all-gather": Collective("all-gather", 32 * 8 * 2, 8, 2 * 3),
        "reduce-scatter": Collective("reduce-scatter", 64 * 8 * 4, 4, 2 * 3),
        "collective-permute": Collective("collective-permute", 40, 8, 2),
        "all-to-all": Collective("all-to-all", 64, 2, 1),
        "all-reduce": Collective("all-reduce", 400, 8, 1),
    }


ASYNC_TEXT = """HloModule asynchronous

%begins (x: bf16[1,8]) -> bf16[4,8] {
  ROOT %g.1 = bf16[4,8]{1,0} all-gather(%x), replica_groups={}, dimensions={0}
}

%async_collective_fusion.2 (x: bf16[1,8]) -> bf16[4,8] {
  %other = f32[4,4]{1,0} convolution(%a, %b)
  ROOT %g.2 = bf16[4,8]{1,0} all-gather(%x), replica_groups={}, dimensions={0}
}

%ends (x: bf16[1,8]) -> bf16[4,8] {
  ROOT %g.3 = bf16[4,8]{1,0} all-gather(%x), replica_groups={}, dimensions={0}
}

ENTRY %main (x: bf16[1,8]) -> bf16[4,8] {
  %async-collective-start.1 = (bf16[1,8]{1,0}) fusion(%x), kind=kCustom, calls=%begins
  %fusion.2 = (bf16[4,8]{1,0}) fusion(%y), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %async-collective-done.1 = bf16[4,8]{1,0} fusion(%z), kind=kCustom, calls=%ends
}
"""


def test_an_asynchronous_collective_of_a_tpu_counts_once() -> None:
    assert collectives(ASYNC_TEXT, 4) == [Collective("all-gather", 4 * 8 * 2, 4, 1)]


def test_what_a_device_receives() -> None:
    gather = Collective("all-gather", 800.0, 8, 10)
    assert gather.traffic == 10 * 700
    assert dataclasses.replace(gather, kind="all-reduce").traffic == 2 * gather.traffic
    assert dataclasses.replace(gather, kind="collective-permute").traffic == 8000


# ---------------------------------------------------------------------------------------------
# Topologies, memory and time


def _topology(name: str, *sides: int) -> Topology:
    chips = int(np.prod(sides))
    return Topology(name, flops.CHIPS[name.split(":")[0]], chips, 1, sides, [None] * chips)


@pytest.mark.parametrize(
    ("name", "sides", "group", "links"),
    [
        ("v5e:4x4", (4, 4), 16, 2),  # two dimensions, neither a ring
        ("v5e:4x4", (4, 4), 4, 1),
        ("v5e:16x16", (16, 16), 256, 4),  # both rings
        ("v5e:16x16", (16, 16), 16, 2),
        ("v6e:2x4", (2, 4), 8, 2),
        ("v5p:2x2x4", (2, 2, 4), 16, 3),
        ("v5p:4x4x4", (4, 4, 4), 64, 6),
        ("v5e:1x1", (1, 1), 1, 1),
    ],
)
def test_links_that_a_collective_uses(name, sides, group, links) -> None:
    topology = _topology(name, *sides)
    assert topology.bandwidth(group) == links * topology.chip.link


def test_the_slowest_resource_sets_the_time() -> None:
    topology = _topology("v5e:4x4", 4, 4)
    found = [Collective("all-gather", 1.6e9, 16, 60)]
    time = roofline(topology, operations=16 * 0.7 * 197e12, bytes_moved=0.8 * 8.1e11, found=found)
    assert time.compute == pytest.approx(1)
    assert time.memory == pytest.approx(1)
    assert time.collectives == pytest.approx(60 * 1.5e9 / 9e10)
    assert (time.step, time.bound) == (time.compute, "products")
    slower = roofline(topology, operations=1e12, bytes_moved=1e9, found=found)
    assert (slower.step, slower.bound) == (slower.collectives, "collectives")


@pytest.mark.parametrize("name", ["", "v5e", "v5e4x4", "v9:2x2", "h100:2x2", "v5e:4x", "tpu:4"])
def test_an_unknown_topology_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="topology") as refused:
        open_topology(name)
    assert "\n" not in str(refused.value)


@needs_libtpu
def test_an_accelerator_type_of_the_cloud_is_a_topology() -> None:
    """Flat slices count chips, deep ones the two cores of a chip."""
    sizes = {"v5litepod-16": (4, 4), "v6e-8": (2, 4), "v5p-16": (2, 2, 2), "v4-8": (2, 2, 1)}
    for name, sides in sizes.items():
        opened = open_topology(name)
        assert (opened.name, opened.sides, len(opened.devices)) == (name, sides, prod(sides))
    with pytest.raises(ValueError, match="'v5litepod-15' is not known"):
        open_topology("v5litepod-15")


@needs_libtpu
def test_a_topology_that_libtpu_refuses_is_a_line_too() -> None:
    with pytest.raises(ValueError, match=r"^topology 'v5e:3x7' cannot be opened .*; give one that"):
        open_topology("v5e:3x7")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs TPUs' compiler, libtpu: pip install"):
        open_topology("v5e:2x2")
    with pytest.raises(ValueError, match=r"needs JAX's CUDA plugin: pip install"):
        open_topology("h100:8")


@needs_libtpu
def test_a_program_that_is_too_large_says_by_how_much() -> None:
    topology = open_topology("v5e:2x2")
    mesh = Mesh(np.array(topology.devices), ("x",))
    given = 6 * flops.GIB  # of each of four chips, and twice that again in the making
    shape = jax.ShapeDtypeStruct(
        (4 * 1024, given // 4096), jnp.float32, sharding=NamedSharding(mesh, P("x"))
    )

    def program(x):
        sums = jnp.cumsum(x, axis=1)
        return (sums * sums.sum(axis=1, keepdims=True)).sum()

    compiled = compile_for(topology, jax.jit(program), shape)
    assert compiled.text is None
    memory = compiled.memory
    assert memory.arguments == given
    assert memory.limit == topology.chip.memory
    assert memory.total == pytest.approx(3 * given, rel=0.01)
    assert not memory.fits


def test_what_is_left() -> None:
    memory = Memory(arguments=3, temporaries=9, output=1, code=1, host=100, total=9, limit=10)
    assert (memory.left, memory.fits) == (1, True)
    assert not dataclasses.replace(memory, limit=8.9).fits


# ---------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize(
    ("data", "options", "tiles"),
    [
        ({"max_tiles": 6}, {}, 8),  # two images of 3 tiles and a thumbnail
        ({"max_tiles": 1}, {}, 2),  # one tile has no thumbnail
        ({"max_tiles": 12}, {}, 16),  # 14, in the next bucket
        ({"max_tiles": 12}, {"tiles": 2}, 2),
        ({"max_tiles": 6, "packing": True, "pack_tiles": 24}, {}, 24),
        ({"max_tiles": 1, "packing": True, "max_length": 4096}, {}, 7),  # 1,112 tokens a sample
    ],
)
def test_the_batch_that_is_planned_for(tmp_path, data, options, tiles) -> None:
    changes = {f"data__{name}": value for name, value in data.items()}
    config = run_config(tmp_path, tmp_path, tmp_path, **changes)
    model = published("internvl2_5-8b")
    shape = training_shape(config, model, options.get("length"), options.get("tiles"))
    assert (shape.sequences, shape.length, shape.tiles) == (4, config.data.max_length, tiles)


def test_a_model_by_its_name_or_by_a_folder_of_its_name(tmp_path, tiny_checkpoint) -> None:
    eight = published("internvl2_5-8b")
    assert model_config(tmp_path / "InternVL2_5-8B")[0] == eight
    assert model_config(tiny_checkpoint)[0] != eight
    with pytest.raises(ValueError, match=r"^model: .*nothing does not exist and is no published"):
        model_config(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------------
# The verb


@pytest.fixture
def mis_jax(capsys: pytest.CaptureFixture[str]):
    """`mis-jax` with these words: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def yaml_of(tiny_checkpoint, tiny_data, tmp_path):
    """The YAML file of a run of the tiny model over four chips."""

    def write(**changes):
        config = run_config(tiny_checkpoint, tiny_data, tmp_path / "run", mesh=MeshConfig(fsdp=4))
        return write_yaml(config, tmp_path / "plan.yaml", **changes)

    return write


@pytest.fixture(scope="module")
def compiled(tiny_checkpoint, tiny_data, tmp_path_factory) -> Plan:
    """Every step of a run of the tiny model, compiled for four chips once."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra tpu)")
    changes = {
        "mesh": MeshConfig(fsdp=4), "train__remat": "full", "evaluation__max_new_tokens": 32
    }  # fmt: skip
    config = run_config(tiny_checkpoint, tiny_data, tmp_path_factory.mktemp("run"), **changes)
    return plan(config, "v5e:2x2", steps=("train", "prefill", "decode"))


def test_every_step_is_compiled_and_its_memory_and_time_known(compiled: Plan) -> None:
    assert [step.name for step in compiled.steps] == ["train", "prefill", "decode"]
    for step in compiled.steps:
        assert 0 < step.memory.arguments < step.memory.total < step.memory.limit
        assert step.memory.limit == 15.75 * flops.GIB
        assert step.collectives is not None
        assert step.time is not None
        assert step.time.step > 0
    train = compiled.steps[0]
    assert sums(train.collectives)["all-gather"].bytes > 0
    assert train.memory.output < train.memory.arguments / 10  # the state is given away
    prefill, decode = compiled.steps[1:]
    assert isinstance(prefill.shape, GenerationShape)
    assert prefill.tokens == prefill.shape.groups * prefill.shape.chunk
    assert decode.tokens == prefill.shape.slots
    assert prefill.noncausal > prefill.operations > decode.operations
    for step in (prefill, decode):  # the cache is given away
        assert step.memory.output < step.memory.arguments / 10


def test_json_has_the_contracts_keys(mis_jax, yaml_of, compiled, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("mis_jax.plan.plan", lambda *_, **__: compiled)
    code, out, err = mis_jax("plan", yaml_of(), "--topology", "v5e:2x2", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["topology"], found["chips"], found["fits"]) == ("v5e:2x2", 4, True)
    memory = found["memory_gib"]
    kinds = ("arguments", "temporaries", "output", "code")
    assert memory["arguments"] < memory["total"] <= sum(memory[kind] for kind in kinds) + 3e-3
    assert memory["limit"] == 15.75
    assert found["collectives"]["all-gather"]["count"] > 0
    model, _ = model_config(tiny_checkpoint)
    work = flops.forward(model, tokens=4 * 96, tiles=4 * 2, squares=4 * 96**2)
    assert found["flops_per_step"] == pytest.approx(flops.training(work, ["vision"]))
    assert set(found["steps"]) == {"train", "prefill", "decode"}
    assert found["predicted_step_s"] == max(found["steps"]["train"]["seconds"].values())


def test_the_table_names_memory_traffic_and_time(mis_jax, yaml_of, compiled, monkeypatch) -> None:
    monkeypatch.setattr("mis_jax.plan.plan", lambda *_, **__: compiled)
    code, out, _ = mis_jax("plan", yaml_of(), "--topology", "v5e:2x2")
    assert code == 0
    for word in ("arguments", "left", "all-gather", "model FLOPs", "s at best", "assumed:"):
        assert word in out


def test_a_plan_that_does_not_fit_exits_1_with_figures_and_advice(
    mis_jax, yaml_of, compiled, monkeypatch
) -> None:
    train = compiled.steps[0]
    memory = Memory(
        arguments=5 * flops.GIB, temporaries=20.5 * flops.GIB, output=0, code=0, host=0,
        total=25.5 * flops.GIB, limit=15.75 * flops.GIB,
    )  # fmt: skip
    large = dataclasses.replace(train, memory=memory, collectives=None, time=None)
    monkeypatch.setattr("mis_jax.plan._train_plan", lambda *_: large)
    config = yaml_of(train__remat="none")
    code, out, err = mis_jax("plan", config, "--topology", "v5e:2x2")
    assert code == 1
    assert "train.remat: full instead of none" in out
    assert "does not fit v5e:2x2: it needs 25.50 GiB a device (5.00 of arguments, 20.50" in err
    assert "15.75 are there" in err
    code, out, _ = mis_jax("plan", config, "--topology", "v5e:2x2", "--json")
    assert code == 1
    found = json.loads(out)
    assert (found["fits"], found["collectives"], found["predicted_step_s"]) == (False, None, None)
    assert found["advice"]


def test_advice_begins_with_the_larger_half(tiny_checkpoint, tiny_data, tmp_path) -> None:
    config = run_config(tiny_checkpoint, tiny_data, tmp_path, train__remat="full")
    mesh = jax.sharding.AbstractMesh((2, 2, 1, 1), ("data", "fsdp", "tensor", "context"))

    def first(arguments: float, temporaries: float) -> str:
        memory = Memory(arguments, temporaries, 0, 0, 0, arguments + temporaries, 10)
        return advice(config, "train", memory, mesh)[0]

    assert first(9, 9) == "mesh: more fsdp instead of data (copies become shards)"
    assert first(1, 19).startswith("train.remat: offload")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--topology", "v9:2x2"), "topology 'v9:2x2' is not known"),
        (("--topology", "v5e:2x2", "--steps", "train,fly"), "'fly' is not a step"),
        (("--topology", "v5e:2x2", "--length", "0"), "--length is 0"),
    ],
)
def test_bad_words_exit_2_with_one_line(mis_jax, yaml_of, words, line) -> None:
    code, out, err = mis_jax("plan", yaml_of(), *words)
    assert (code, out) == (2, "")
    assert line in err
    assert len(err.splitlines()) == 1


@needs_libtpu
def test_rows_that_the_mesh_cannot_split_exit_2(mis_jax, yaml_of) -> None:
    code, _, err = mis_jax("plan", yaml_of(train__micro_batch=2), "--topology", "v5e:2x2")
    assert code == 2
    assert "2 sequences of a forward pass cannot be split over data x fsdp = 4 devices" in err


@needs_libtpu
def test_slices_give_their_devices_together() -> None:
    opened = open_topology("v5e:2x2", 2)
    assert (len(opened.devices), opened.chips, opened.slices) == (8, 4, 2)
