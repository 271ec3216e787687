"""A run's folder: whose it is, what a failure takes back, and how the run hears a signal."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_world import picture, read_lines, run_config, sample, write_yaml

from mis_jax import cli, signals
from mis_jax.checkpoint.train_state import RunCheckpoints
from mis_jax.config import TrainConfig, load_config
from mis_jax.storage.locks import LOCK
from mis_jax.train import trainer
from mis_jax.train.outcome import FailedRun, Interrupted, SavedFailure
from mis_jax.train.trainer import train

STEPS = 6  # with a checkpoint every 2
GRAVES = ("checkpoints/mine.txt", "tensorboard/events", "digests/1", "metrics.jsonl", "notes.md")


@pytest.fixture
def config(tiny_checkpoint, tiny_data, tmp_path):
    return run_config(tiny_checkpoint, tiny_data, tmp_path / "run")


@pytest.fixture(scope="module")
def straight(tiny_checkpoint, tiny_data, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("straight") / "run"
    train(run_config(tiny_checkpoint, tiny_data, output))
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def belongings(folder: Path, names=GRAVES) -> dict[str, bytes]:
    """Files of the user's own, with the names that a run gives its own."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return contents(folder)


def at_step(step: int, act):
    def progress(done, steps, metrics):
        if done == step:
            act()

    return progress


def data_with_a_bad_picture(folder: Path, rows: int = 8) -> Path:
    """Samples of a picture each; the fifth one's file is cut short."""
    lines = []
    for index in range(rows):
        path = picture(folder / f"{index}.png", 60, 60, index)
        lines.append(json.dumps(sample(index, [path.name])) + "\n")
    (folder / "whole.png").write_bytes((folder / "4.png").read_bytes())
    (folder / "4.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    (folder / "samples.jsonl").write_text("".join(lines))
    return folder


def test_a_folder_of_the_users_own_is_refused_and_left_alone(config):
    before = belongings(config.output)
    with pytest.raises(ValueError, match=r"run: is not empty \(checkpoints, digests, .*choose"):
        train(config)
    assert contents(config.output) == before


def test_files_with_the_names_of_a_runs_are_the_users_own_without_a_run(config):
    """Not even a config.yaml that fits makes them a run's."""
    belongings(config.output)
    write_yaml(config, config.output / "config.yaml")
    before = contents(config.output)
    with pytest.raises(ValueError, match=r"run: holds checkpoints, .* no run of mis-jax wrote"):
        train(config)
    assert contents(config.output) == before


def test_a_failure_takes_back_only_what_the_run_made_itself(tiny_checkpoint, tmp_path):
    data = data_with_a_bad_picture(tmp_path)
    config = run_config(tiny_checkpoint, data, tmp_path / "run", train__global_batch=8)
    config.output.mkdir()
    write_yaml(config, config.output / "config.yaml")
    before = belongings(config.output, ["notes.md", "plots/loss.png"])
    with pytest.raises(ValueError, match=r"line 5: image .*4.png cannot be decoded"):
        train(config)
    assert contents(config.output) == before
    assert {path.name for path in config.output.iterdir()} == {"config.yaml", "notes.md", "plots"}


def test_a_run_beside_the_users_own_config_goes_on_after_a_crash(config):
    """Nothing is saved yet, but the folder is known to be a run's."""
    config.output.mkdir()
    write_yaml(config, config.output / "config.yaml")
    with pytest.raises(ZeroDivisionError):
        train(config, at_step(1, lambda: 1 // 0))
    assert train(config).steps == STEPS


@pytest.mark.parametrize("failure", [ValueError("bad"), OSError("full"), RuntimeError("odd")])
def test_whatever_fails_before_a_step_leaves_nothing(config, monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr("mis_jax.train.compiled_step.TrainProgram.load", fail)
    with pytest.raises((type(failure), FailedRun), match=str(failure)):
        train(config)
    assert not config.output.exists()


def test_a_bad_sample_after_trained_steps_saves_and_then_stops(tiny_checkpoint, tmp_path, capsys):
    data = data_with_a_bad_picture(tmp_path)
    config = run_config(
        tiny_checkpoint, data, tmp_path / "run", train__global_batch=2, train__save_every=99,
        seed=4,
    )  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(write_yaml(config, tmp_path / "run.yaml"))])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert "line 5: image" in said and "is saved: mend this and run the same command again" in said
    done = RunCheckpoints(config.output / "checkpoints", 2).latest
    assert done and f"step {done} is saved" in said
    assert [line["step"] for line in read_lines(config.output / "metrics.jsonl")] == [
        *range(1, done + 1)
    ]
    (data / "4.png").write_bytes((data / "whole.png").read_bytes())
    train(config)
    steps = [line["step"] for line in read_lines(config.output / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))


def test_an_evaluation_that_fails_costs_no_steps(config):
    def evaluate(model, processor):
        raise ValueError("benchmark gone")

    evaluation = dataclasses.replace(config.evaluation, every=3)
    failing = dataclasses.replace(config, evaluation=evaluation)
    with pytest.raises(SavedFailure, match="benchmark gone; step 3 is saved") as failure:
        train(failing, evaluate=evaluate)
    assert failure.value.exit_code == 2
    assert [line["step"] for line in read_lines(config.output / "metrics.jsonl")] == [1, 2, 3]


def test_two_runs_in_one_folder_at_once_are_refused_and_the_first_goes_on(config):
    refused = []

    def second() -> None:  # a lock is a thread's: no other may have it, here or elsewhere
        with pytest.raises(ValueError, match="another process is writing it") as refusal:
            train(config)
        refused.append(str(refusal.value))

    def begin_second() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    assert train(config, at_step(2, begin_second)).steps == STEPS
    (said,) = refused
    assert f"(process {os.getpid()} on host " in said
    assert not (config.output / LOCK).exists()


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_folder_that_goes_away_under_a_run_is_a_failure(config, how):
    def away() -> None:
        if how == "moved":
            config.output.rename(config.output.with_name("elsewhere"))
        else:
            shutil.rmtree(config.output)

    rare = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=9))
    with pytest.raises(FailedRun, match=r"run: was moved or removed .* run the same command again"):
        train(rare, at_step(3, away))
    assert not (config.output / "final").exists()


