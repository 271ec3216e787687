"""Exit codes and error lines of the command line, in this process."""

import errno
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_world import read_lines, run_config, sample, write_yaml

import mis_jax
from mis_jax import __version__, cli

VERBS = [
    "quickstart", "convert", "inspect", "verify", "data", "train", "plan", "generate", "chat",
    "serve", "eval", "judge", "merge", "report",
]  # fmt: skip


class Ran:
    """What one command did."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The one line on stderr; a progress display may stand above it."""
        assert "Traceback" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if line.strip() and "━" not in line]
        assert len(lines) == 1, self.err
        prefix = "mis-jax: error: "
        assert lines[0].startswith(prefix)
        return lines[0].removeprefix(prefix)


@pytest.fixture
def run(capsys):
    """`mis-jax` with these words."""

    def call(*words: object) -> Ran:
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        return Ran(code, *capsys.readouterr())

    return call


def spoiled(source: Path, folder: Path, change) -> Path:
    """A copy of a checkpoint with `change` made to its tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


HEAD = "language_model.output.weight"
SPOILERS = {
    "missing": (lambda t: t.pop(HEAD), f"missing tensor '{HEAD}'"),
    "extra": (lambda t: t.update(more=np.zeros(2, np.float32)), "unexpected tensor 'more'"),
    "misshapen": (lambda t: t.update({HEAD: t[HEAD][:-1].copy()}), f"tensor '{HEAD}' has shape"),
}


@pytest.fixture
def yaml_of(tiny_checkpoint, tiny_data, tmp_path):
    """The YAML file of a short run, with changes."""

    def write(**changes) -> Path:
        config = run_config(tiny_checkpoint, tiny_data, tmp_path / "run", train__steps=3)
        return write_yaml(config, tmp_path / "run.yaml", **changes)

    return write


# The command itself


def test_help_names_every_verb(run):
    for words in (["--help"], ["-h"]):
        shown = run(*words)
        assert shown.code == 0
        assert shown.err == ""
        assert all(verb in shown.out for verb in VERBS)
    assert run().code == 2
    assert run("--version").out == f"{__version__}\n"


@pytest.mark.parametrize("verb", ["convert", "inspect", "data show", "train"])
def test_help_of_a_verb_has_an_example(run, verb):
    shown = run(*verb.split(), "--help")
    assert shown.code == 0
    assert f"Example: mis-jax {verb}" in " ".join(shown.out.split())


def test_help_in_the_ways_that_people_ask_for_it(run):
    assert run("help").out == run("--help").out
    assert run("help", "convert").out == run("convert", "--help").out
    for words in (["data", "--help"], ["help", "data"], ["data", "bild", "-h"]):
        shown = run(*words)
        assert shown.code == 0
        assert "data build" in shown.out and "data show" in shown.out
        assert "quickstart" not in shown.out
    shown = run("train", "--help").out
    assert "(required)" in shown and "(default: MODEL)" not in shown


@pytest.mark.parametrize(
    ("words", "listed"),
    [
        (["frobnicate"], "quickstart"), (["data"], "data build, data show"),
        (["data", "frobnicate"], "data build, data show"), (["--what"], "quickstart"),
    ],
)  # fmt: skip
def test_unknown_verbs(run, words, listed):
    refused = run(*words)
    assert refused.code == 2
    assert refused.out == ""
    assert f"unknown verb '{words[0]}'; there are: {listed}" in refused.error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generate"], "Missing from mis-jax generate: MODEL (see `mis-jax generate --help`)"),
        (
            ["generate", "m", "--max-new-tokens", "many"],
            "Error parsing --max-new-tokens: invalid literal for int() with base 10: 'many' (see "
            "`mis-jax generate --help`)",
        ),
        (
            ["convert", "a", "b", "--formt", "hf"],
            "Missing from mis-jax convert: --format; Unrecognized options: --formt hf (see "
            "`mis-jax convert --help`)",
        ),
    ],
)
def test_what_the_parser_refuses_is_told_without_help_texts(run, words, line):
    assert run(*words).error == line


def test_auto_is_the_dtype_of_the_checkpoint(run, tiny_checkpoint, tmp_path):
    assert "--dtype {auto,float32,bfloat16,float16}" in run("convert", "--help").out
    done = run("convert", tiny_checkpoint, tmp_path / "d", "--format", "hf", "--dtype", "auto")
    assert (done.code, done.out) == (0, f"wrote {tmp_path / 'd'} (hf, float32)\n")


def test_options_override_a_configuration_that_is_only_looked_at(run, yaml_of):
    """As those of train do; steps put the file's epochs aside."""
    refused = run("plan", yaml_of(), "--topology", "v5e:4x4", "--train.steps", "two")
    line = "Error parsing --train.steps: 'two' is no INT (see `mis-jax plan --help`)"
    assert refused.error == line
    refused = run("plan", yaml_of(), "--topology", "v9-4", "--train.steps", 3)
    assert refused.error.startswith("topology 'v9-4' is not known")
    refused = run("data", "show", yaml_of(), "--train.steps", 3, "--model", "nowhere")
    assert refused.error.startswith("nowhere: no such folder")
    for verb in ("plan", "data show"):
        words = ["--topology", "v5e:2x2"] if verb == "plan" else []
        refused = run(*verb.split(), yaml_of(), *words, "--lenght", 5)
        assert refused.error == f"Unrecognized options: --lenght, 5 (see `mis-jax {verb} --help`)"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["convert", "a"], "DST"),
        (["convert", "a", "b", "--format", "gguf"], "'gguf'"),
        (["inspect"], "SRC"),
        (["inspect", "a", "--colour"], "--colour"),
        (["data", "show", "a.yaml", "--index", "two"], "--index"),
    ],
)
def test_bad_usage(run, words, named):
    refused = run(*words)
    assert refused.code == 2
    assert refused.out == ""
    assert named in refused.err
    assert "Traceback" not in refused.err


