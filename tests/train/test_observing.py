"""Rates, profiles, held-out answers and Weights & Biases: what a run tells of itself."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_world import read_lines, run_config

from mis_jax import flops
from mis_jax.config import EvaluationConfig, LogConfig, LoraConfig, TrainConfig
from mis_jax.model.family import published
from mis_jax.train.metrics import MetricsLog, ThroughputMeter
from mis_jax.train.trainer import train


def test_mfu_is_what_the_formula_says():
    """The 8B on one H100: 4,184 tokens and 14 tiles of a MIS sample take 229.6 TFLOPs to train."""
    config = SimpleNamespace(train=TrainConfig(steps=1, freeze=()), lora=LoraConfig())
    meter = ThroughputMeter(config, published("internvl2_5-8b"), peak=989e12)  # type: ignore[arg-type]
    counts = {"tokens": 4184, "tiles": 14, "squares": 4184.0**2}
    rates = meter.rates(counts, samples=1, positions=8192, seconds=0.5)
    assert rates["tokens_per_second"] == 8368
    assert rates["samples_per_second"] == 2
    assert rates["useful_tokens"] == pytest.approx(4184 / 8192)
    assert rates["tflops_per_second"] == pytest.approx(2 * 229.6, rel=0.005)
    assert rates["mfu"] == pytest.approx(2 * 229.6e12 / 989e12, rel=0.005)
    # Two samples that share a row do not look at each other.
    packed = meter.rates(counts | {"squares": 2 * 2092.0**2}, 2, 8192, 0.5)
    assert packed["mfu"] < rates["mfu"]


@pytest.fixture(scope="module")
def observed(tiny_checkpoint, tiny_data, tmp_path_factory) -> Path:
    """Four steps with a profile of the second and answers after every second one."""
    asked = []

    def evaluate(model, processor) -> dict[str, float]:
        asked.append(np.asarray(model.text.head[...]).copy())
        assert model.text.head.shape[0] == model.config.text.vocab_size
        return {"asr": 1 / len(asked), "asr_n": 8}

    config = run_config(
        tiny_checkpoint,
        tiny_data,
        tmp_path_factory.mktemp("observed") / "run",
        train__steps=4,
        train__keep=1,
        train__keep_best=True,
        train__save_every=3,
        evaluation=EvaluationConfig(every=2),
        log=LogConfig(profile_start=2, profile_steps=1),
    )
    train(config, evaluate=evaluate)
    assert len(asked) == 2 and not np.array_equal(*asked)
    return config.output


def test_rates_stand_in_the_log(observed, tiny_checkpoint):
    for line in read_lines(observed / "metrics.jsonl"):
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert line["samples_per_second"] == pytest.approx(line["samples"] / line["seconds"])
        assert 0 < line["useful_tokens"] <= 1
        assert line["tiles"] > 0 and line["tflops_per_second"] > 0
        assert "squares" not in line
        assert "mfu" not in line  # nobody knows the peak of a CPU


def test_a_profile_of_the_window(observed):
    (trace,) = (observed / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_answers_are_logged_and_the_best_checkpoint_stays(observed):
    lines = read_lines(observed / "metrics.jsonl")
    assert [line.get("eval_asr") for line in lines] == [None, 1.0, None, 0.5]
    kept = {int(p.name) for p in (observed / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {4}  # the newest is the best


@pytest.mark.slow
def test_held_out_answers_of_the_mini_model(tmp_path):
    """The shipped model before fine-tuning, which helps with most of what it should not."""
    from mis_jax.api import load
    from mis_jax.evals.models import held_out
    from mis_jax.mini.files import write_mini

    write_mini(tmp_path)
    assets = Path(flops.__file__).parent / "assets" / "mini"
    model, processor = load(assets)
    config = EvaluationConfig(
        every=1, benchmark="mini_hard", data_root=tmp_path, samples=12, judge="rules"
    )
    figures = held_out(config)(model, processor)
    assert figures["asr_n"] + figures["unjudged"] == 12
    assert figures["asr"] > 0.5
    with pytest.raises(ValueError, match="judge 'nobody' is unknown"):
        held_out(EvaluationConfig(benchmark="mini_hard", data_root=tmp_path, judge="nobody"))


def test_weights_and_biases_gets_every_step(tmp_path, monkeypatch):
    """A stand-in for their library: what is asked of it, and that a run goes on under one name."""
    said = []

    class Run:
        def log(self, metrics, step):
            said.append((step, metrics))

        def finish(self, exit_code):
            said.append(("end", exit_code))

    def init(**settings):
        said.append(("init", settings["project"], settings["id"], settings["resume"]))
        return Run()

    names = iter(["first", "second"])
    util = SimpleNamespace(generate_id=lambda: next(names))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, util=util))
    for step in (1, 2):
        with MetricsLog(tmp_path, after_step=step - 1, project="safety") as log:
            log.write(step, {"loss": 0.5 / step, "bad": float("nan")}, ["a"])
    assert said == [
        ("init", "safety", "first", "allow"), (1, {"loss": 0.5}), ("end", 0),
        ("init", "safety", "first", "allow"), (2, {"loss": 0.25}), ("end", 0),
    ]  # fmt: skip
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_weights_and_biases_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb is 'safety', but wandb is not installed"):
        MetricsLog(tmp_path, after_step=0, project="safety")