def test_an_old_final_model_is_not_reported_as_the_new_one(straight, config):
    shutil.copytree(straight, config.output)
    shutil.rmtree(config.output / "checkpoints")
    optimizer = dataclasses.replace(config.optimizer, learning_rate=2e-2)
    before = contents(config.output / "final")
    with pytest.raises(
        ValueError, match=r"final: a finished model, but .* no checkpoint of step 6"
    ):
        train(dataclasses.replace(config, optimizer=optimizer))
    assert contents(config.output / "final") == before


def test_the_users_own_config_in_the_folder_is_never_overwritten(config):
    """It may be the very file that the run is started with, comments and all."""
    path = config.output / "config.yaml"
    path.parent.mkdir()
    write_yaml(config, path)
    text = "# my thesis, third try\n" + path.read_text()
    path.write_text(text)
    other = dataclasses.replace(config, seed=8)
    with pytest.raises(ValueError, match=r"config.yaml: was not written by a run .*\(seed\)"):
        train(other)
    assert contents(config.output) == {"config.yaml": text.encode()}
    train(config)
    assert path.read_text() == text


def test_a_config_that_a_run_wrote_is_its_own_until_it_is_edited(straight, config):
    shutil.copytree(straight, config.output)
    path = config.output / "config.yaml"
    free = dataclasses.replace(config.train, keep=3)
    train(dataclasses.replace(config, train=free))
    assert load_config(path).train.keep == 3
    path.write_text(path.read_text().replace("keep: 3", "keep: 4  # disk is large"))
    edited = path.read_text()
    train(config)
    assert path.read_text() == edited


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_every_signal_saves_while_steps_are_taken(config, name):
    rare = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=9))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="stopped at step 3, saved"):
            train(rare, at_step(2, lambda: os.kill(os.getpid(), getattr(signal, name))))
    finally:
        signal.signal(signal.SIGINT, before)
    assert RunCheckpoints.exist(config.output / "checkpoints")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("where", ["start-up", "final export"])