def test_debug_lets_the_exception_through(run, tmp_path):
    assert run("inspect", tmp_path / "none").code == 2
    for words in (["--debug", "inspect"], ["inspect", "--debug"]):
        with pytest.raises(ValueError, match="no such folder"):
            cli.main([*words, str(tmp_path / "none")])


# inspect and convert


def test_inspect(run, tiny_checkpoint):
    shown = run("inspect", tiny_checkpoint)
    assert (shown.code, shown.err) == (0, "")
    assert "internvl" in shown.out
    found = json.loads(run("inspect", tiny_checkpoint, "--json").out)
    assert (found["format"], found["problems"]) == ("internvl", [])


@pytest.mark.parametrize("case", SPOILERS)
def test_inspect_tells_what_is_wrong(run, tiny_checkpoint, tmp_path, case):
    change, message = SPOILERS[case]
    folder = spoiled(tiny_checkpoint, tmp_path / "bad", change)
    shown = run("inspect", folder)
    assert shown.code == 1
    assert shown.error == f"{folder}: 1 problem(s)"
    assert message in " ".join(shown.out.split())
    as_json = run("inspect", folder, "--json")
    assert as_json.code == 1
    assert message in json.loads(as_json.out)["problems"][0]


def test_inspect_of_no_checkpoint(run, tmp_path):
    assert run("inspect", tmp_path / "none").error.startswith(
        f"{tmp_path / 'none'}: no such folder"
    )
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused = run("inspect", tmp_path)
    assert refused.code == 2
    assert "config.json: field 'model_type' is 'bert'; supported" in refused.error


def test_convert_there_and_back(run, tiny_checkpoint, tmp_path):
    native, back = tmp_path / "native", tmp_path / "back"
    done = run("convert", tiny_checkpoint, native, "--format", "native")
    assert done.code == 0
    assert done.out == f"wrote {native} (native, float32)\n" or str(native) in done.out
    assert run("convert", native, back, "--format", "internvl").code == 0
    ours, theirs = (load_file(f / "model.safetensors") for f in (back, tiny_checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert run("inspect", native).code == 0


@pytest.mark.parametrize("case", SPOILERS)
def test_a_bad_checkpoint_is_not_converted(run, tiny_checkpoint, tmp_path, case):
    change, message = SPOILERS[case]
    folder = spoiled(tiny_checkpoint, tmp_path / "bad", change)
    refused = run("convert", folder, tmp_path / "dst", "--format", "native")
    assert refused.code == 2
    assert refused.error.startswith(f"{folder}: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_convert_overwrites_nothing(run, tiny_checkpoint, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine.txt").write_text("keep me")
    refused = run("convert", tiny_checkpoint, tmp_path / "dst", "--format", "hf")
    assert refused.code == 2
    assert refused.error.startswith(f"{tmp_path / 'dst'}: exists already; remove it or choose")
    assert [path.name for path in tmp_path.rglob("*")] == ["dst", "mine.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "hf", "--shard-size", "5"], "--shard-size '5': write a number with"),
        (["--format", "hf", "--shard-size", "0GiB"], "shard size is 0 bytes"),
    ],
)
def test_convert_with_bad_options(run, tiny_checkpoint, tmp_path, words, message):
    refused = run("convert", tiny_checkpoint, tmp_path / "dst", *words)
    assert refused.code == 2
    assert refused.error.startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_does_not_take_an_export(run, tiny_checkpoint, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    refused = run("convert", tiny_checkpoint, tmp_path / "dst", "--format", "native")
    assert refused.code == 1
    assert "Errno" not in refused.error and refused.error.count("No space left on device") == 1
    assert "all weights take 0.00 GB" in refused.error
    assert not list(tmp_path.iterdir())


# data show


def test_data_show(run, yaml_of, tmp_path):
    shown = run("data", "show", yaml_of(), "--index", 3, "--json")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert found.keys() == {"id", "text", "input_ids", "loss_mask", "tiles"}
    assert found["id"] == "s3"
    assert len(found["input_ids"]) == len(found["loss_mask"])
    sheet = tmp_path / "tiles.png"
    plain = run("data", "show", yaml_of(), "--index", 3, "--picture", sheet)
    assert plain.code == 0
    assert "<IMG_CONTEXT> x 4" in plain.out
    assert sheet.is_file()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data__max_len=3), "unknown field 'data.max_len'; remove it or correct its spelling"),
        (
            dict(data__max_length=30),
            r"samples.jsonl, line 1: 63 tokens, more than data.max_length 30",
        ),
        (dict(model="nowhere"), "nowhere: no such folder"),
        (dict(data__sources=[{"kind": "mis", "root": "nowhere"}]), "mis_train.json: no such file"),
    ],
)
def test_data_show_with_bad_input(run, yaml_of, changes, message):
    refused = run("data", "show", yaml_of(**changes))
    assert (refused.code, refused.out) == (2, "")
    assert message in refused.error


