"""A native checkpoint carries the digest of every file: what is not as written is not believed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import random_checkpoint, tiny_config

import mis_jax
from mis_jax.checkpoint import native as module
from mis_jax.checkpoint.convert import convert, write_checkpoint
from mis_jax.checkpoint.inspect import inspect_checkpoint
from mis_jax.checkpoint.load import load, open_checkpoint, read_checkpoint
from mis_jax.checkpoint.native import DIGESTS
from mis_jax.cli.main import main
from mis_jax.quickstart import BASE_MODEL
from mis_jax.storage.folders import NOTICE
from mis_jax.storage.hashing import changed_files, file_digest
from mis_jax.storage.paths import files_below

REFUSED = r"is not what was saved; restore it from a copy or convert"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "model"
    convert(open_checkpoint(BASE_MODEL), folder, "native")
    return folder


@pytest.fixture
def native(written, tmp_path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def chunk(folder: Path, name: str) -> Path:
    return next(p for p in sorted((folder / "params" / name).iterdir()) if p.name[0].isdigit())


def test_every_file_has_its_digest(written):
    saved = json.loads((written / DIGESTS).read_text())
    assert saved == {n: file_digest(written / n) for n in files_below(written) if n != DIGESTS}
    assert not {NOTICE, "journal.jsonl"} & saved.keys()
    assert inspect_checkpoint(written)["problems"] == []


@pytest.mark.parametrize(
    "name", ["text.embedding", "text.layers.block.gate.kernel", "projector.norm.scale"]
)
def test_a_flipped_byte_is_refused_by_every_reader(name, native, tmp_path, capsys):
    path = chunk(native, name)
    flip(path)
    with pytest.raises(ValueError, match=rf"{path.name}: {REFUSED}"):
        mis_jax.load(native)
    with pytest.raises(ValueError, match=REFUSED):
        convert(open_checkpoint(native), tmp_path / "out", "hf")
    for words in (["verify", str(BASE_MODEL), str(native)], ["inspect", str(native)]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code
        said = capsys.readouterr()
        assert "is not what was" in " ".join((said.out + said.err).split())


def test_the_comparison_can_be_switched_off(native):
    flip(chunk(native, "text.embedding"))
    load(open_checkpoint(native, check_digests=False))
    mis_jax.load(native, check_digests=False)
    assert inspect_checkpoint(native, check_digests=False)["problems"] == []


def test_a_flipped_byte_beside_the_chunks_is_seen(native, caplog):
    """The arrays' own files are refused; what people edit is warned of, and told by inspect."""
    (native / "config.json").write_text((native / "config.json").read_text() + "\n")
    read_checkpoint(native)
    assert "config.json: is not what was saved; was it edited?" in caplog.text
    (problem,) = inspect_checkpoint(native)["problems"]
    assert problem == f"{native / 'config.json'}: is not what was saved"
    path = native / "params" / "text.embedding" / ".zarray"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r".zarray: is not what was saved; restore it"):
        open_checkpoint(native)


def test_a_checkpoint_of_an_earlier_version_opens(native):
    (native / DIGESTS).unlink()
    found = inspect_checkpoint(native)
    assert found["problems"] == [] and found["digests"] == "none"
    read_checkpoint(native)


def test_digests_that_are_none_are_refused(native):
    for text in ("{", "[]", '{"config.json": 3}'):
        (native / DIGESTS).write_text(text)
        with pytest.raises(ValueError, match=r"digests.json: "):
            open_checkpoint(native)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd"])
def test_digests_name_no_file_outside_the_folder(native, name):
    """A downloaded list must not make a reader read the rest of the disk."""
    (native.parent / "elsewhere").write_text("not a part of it")
    path = native / DIGESTS
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "0" * 64}))
    with pytest.raises(ValueError, match=r"digests\.json: not a list of digests"):
        open_checkpoint(native)
    assert changed_files(native, {name: file_digest(native / name)}) != []  # of a run's, too


def test_an_export_does_not_carry_the_digests_of_its_source(native, tmp_path):
    for kind in ("native", "internvl"):
        convert(open_checkpoint(native), tmp_path / kind, kind)
        assert (tmp_path / kind / DIGESTS).exists() == (kind == "native")
        assert inspect_checkpoint(tmp_path / kind)["problems"] == []


def test_a_process_compares_what_it_reads_alone(tmp_path, rng, monkeypatch):
    """A slice costs its own chunks, once, however often it is asked for."""
    monkeypatch.setattr(module, "_CHUNK", 4096)
    start = random_checkpoint(tiny_config("qwen2"), rng, tmp_path / "start", "float32")
    write_checkpoint(start, tmp_path / "model", "native")
    hashed = []
    real = module.bytes_digest
    monkeypatch.setattr(module, "bytes_digest", lambda x: hashed.append(len(x)) or real(x))
    source = open_checkpoint(tmp_path / "model").weights
    assert not hashed
    first = source.read("text.embedding", None, slice(0, 1))
    source.read("text.embedding", None, slice(0, 1))
    assert hashed == [len(chunk(tmp_path / "model", "text.embedding").read_bytes())]
    assert np.array_equal(first, start.arrays["text.embedding"][:1])