def test_a_signal_where_nothing_is_lost_ends_with_75_and_a_line(
    config, monkeypatch, capsys, name, where
):
    def stop(*_, **__):
        os.kill(os.getpid(), getattr(signal, name))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    module, what = (
        (trainer, "make_train_program") if where == "start-up" else (trainer, "write_checkpoint")
    )
    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, what, stop)
            with pytest.raises(SystemExit) as end:
                cli.main(["train", str(write_yaml(config, config.output.parent / "run.yaml"))])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"mis-jax: error: stopped by {name}; run the same command again to go on"
    assert config.output.exists() == (where == "final export")
    assert not (config.output / "final").exists()


NATIVE = """
import os, signal, sys, threading
from mis_jax import signals
signals._GRACE = 0.3
with signals.stoppable():
    signals.watch()
    os.system("echo ready; sleep 60")  # C, as a compiler is: Python cannot raise
"""


def test_a_signal_during_native_code_ends_with_75_and_a_line():
    process = subprocess.Popen(
        [sys.executable, "-c", NATIVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    os.killpg(process.pid, signal.SIGKILL)  # the sleep
    _, said = process.communicate()
    assert said == "mis-jax: error: stopped by SIGTERM; run the same command again to go on\n"


def test_a_signal_in_a_callback_that_drops_what_is_raised_is_not_lost(capsys):
    """As JAX's callback of the garbage collector is: Python writes a traceback and goes on."""

    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def drop() -> None:
        del [Dropping()][0]
        time.sleep(30)

    with pytest.raises(signals.Stop, match="stopped by SIGTERM"), signals.stoppable():
        drop()
    assert "Traceback" not in capsys.readouterr().err


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals.stoppable(), signals.deferred() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def saved_steps(monkeypatch) -> list[int]:
    """The steps at which checkpoints are saved from now on."""
    seen: list[int] = []
    save = RunCheckpoints.save

    def noted(self, step, *words):
        seen.append(step)
        save(self, step, *words)

    monkeypatch.setattr(RunCheckpoints, "save", noted)
    return seen


def test_without_a_number_of_steps_a_run_saves_at_least_five_times(config, monkeypatch):
    steps = saved_steps(monkeypatch)
    train(dataclasses.replace(config, train=TrainConfig(steps=11, global_batch=4)))
    assert steps == [2, 4, 6, 8, 10, 11]


def test_a_checkpoint_is_due_by_time_too(config, monkeypatch):
    steps = saved_steps(monkeypatch)
    timed = TrainConfig(steps=3, global_batch=4, save_every=99, save_minutes=1e-9)
    train(dataclasses.replace(config, train=timed))
    assert steps == [1, 2, 3]


def flip_a_byte(checkpoint: Path) -> None:
    path = max((checkpoint / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unfinished(straight: Path, output: Path) -> None:
    """The run as if it had been killed after its last checkpoint."""
    shutil.copytree(straight, output)
    shutil.rmtree(output / "final")


def test_a_flipped_byte_is_not_resumed_from_and_the_whole_checkpoint_before_is(
    straight, config, monkeypatch, caplog
):
    unfinished(straight, config.output)
    flip_a_byte(config.output / "checkpoints" / "6")
    steps = saved_steps(monkeypatch)
    assert train(config).steps == STEPS
    assert steps == [6]  # from step 4
    assert "is not what was saved; moved to" in caplog.text
    assert (config.output / "damaged-checkpoint-6" / "state").is_dir()


def test_no_whole_checkpoint_is_an_error_and_the_flag_turns_the_comparison_off(straight, config):
    unfinished(straight, config.output)
    for step in ("4", "6"):
        flip_a_byte(config.output / "checkpoints" / step)
    with pytest.raises(ValueError, match="is not what was saved, and no other checkpoint is whole"):
        train(config)
    assert not list(config.output.glob("damaged*"))
    shutil.rmtree(config.output)
    unfinished(straight, config.output)
    digests = config.output / "digests" / "6.json"
    digests.write_text(digests.read_text().replace("0", "1"))
    off = dataclasses.replace(config.train, check_digests=False)
    assert train(dataclasses.replace(config, train=off)).steps == STEPS


def test_strays_among_the_checkpoints_do_not_stop_a_resume(straight, config):
    unfinished(straight, config.output)
    (config.output / "checkpoints" / "999").write_text("mine")
    for name in ("²", "007", "notes"):
        (config.output / "checkpoints" / name).mkdir()
    assert train(config).steps == STEPS
    assert (config.output / "checkpoints" / "999").read_text() == "mine"