def test_data_show_beyond_the_samples(run, yaml_of):
    refused = run("data", "show", yaml_of(), "--index", 11)
    assert refused.code == 2
    assert refused.error == "--index 11: the run has samples 0 to 10"


# train


def test_train(run, yaml_of, tmp_path):
    done = run("train", yaml_of(), "--train.steps", 2, "--optimizer.learning-rate", "1e-3")
    assert done.code == 0
    assert "trained 2 steps" in done.out and "run/final (float32)" in done.out
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["learning_rate"] for line in lines] == [0, pytest.approx(1e-3)]
    assert run("inspect", tmp_path / "run" / "final").code == 0
    # The same folder with other settings.
    refused = run("train", yaml_of())
    assert refused.code == 2
    assert "config.yaml: this folder holds a run with other settings" in refused.error


def test_train_without_a_config(run):
    refused = run("train")
    assert refused.code == 2
    assert "the first argument is the YAML file of a run: mis-jax train CONFIG" in refused.error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data__sources=[{"kind": "jsonl", "path": "none.jsonl"}]), "none.jsonl: no such file"),
        (dict(optimizer__lr=1), "run.yaml: unknown field 'optimizer.lr'"),
        (dict(train__steps=0), "run.yaml: train.steps is 0; give at least 1"),
        (dict(model="nowhere"), "nowhere: no such folder"),
        (dict(mesh__tensor=7), "does not fit 1 device(s)"),
    ],
)
def test_train_with_bad_input_leaves_nothing(run, yaml_of, tmp_path, changes, message):
    refused = run("train", yaml_of(**changes))
    assert refused.code == 2
    assert message in refused.error
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_train_on_a_bad_sample_leaves_nothing(run, yaml_of, tmp_path):
    row = sample(0, ["gone.png"])
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    refused = run(
        "train", yaml_of(data__sources=[{"kind": "jsonl", "path": f"{tmp_path}/bad.jsonl"}])
    )
    assert refused.code == 2
    message = f"{tmp_path}/bad.jsonl, line 1: image {tmp_path}/gone.png does not exist"
    assert message in refused.error
    assert not (tmp_path / "run").exists()


def test_a_bad_option_of_train(run, yaml_of, tmp_path):
    for words in (["--train.stepz", 3], ["--optimizer.learning-rate", "-1"]):
        refused = run("train", yaml_of(), *words)
        assert refused.code == 2
        assert "Traceback" not in refused.err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_a_failed_run(run, yaml_of, tiny_checkpoint, tmp_path):
    def poison(tensors):
        tensors[HEAD][0, 0] = np.nan

    model = spoiled(tiny_checkpoint, tmp_path / "poisoned", poison)
    failed = run("train", yaml_of(model=str(model)))
    assert failed.code == 1
    assert failed.error.startswith("step 1: the loss or its gradient is not finite")
    assert json.loads((tmp_path / "run" / "not_finite" / "step-1.json").read_text())["step"] == 1
    assert not (tmp_path / "run" / "final").exists()


