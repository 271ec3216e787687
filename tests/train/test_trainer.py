"""A run of a few steps: what it writes, and how it goes on after every kind of end."""

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_world import TIMES, picture, read_lines, run_config, sample, write_yaml
from waiting import until

from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.checkpoint.train_state import inspect_run_checkpoint, is_run_checkpoint
from mis_jax.config import load_config
from mis_jax.data.processor import Processor
from mis_jax.train import trainer
from mis_jax.train.outcome import FailedRun, Interrupted
from mis_jax.train.trainer import train

STEPS = 6  # with a checkpoint every 2
CONTRACT = {"step", "loss", "learning_rate", "grad_norm", "tokens", "samples", "seconds"}
PACKED = dict(data__packing=True, data__max_length=200, train__global_batch=2)


class Crash(Exception):
    """Stands for whatever ends the process between two saves."""


def crash_at(step: int):
    def progress(done, steps, metrics):
        if done == step:
            raise Crash

    return progress


def at_step(step: int, act):
    """A progress callback that calls `act` once, at a step."""

    def progress(done, steps, metrics):
        if done == step:
            act()

    return progress


@pytest.fixture
def config(tiny_checkpoint, tiny_data, tmp_path):
    return run_config(tiny_checkpoint, tiny_data, tmp_path / "run")


