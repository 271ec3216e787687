"""A LoRA adapter given beside its base model is what `convert --adapter` would have merged."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import test_cli_evaluation
from safetensors.numpy import load_file, save_file

import mis_jax
from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.hf.config import read_config
from mis_jax.checkpoint.peft.mapping import linear_modules
from mis_jax.checkpoint.trained_model import model_fingerprint, model_name
from mis_jax.cli import main
from mis_jax.config import MeshConfig
from mis_jax.mini.icons import draw_scene
from mis_jax.parallel.sharding import make_mesh
from mis_jax.quickstart import BASE_MODEL

RANK = 2
VERBS = {
    "generate": ["--prompt", "Hello"],
    "chat": [],
    "serve": ["--port", "0"],
    "eval": ["--benchmarks", "mini_easy", "--data-root", "DATA", "--out", "OUT"],
}
data = test_cli_evaluation.data  # the fixture: the mini world with a few rows
QUESTION = "Image-1: <image>\nWhat is in the image?"


def write_adapter(folder: Path, seed: int = 0) -> Path:
    """An adapter of every linear map of the shipped model, with effect."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, module in linear_modules("internvl", read_config(BASE_MODEL)[0]).items():
        if ".layers." not in name:
            continue
        outs, ins = module.shape
        for role, shape in {"A": (RANK, ins), "B": (outs, RANK)}.items():
            values = 0.3 * rng.standard_normal(shape, dtype=np.float32)
            tensors[f"base_model.model.{name}.lora_{role}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The adapters `adapter`, `other` and `unfit`, and `merged`, which `convert` makes of one."""
    work = tmp_path_factory.mktemp("adapters")
    adapter = write_adapter(work / "adapter")
    write_adapter(work / "other", seed=1)
    unfit = write_adapter(work / "unfit") / "adapter_model.safetensors"
    save_file({k: np.pad(v, [(0, 1), (0, 1)]) for k, v in load_file(unfit).items()}, unfit)
    words = [str(BASE_MODEL), str(work / "merged"), "--format", "native", "--dtype", "float32"]
    main(["convert", *words, "--adapter", str(adapter)])
    return work


@pytest.fixture(scope="module")
def image(work) -> str:
    draw_scene("banana", np.random.default_rng(5)).save(work / "a.png")
    return str(work / "a.png")


def ran(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def words_of(verb: str, data, out: Path) -> list[object]:
    places = {"DATA": data, "OUT": out}
    return [places.get(word, word) for word in VERBS[verb]]


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_load_with_an_adapter_is_the_merged_model_to_the_bit(work, image, on_a_mesh):
    mesh = make_mesh(MeshConfig(fsdp=1)) if on_a_mesh else None

    def load(folder: Path, adapter: str | None = None):
        return mis_jax.load(folder, adapter=adapter, dtype="float32", mesh=mesh)

    ours, processor = load(BASE_MODEL, str(work / "adapter"))
    batch = processor([[{"role": "user", "content": QUESTION}]], [[image]])

    @jax.jit
    def logits(values):
        return nnx_state.build(ours.config, values)(batch)

    values, merged, base = (
        nnx_state.flat(model) for model in (ours, load(work / "merged")[0], load(BASE_MODEL)[0])
    )
    for name, value in values.items():
        assert np.asarray(value).tobytes() == np.asarray(merged[name]).tobytes(), name
    found = np.asarray(logits(values))
    assert found.tobytes() == np.asarray(logits(merged)).tobytes()
    assert np.abs(found - logits(base)).max() > 0.1


@pytest.mark.parametrize("options", [[], ["--int8-weights"]])
def test_generate_with_an_adapter_answers_as_the_merged_model(work, image, capsys, options):
    words = ["--prompt", QUESTION, "--image", image, "--max-new-tokens", 4, "--json", *options]
    ours = ran(capsys, "generate", BASE_MODEL, "--adapter", work / "adapter", *words)
    merged = ran(capsys, "generate", work / "merged", *words)
    assert ours[0] == 0 and ours[1] == merged[1]
    assert json.loads(ours[1])["text"] != "a banana"  # what the base answers


def test_the_name_and_the_fingerprint_tell_the_adapter(work, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    assert model_name(BASE_MODEL, adapter) == f"{BASE_MODEL.name}+adapter"
    known = model_fingerprint(BASE_MODEL, adapter)
    assert known == model_fingerprint(BASE_MODEL, work / "adapter")
    assert known not in (
        model_fingerprint(BASE_MODEL),
        model_fingerprint(BASE_MODEL, work / "other"),
    )
    (adapter / "trainer_log.jsonl").write_text("{}\n")  # is no part of the model
    assert model_fingerprint(BASE_MODEL, adapter) == known
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert model_fingerprint(BASE_MODEL, adapter) != known


def test_answers_of_one_adapter_are_not_taken_for_those_of_another(work, tmp_path, capsys):
    (tmp_path / "questions.jsonl").write_text(json.dumps({"id": "q", "prompt": "Hello"}) + "\n")
    words = ["--batch", tmp_path / "questions.jsonl", "--out", tmp_path / "answers.jsonl"]

    def ask(*adapter: object) -> tuple[int, str]:
        found = ran(capsys, "generate", BASE_MODEL, *words, "--max-new-tokens", 2, *adapter)
        return found[0], found[2]

    assert ask("--adapter", work / "adapter")[0] == 0
    assert ask("--adapter", work / "adapter")[0] == 0
    for other in ([], ["--adapter", work / "other"]):
        code, said = ask(*other)
        assert code == 2 and "the answer to 'q' is one to another prompt" in said


def test_a_run_of_eval_belongs_to_one_adapter(work, data, tmp_path, capsys):
    words = ["eval", BASE_MODEL, *words_of("eval", data, tmp_path / "run"), "--limit", 1]
    assert ran(capsys, *words, "--adapter", work / "adapter")[0] == 0
    said = json.loads((tmp_path / "run" / "manifest.json").read_text())["model"]
    assert said["name"] == f"{BASE_MODEL.name}+adapter"
    assert said["fingerprint"] == model_fingerprint(BASE_MODEL, work / "adapter")
    code, _, error = ran(capsys, *words, "--adapter", work / "other")
    assert code == 2 and "answers of two models do not mix" in error


def test_a_server_is_called_by_both_names(work, capsys, monkeypatch):
    from mis_jax.server import run

    seen = []
    monkeypatch.setattr(
        run, "serve", lambda network, processor, settings, *_, **__: seen.append(settings)
    )
    words = ["serve", BASE_MODEL, "--port", 0, "--adapter", work / "adapter"]
    assert ran(capsys, *words)[0] == ran(capsys, *words, "--name", "mine")[0] == 0
    assert [settings.model for settings in seen] == [f"{BASE_MODEL.name}+adapter", "mine"]


@pytest.mark.parametrize("verb", VERBS)
def test_an_adapter_that_does_not_fit_is_one_line_and_leaves_nothing(
    verb,
    work,
    data,
    tmp_path,
    capsys,
):
    words = words_of(verb, data, tmp_path / "run")
    said = {
        "unfit": "the adapter must be one of this model",
        "nowhere": "no such folder; give the folder that holds adapter_config.json",
        "merged": "adapter_config.json: no such file; give the folder of an adapter",
    }
    for name, message in said.items():
        code, out, error = ran(capsys, verb, BASE_MODEL, *words, "--adapter", work / name)
        assert code == 2 and out == "" and error.startswith("mis-jax: error: ")
        assert str(work / name) in error and message in error
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_an_adapter_as_the_model_is_told_where_it_belongs(verb, work, data, tmp_path, capsys):
    words = words_of(verb, data, tmp_path / "run")
    code, _, error = ran(capsys, verb, work / "adapter", *words)
    assert code == 2 and "a LoRA adapter, no model; " in error
    assert f"BASE --adapter {work / 'adapter'}" in error


def test_the_folder_of_a_run_as_an_adapter_is_told_where_the_adapter_is(tmp_path, capsys):
    write_adapter(tmp_path / "final")
    code, _, error = ran(capsys, "generate", BASE_MODEL, "--prompt", "Hello", "--adapter", tmp_path)
    assert code == 2 and f"give the folder of an adapter: {tmp_path / 'final'}" in error


def test_an_endpoint_takes_no_adapter(work, data, tmp_path, capsys):
    words = [*words_of("eval", data, tmp_path / "run"), "--model-name", "m"]
    code, _, error = ran(
        capsys, "eval", "http://127.0.0.1:9/v1", *words, "--adapter", work / "adapter"
    )
    assert code == 2 and "--adapter belongs to a checkpoint, not a server" in error