def test_an_interrupted_run_exits_75_and_goes_on(run, yaml_of, monkeypatch, tmp_path):
    from mis_jax.train import metrics

    write = metrics.MetricsLog.write

    def stop(self, step, numbers, ids, skipped):
        write(self, step, numbers, ids, skipped)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLog, "write", stop)
        stopped = run("train", yaml_of())
    assert stopped.code == 75
    assert stopped.error == "stopped at step 2, saved; run the same command again to go on"
    assert run("train", yaml_of()).code == 0
    assert [x["step"] for x in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


# generate, serve


def test_generate_with_an_empty_stop_string(run):
    """It would end every answer at once; told before the model is looked for."""
    refused = run("generate", "nowhere", "--prompt", "Hello", "--stop", "")
    assert (refused.code, refused.out) == (2, "")
    assert refused.error == "a stop string is empty, which ends every answer at once; leave it out"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-concurrent", 0], "--max-concurrent is 0; give a number above 0"),
        (["--max-queue", -1], "--max-queue is -1; give at least 0"),
        (["--timeout", "nan"], "--timeout is nan; give a number above 0"),
        (["--warm-up", -1], "--warm-up is -1; give a number of tokens, or 0 for none"),
        (["--drain", "inf"], "--drain is inf; give at least 0 seconds"),
        (["--api-key-env", "NO_SUCH_KEY"], "--api-key-env NO_SUCH_KEY: this environment variable"),
        (["--allow-image-folder", "nowhere"], "--allow-image-folder nowhere: no such folder"),
        (["--port", 70000], "--port is 70000; give a number from 0 (any free one) to 65535"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000 cannot be"),
        (["--port", 0], "nowhere: no such folder"),
    ],
)
def test_serve_with_bad_input(run, words, message):
    refused = run("serve", "nowhere", *words)
    assert (refused.code, refused.out) == (2, "")
    assert refused.error.startswith(message)


def test_serve_on_a_port_that_is_taken(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run("serve", "nowhere", "--port", port)
    assert refused.code == 2
    assert f"--port {port} cannot be served on" in refused.error


def test_serve_without_its_extra(run, monkeypatch):
    # Imported anew, the package would stand in the place of the one that other tests know.
    if hasattr(mis_jax, "server"):
        monkeypatch.setattr(mis_jax, "server", mis_jax.server)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    for name in [name for name in sys.modules if name.startswith("mis_jax.server")]:
        monkeypatch.delitem(sys.modules, name)
    refused = run("serve", "nowhere")
    assert refused.code == 2
    assert "serving needs the extra 'serve': pip install 'mis-jax[serve]'" in refused.error


# Paths that are no paths of this machine


@pytest.mark.parametrize("scheme", ["gs", "s3", "hdfs"])
@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["convert", "SRC", "{}", "--format", "hf"], "DST"),
        (["convert", "{}", "out", "--format", "hf"], "SRC"),
        (["eval", "SRC", "--benchmarks", "mini_easy", "--data-root", "d", "--out", "{}"], "--out"),
        (["eval", "{}", "--benchmarks", "mini_easy", "--data-root", "d", "--out", "o"], "MODEL"),
        (["judge", "{}"], "RUN"),
        (["judge", "run", "--judge", "{}"], "--judge"),
        (["judge", "run", "--verdict-cache", "{}"], "--verdict-cache"),
        (["merge", "{}", "a", "b"], "OUT"),
        (["merge", "out", "a", "{}"], "RUNS"),
        (["report", "a", "--out", "{}"], "--out"),
        (["data", "build", "--mis-root", "d", "--out", "{}"], "--out"),
        (["data", "show", "CONFIG", "--picture", "{}"], "--picture"),
        (["quickstart", "--out", "{}"], "--out"),
        (["generate", "SRC", "--batch", "q.jsonl", "--out", "{}"], "--out"),
        (["train", "CONFIG", "--output", "{}"], "output"),
        (["train", "CONFIG", "--data.tile-cache", "{}"], "data.tile_cache"),
        (["inspect", "{}"], "SRC"),
    ],
    ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else x,
)
def test_a_scheme_that_cannot_be_written_is_refused_by_name(
    run, yaml_of, tiny_checkpoint, tmp_path, monkeypatch, words, option, scheme
):
    path = yaml_of()
    monkeypatch.chdir(tmp_path)
    known = {"SRC": str(tiny_checkpoint), "CONFIG": str(path)}
    done = run(*[known.get(word, word).format(f"{scheme}://b/out") for word in words])
    assert done.code == 2
    assert f"{option} {scheme}:/" in done.error
    assert f"{scheme}:// paths are not supported" in done.error
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