@pytest.fixture(scope="module")
def straight(tiny_checkpoint, tiny_data, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("straight") / "run"
    seen = []
    trained = train(run_config(tiny_checkpoint, tiny_data, output), lambda *a: seen.append(a[:2]))
    assert seen == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert (trained.model, trained.steps) == (output / "final", STEPS)
    return output


def without_time(output: Path) -> list[dict]:
    times = TIMES
    return [{k: v for k, v in x.items() if k not in times} for x in metrics_of(output)]


def metrics_of(output: Path) -> list[dict]:
    return read_lines(output / "metrics.jsonl")


def assert_same_run(output: Path, straight: Path) -> None:
    """Every number and every sample bit for bit, no step twice, the same model at the end."""
    assert without_time(output) == without_time(straight)
    assert (output / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    ours, theirs = (read_checkpoint(folder / "final").arrays for folder in (output, straight))
    for name, value in theirs.items():
        assert np.array_equal(ours[name], value), name


def saved_steps(output: Path) -> list[int]:
    return sorted(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_logs_have_the_fields_of_the_contract(straight):
    lines = metrics_of(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line.keys() >= CONTRACT
        assert isinstance(line["tokens"], int) and line["tokens"] > 4 * 50
        assert line["samples"] == 4
        assert line["seconds"] > 0
        assert np.isfinite([line["loss"], line["grad_norm"]]).all()
    assert lines[0]["learning_rate"] == 0
    assert lines[1]["learning_rate"] == pytest.approx(1e-2)
    assert lines[-1]["loss"] < lines[0]["loss"]
    samples = read_lines(straight / "samples.jsonl")
    assert [line.keys() for line in samples] == [{"step", "ids"}] * STEPS
    assert all(len(line["ids"]) == 4 for line in samples)
    assert load_config(straight / "config.yaml").output == straight
    assert saved_steps(straight) == [4, 6]  # `keep` is 2


def test_tensorboard_has_the_same_numbers(straight):
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (straight / "tensorboard").iterdir()
    data, losses = path.read_bytes(), {}
    while data:  # records: length, its checksum, content, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            if value.tag == "loss":
                losses[event.step] = value.simple_value
        data = data[16 + length :]
    assert losses == {line["step"]: line["loss"] for line in metrics_of(straight)}


def test_final_model_opens_and_frozen_parts_are_those_of_the_source(straight, tiny_checkpoint):
    source, final = read_checkpoint(tiny_checkpoint), read_checkpoint(straight / "final")
    assert final.config == source.config
    Processor.from_folder(straight / "final", final.config)
    for name, value in source.arrays.items():
        assert np.array_equal(final.arrays[name], value) == name.startswith("vision."), name


def test_the_final_model_has_the_data_type_that_is_asked_for(tiny_checkpoint, tiny_data, tmp_path):
    """Half the bytes: the values are those of the checkpoint, rounded once."""
    config = run_config(
        tiny_checkpoint, tiny_data, tmp_path / "run", train__steps=1,
        train__final_dtype="bfloat16",
    )  # fmt: skip
    trained = train(config)
    final, saved = map(read_checkpoint, (trained.model, config.output / "checkpoints" / "1"))
    assert (trained.dtype, final.dtype, saved.dtype) == ("bfloat16", "bfloat16", "float32")
    for name, value in final.arrays.items():
        assert np.array_equal(value, saved.arrays[name].astype(value.dtype)), name


def test_a_run_from_a_native_checkpoint_is_the_same(straight, tiny_checkpoint, tiny_data, tmp_path):
    write_checkpoint(read_checkpoint(tiny_checkpoint), tmp_path / "native", "native")
    before = contents(tmp_path / "native")
    config = run_config(tmp_path / "native", tiny_data, tmp_path / "run")
    train(config)
    assert_same_run(config.output, straight)
    assert contents(tmp_path / "native") == before


def test_a_finished_run_is_left_alone(straight, tiny_checkpoint, tiny_data):
    before = contents(straight / "final")
    config = run_config(tiny_checkpoint, tiny_data, straight, train__save_every=5)
    trained = train(config, crash_at(1))  # no step is taken
    assert trained.steps == STEPS
    assert contents(straight / "final") == before
    assert len(metrics_of(straight)) == STEPS


def test_a_kill_before_the_final_model_is_whole(straight, tiny_checkpoint, tiny_data, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    (output / "final").rename(output / ".final.abcdefgh")
    train(run_config(tiny_checkpoint, tiny_data, output), crash_at(1))
    assert not list(output.glob(".final*"))
    assert_same_run(output, straight)


def test_other_samples_under_the_same_settings_are_refused(tiny_checkpoint, tiny_data, tmp_path):
    """The order is a function of how many there are; a row more would shift it."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    config = run_config(tiny_checkpoint, data, tmp_path / "run")
    with pytest.raises(Crash):
        train(config, crash_at(3))
    annotations = data / "samples.jsonl"
    lines = annotations.read_text().splitlines()
    annotations.write_text("\n".join([*lines, json.dumps(sample(99, []))]))
    with pytest.raises(ValueError, match=r"run: the samples have changed"):
        train(config)
    lines[0] = lines[0].replace("It is safe", "It is good")  # a correction is welcome
    annotations.write_text("\n".join(lines))
    assert train(config).steps == STEPS


def test_checkpoints_without_their_settings(config):
    (config.output / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"config.yaml: missing beside checkpoints"):
        train(config)


def test_sigterm_saves_and_the_run_goes_on(config, straight):
    rare = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=9))
    with pytest.raises(Interrupted, match="stopped at step 3, saved"):  # on its way at step 2
        train(rare, at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert saved_steps(config.output) == [3]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # given back
    train(config)
    assert_same_run(config.output, straight)


def test_a_crash_between_saves_and_a_torn_line(config, straight):
    with pytest.raises(Crash):
        train(config, crash_at(5))
    assert saved_steps(config.output) == [2, 4]
    assert [line["step"] for line in metrics_of(config.output)] == [1, 2, 3, 4, 5]
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (config.output / name).open("a") as file:
            file.write('{"step": 6, "lo')
    half = config.output / "checkpoints" / "6.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    train(config)
    assert not half.exists()
    assert_same_run(config.output, straight)


@pytest.mark.slow
def test_sigkill(config, straight, tmp_path):
    """Killed twice: before anything was saved, and later."""
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from mis_jax.config import load_config\n"
        "from mis_jax.train.trainer import train\n"
        "def progress(done, *_):\n"
        "    if done == int(sys.argv[3]): os.kill(os.getpid(), 9)\n"
        "train(load_config(sys.argv[1]), progress)\n"
    )
    path = write_yaml(config, tmp_path / "run.yaml")
    command = [sys.executable, "-c", program, str(path), str(Path(__file__).parents[1])]
    for step in (1, 5):
        done = subprocess.run([*command, str(step)], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert metrics_of(config.output)[-1]["step"] == step  # what was logged is on disk
    assert saved_steps(config.output) in ([2], [2, 4])  # the last may have been on its way
    train(config)
    assert_same_run(config.output, straight)


@pytest.fixture(scope="module")
def packed(tiny_checkpoint, tiny_data, tmp_path_factory) -> Path:
    """The folder of a run on packed rows that nothing disturbed."""
    output = tmp_path_factory.mktemp("packed") / "run"
    train(run_config(tiny_checkpoint, tiny_data, output, **PACKED))
    assert all(line["samples"] > 2 for line in metrics_of(output))
    return output


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [(0, 1), (1, 2), (2, 0)])
def test_a_crash_at_any_step(
    straight, packed, tiny_checkpoint, tiny_data, tmp_path, packing, workers
):
    """The same samples and losses bit for bit, with other reading processes after the crash too."""
    step = random.randrange(1, STEPS)
    print("crash at step", step)
    settings = PACKED if packing else {}
    for count, progress in zip(workers, (crash_at(step), None), strict=True):
        config = run_config(
            tiny_checkpoint, tiny_data, tmp_path / "run", data__workers=count, **settings
        )
        if progress is None:
            train(config)
        else:
            with pytest.raises(Crash):
                train(config, progress)
    assert_same_run(config.output, packed if packing else straight)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer__learning_rate": 1e-3}, "optimizer.learning_rate"),
        ({"train__global_batch": 2}, "train.global_batch"),
        ({"seed": 1, "data__max_length": 128}, "data.max_length, seed"),
    ],
)
def test_changed_settings_are_refused(straight, tiny_checkpoint, tiny_data, change, named):
    before = contents(straight)
    config = run_config(tiny_checkpoint, tiny_data, straight, **change)
    with pytest.raises(ValueError, match=rf"config.yaml: .*other settings \({named}\)"):
        train(config)
    assert contents(straight) == before


def test_settings_may_change_while_nothing_is_saved(config):
    with pytest.raises(Crash):
        train(config, crash_at(1))
    other = run_config(config.model, config.data.sources[0].root, config.output, seed=1)
    train(other)
    assert load_config(config.output / "config.yaml") == other
    assert [line["step"] for line in metrics_of(config.output)] == list(range(1, STEPS + 1))


def test_a_loss_that_is_not_finite(config, straight, monkeypatch):
    """Step 5 of a run with a checkpoint of step 4 meets one; nothing on disk changes for it."""
    calls = []
    put = trainer.put_batch

    def poison(batch, mesh, **options):
        calls.append(batch)
        if len(calls) == 5:
            batch.loss_weights[0, 0, :] = np.inf
        return put(batch, mesh, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "put_batch", poison)
        with pytest.raises(FailedRun, match=r"step 5: .*not finite.*not_finite/step-5.json"):
            train(config)
    found = json.loads((config.output / "not_finite" / "step-5.json").read_text())
    assert found["step"] == 5
    assert found["ids"] == read_lines(straight / "samples.jsonl")[4]["ids"]
    assert found["metrics"]["loss"] in ("inf", "nan")
    assert saved_steps(config.output) == [2, 4]
    assert len(metrics_of(config.output)) == 4
    assert not (config.output / "final").exists()
    train(config)  # without the poison: parameters and moments were left as they were
    assert_same_run(config.output, straight)


def test_a_step_that_is_not_finite_is_left_out(config, monkeypatch):
    """Steps 2 and 5 are, of a run that skips; parameters are those of the other steps alone."""
    calls, put = [], trainer.put_batch

    def poison(batch, mesh, **options):
        calls.append(batch)
        if len(calls) in (2, 5):
            batch.loss_weights[0, 0, :] = np.inf
        return put(batch, mesh, **options)

    train_config = dataclasses.replace(config.train, on_not_finite="skip")
    config = dataclasses.replace(config, train=train_config)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "put_batch", poison)
        train(config)
    lines = metrics_of(config.output)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line.get("left_out", 0) for line in lines] == [0, 1, 0, 0, 1, 0]
    assert lines[1]["loss"] is None and lines[2]["learning_rate"] == lines[1]["learning_rate"]
    for step in (2, 5):
        found = json.loads((config.output / "not_finite" / f"step-{step}.json").read_text())
        assert found["ids"] == read_lines(config.output / "samples.jsonl")[step - 1]["ids"]
        with np.load(config.output / "not_finite" / f"step-{step}.npz") as kept:
            assert np.isinf(kept["loss_weights"][0, 0]).all() and kept["input_ids"].shape[1] == 4


def test_a_spike_is_left_out_and_counted(config, monkeypatch, caplog):
    make = trainer.make_train_program

    def spiking(*arguments):
        program = make(*arguments)

        def step(state, batch):
            spike = bool(state.step == 3)
            state, metrics = program.step(state, batch)
            return state, metrics | {"spike": spike}

        return dataclasses.replace(program, step=step)

    monkeypatch.setattr(trainer, "make_train_program", spiking)
    train(config)
    assert [line.get("left_out", 0) for line in metrics_of(config.output)] == [0, 0, 0, 1, 0, 0]
    assert "step 4: the gradient's norm" in caplog.text
    assert (config.output / "not_finite" / "step-4.npz").exists()


def test_only_the_newest_kept_batches_stay(config, tmp_path):
    from mis_jax.model.batch import Batch
    from mis_jax.train.skipped_batches import save_skipped_batch

    batch = Batch(*(np.zeros(2) for _ in range(6)))
    for step in range(1, 14):
        save_skipped_batch(tmp_path, step, batch, ["a"], {"loss": float("nan")})
    kept = {path.stem for path in (tmp_path / "not_finite").iterdir()}
    assert kept == {f"step-{step}" for step in range(4, 14)}


def test_the_best_checkpoint_is_kept(config):
    evaluation = dataclasses.replace(config.evaluation, every=1)
    best = dataclasses.replace(config.train, keep_best=True, keep=1)
    config = dataclasses.replace(config, train=best, evaluation=evaluation)
    rates = [0.9, 0.4, 0.1, 0.3, 0.2, 0.8]
    coming = iter(rates)
    train(config, evaluate=lambda model, processor: {"asr": next(coming)})
    assert saved_steps(config.output) == [3, 6]
    assert [line["eval_asr"] for line in metrics_of(config.output)] == rates


def test_settings_that_cannot_be_met_are_refused(config):
    best = dataclasses.replace(config.train, keep_best=True)
    with pytest.raises(ValueError, match=r"train.keep_best needs .*evaluation.every"):
        train(dataclasses.replace(config, train=best))
    with pytest.raises(ValueError, match=r"output gs:/+bucket/run: .*network disk"):
        train(dataclasses.replace(config, output=Path("gs://bucket/run")))


def test_a_damaged_file_of_a_checkpoint_is_named(straight, tmp_path):
    shutil.copytree(straight / "checkpoints" / "6", tmp_path / "checkpoints" / "6")
    shutil.copytree(straight / "digests", tmp_path / "digests")
    assert sorted(path.name for path in (straight / "digests").iterdir()) == ["4.json", "6.json"]
    folder = tmp_path / "checkpoints" / "6"
    assert is_run_checkpoint(folder) and not is_run_checkpoint(straight / "final")
    assert inspect_run_checkpoint(folder)["problems"] == []
    path = max((folder / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (folder / "meta" / "metadata").unlink()
    assert inspect_run_checkpoint(folder)["problems"] == [
        f"{folder / 'meta' / 'metadata'}: missing",
        f"{path}: is not what was saved",
    ]
    (tmp_path / "digests" / "6.json").unlink()
    (problem,) = inspect_run_checkpoint(folder)["problems"]
    assert "6.json: missing" in problem


def test_a_full_disk_under_the_log(config, straight, monkeypatch):
    from mis_jax.train.metrics import MetricsLog

    write = MetricsLog.write

    def full(self, step, metrics, ids, skipped):
        if step == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        write(self, step, metrics, ids, skipped)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", full)
        with pytest.raises(FailedRun, match=r"No space left.*newest checkpoint is of step 2"):
            train(config)
    train(config)
    assert_same_run(config.output, straight)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads
def test_a_full_disk_under_a_checkpoint(config, straight):
    """The operating system refuses to write, as orbax and tensorstore really meet it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        until((config.output / "checkpoints" / "2").exists)  # written in the background
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))

    try:
        with pytest.raises(FailedRun, match=r"checkpoints/4: cannot be written \(.*of step 2"):
            train(config, at_step(4, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved_steps(config.output) == [2]
    train(config)
    assert_same_run(config.output, straight)


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(config, straight):
    with pytest.raises(Crash):
        train(config, crash_at(5))
    newest = config.output / "checkpoints" / "4"
    for path in (newest / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    shutil.rmtree(config.output / "digests", ignore_errors=True)  # so that orbax must notice
    with pytest.raises(ValueError, match=r"checkpoints/4: not readable .*remove this folder"):
        train(config)
    shutil.rmtree(newest)
    train(config)
    assert_same_run(config.output, straight)


def bad_rows(folder: Path) -> Path:
    """Eight samples, the picture of the fifth cut short."""
    rows = []
    for index in range(8):
        path = picture(folder / f"{index}.png", 60, 60, index)
        rows.append(sample(index, [path.name]))
    path = folder / "4.png"
    path.write_bytes(path.read_bytes()[:200])
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_bad_sample_stops_a_run_and_leaves_nothing(tiny_checkpoint, tmp_path):
    data = bad_rows(tmp_path)
    config = run_config(tiny_checkpoint, data, tmp_path / "runs" / "run", train__global_batch=8)
    with pytest.raises(ValueError, match=r"samples.jsonl, line 5: image .*4.png cannot be decoded"):
        train(config)
    assert not config.output.exists()


def test_bad_samples_are_skipped_and_counted(tiny_checkpoint, tmp_path, caplog):
    """Two epochs of eight samples, one of them bad, are still the four planned steps."""
    data = bad_rows(tmp_path)
    config = run_config(
        tiny_checkpoint, data, tmp_path / "run", train__steps=None, train__epochs=2,
        data__on_bad_sample="skip",
    )  # fmt: skip
    assert train(config).steps == 4
    assert sum(line["skipped"] for line in metrics_of(config.output)) == 2
    assert sum("line 5" in record.message for record in caplog.records) == 2
    lines = read_lines(config.output / "samples.jsonl")
    reasons = [reason for line in lines for reason in line.get("skipped", [])]
    assert len(reasons) == 2 and all("line 5: image" in reason for reason in reasons)
    ids = [i for line in lines for i in line["ids"]]
    assert sorted(ids[:7]) == sorted(f"s{i}" for i in range(8) if i != 4)
    assert "s4" not in ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Path("nowhere")}, "nowhere: no such folder"),
        ({"mesh__data": 3}, "does not fit"),
    ],
)
def test_bad_settings_leave_no_folder(config, change, message):
    changed = run_config(config.model, config.data.sources[0].root, config.output, **change)
    with pytest.raises(ValueError, match=message):
        train(changed)
    assert not config.output.exists()
