"""A checkpoint of a run is a model to every verb: what was trained, over the run's base model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_world import picture, run_config

import mis_jax
from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import load, open_checkpoint, read_checkpoint
from mis_jax.checkpoint.trained_model import model_fingerprint, model_name
from mis_jax.cli.main import main
from mis_jax.config import DtypeConfig, LoraConfig
from mis_jax.quickstart import BASE_MODEL
from mis_jax.train.trainer import train

STEPS = 2
RUNS = {
    "full": dict(
        train__freeze=("vision",), dtype=DtypeConfig(params="bfloat16", moments="float32")
    ),
    "lora": dict(lora=LoraConfig(rank=4)),
}


@pytest.fixture(scope="module")
def outputs(tiny_checkpoint, tiny_data, tmp_path_factory) -> dict[str, Path]:
    """Finished runs with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in RUNS.items():
        short = dict(train__steps=STEPS, train__save_every=1)
        train(run_config(tiny_checkpoint, tiny_data, folder / name, **short, **changes))
    return {name: folder / name for name in RUNS}


@pytest.fixture
def copied(outputs, tmp_path) -> Path:
    """A run's folder that a test may damage."""
    return Path(shutil.copytree(outputs["full"], tmp_path / "run"))


def last(output: Path) -> Path:
    return output / "checkpoints" / str(STEPS)


def same(a, b) -> bool:
    return a.arrays.keys() == b.arrays.keys() and all(
        a.arrays[name].dtype == value.dtype and a.arrays[name].tobytes() == value.tobytes()
        for name, value in b.arrays.items()
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_last_checkpoint_converts_to_the_bytes_of_final(outputs, tmp_path):
    main(["convert", str(last(outputs["full"])), str(tmp_path / "out"), "--format", "native"])
    assert contents(tmp_path / "out") == contents(outputs["full"] / "final")


def test_the_last_checkpoint_of_adapters_converts_to_base_and_final(
    outputs, tiny_checkpoint, tmp_path
):
    main(["convert", str(last(outputs["lora"])), str(tmp_path / "out"), "--format", "hf"])
    merged = load(open_checkpoint(tiny_checkpoint, outputs["lora"] / "final"))
    assert same(read_checkpoint(tmp_path / "out"), merged)
    assert not same(merged, read_checkpoint(tiny_checkpoint))


def test_an_earlier_checkpoint_is_of_its_own_step(outputs):
    first, second = (
        read_checkpoint(outputs["full"] / "checkpoints" / str(step)).arrays for step in (1, 2)
    )
    frozen = {name for name in first if name.startswith("vision.")}
    changed = {name for name in first if not np.array_equal(first[name], second[name])}
    assert frozen and not frozen & changed and "text.embedding" in changed


@pytest.mark.parametrize("run", RUNS)
def test_verbs_take_a_checkpoint_of_a_run(run, outputs, tmp_path, capsys, monkeypatch):
    folder = last(outputs[run])
    monkeypatch.chdir(folder.parent)
    main(["inspect", f"../checkpoints/{STEPS}", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["step"] == STEPS
    assert 0 < found["parameters"]["trained"] < found["parameters"]["total"]
    image = picture(tmp_path / "a.png", 60, 60, 0)
    words = ["generate", str(folder), "--prompt", "What?", "--image", str(image), "--json"]
    main([*words, "--max-new-tokens", "2"])
    assert json.loads(capsys.readouterr().out)["completion_tokens"] <= 2
    assert model_name(folder) == f"{run}-{STEPS}"


def test_verify_finds_a_checkpoint_and_its_final_model_the_same(outputs, capsys):
    output = outputs["full"]
    main(["verify", str(last(output)), str(output / "final"), "--max-difference", "0", "--json"])
    assert json.loads(capsys.readouterr().out)["comparison"]["max_difference"] == 0


def test_load_gives_model_and_processor_of_a_checkpoint(outputs):
    model, processor = mis_jax.load(last(outputs["full"]))
    final, _ = mis_jax.load(outputs["full"] / "final")
    ours, theirs = nnx_state.flat(model), nnx_state.flat(final)
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    assert processor.config == final.config


def test_a_run_begins_with_a_checkpoint_of_another(outputs, tiny_data, tmp_path):
    config = run_config(last(outputs["full"]), tiny_data, tmp_path / "next", train__steps=1)
    read_checkpoint(train(config).model)
    base, trained = (read_checkpoint(p) for p in (config.model, tmp_path / "next/checkpoints/1"))
    assert base.arrays.keys() == trained.arrays.keys()


def test_another_base_is_another_model(copied, tiny_checkpoint, tmp_path):
    before = model_fingerprint(last(copied))
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_checkpoint), str(base)))
    assert model_fingerprint(last(copied)) == before
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes() + b" ")
    assert model_fingerprint(last(copied)) != before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_flipped_byte_of_a_checkpoint_is_refused_in_one_line(copied, capsys):
    flip(largest(last(copied) / "state"))
    with pytest.raises(ValueError, match=r"is not what was saved; take another checkpoint"):
        open_checkpoint(last(copied))
    open_checkpoint(last(copied), check_digests=False)
    with pytest.raises(SystemExit):
        main(["inspect", str(last(copied))])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda run: (run / "config.yaml").unlink(),
            "config.yaml is missing, which names",
        ),
        (lambda run: (run / "checkpoints/2/state/_METADATA").unlink(), r"_METADATA: missing"),
        (lambda run: shutil.rmtree(run / "checkpoints/2/state/d"), r"state/d/\w+: missing"),
        (lambda run: (run / "checkpoints/2/_CHECKPOINT_METADATA").unlink(), "not a complete check"),
        (lambda run: shutil.rmtree(run / "checkpoints/2"), "no such folder"),
        (lambda run: (run / "digests/2.json").write_text("{"), r"2.json: not readable; restore"),
    ],
)
def test_what_is_damaged_or_missing_is_one_clear_line(damage, reason, copied):
    damage(copied)
    with pytest.raises(ValueError, match=reason) as refused:
        read_checkpoint(last(copied))
    assert "\n" not in str(refused.value)


def test_damage_without_digests_is_one_clear_line_too(copied):
    (copied / "digests/2.json").unlink()
    read_checkpoint(last(copied))
    shutil.rmtree(last(copied) / "state/d")
    with pytest.raises(ValueError, match=r"checkpoints/2: not readable \(.*take another"):
        read_checkpoint(last(copied))


def test_a_base_that_is_gone_or_of_another_model_is_named(copied, tiny_checkpoint):
    config = copied / "config.yaml"
    said = config.read_text()
    config.write_text(said.replace(str(tiny_checkpoint), "base/gone"))
    with pytest.raises(ValueError, match=r"field 'model' is base/gone, no folder, .*the run began"):
        open_checkpoint(last(copied))
    config.write_text(said.replace(str(tiny_checkpoint), str(BASE_MODEL.absolute())))
    with pytest.raises(ValueError, match=r"'model' in the run's config.yaml must be the one"):
        open_checkpoint(last(copied))


def test_a_model_in_a_folder_that_is_called_like_a_checkpoint_is_one(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoints" / "7")
    assert same(read_checkpoint(folder), read_checkpoint(tiny_checkpoint))


def test_the_folder_of_a_run_is_no_model_and_says_which_are(copied):
    for folder in (copied, copied / "checkpoints"):
        with pytest.raises(ValueError, match=r"a run and no model; give .*final, or .*points/2"):
            open_checkpoint(folder)
