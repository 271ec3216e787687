"""A conversion that is killed goes on where it was, and ends with the same bytes."""

import contextlib
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from tiny_models import random_checkpoint, tiny_config

from mis_jax.checkpoint.convert import convert, write_checkpoint
from mis_jax.checkpoint.load import open_checkpoint, read_checkpoint
from mis_jax.storage.folders import NOTICE, Journal

KILLS = 10


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Some 100 MB in several shards: a conversion that takes a noticeable time."""
    import numpy as np

    folder = tmp_path_factory.mktemp("interrupted")
    config = tiny_config(
        "internlm2", hidden_size=512, num_layers=12, mlp_size=1536, vocab_size=4000
    )
    start = random_checkpoint(config, np.random.default_rng(0), folder / "start", "float32")
    write_checkpoint(start, folder / "source", "internvl", shard_bytes=30_000_000)
    return folder / "source"


def child(source: Path, destination: Path, kind, started) -> None:
    """What the killed process does; it tells when values begin to flow."""
    convert(open_checkpoint(source), destination, kind, progress=lambda *_: started.set())


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "hf", "internvl"])
def test_killed_at_random_moments(kind, source, tmp_path):
    seed = random.randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)
    began = time.perf_counter()
    convert(open_checkpoint(source), tmp_path / "unbroken", kind)
    seconds = time.perf_counter() - began
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mis_jax.checkpoint.load", "mis_jax.checkpoint.convert"])
    destination, unfinished = tmp_path / "out", tmp_path / "out.incomplete"
    kills, before = 0, 0
    while kills < KILLS:
        started = context.Event()
        process = context.Process(target=child, args=(source, destination, kind, started))
        process.start()
        assert started.wait(60)
        process.join(moments.uniform(0, 0.4 * seconds))
        process.kill()
        process.join()
        if destination.exists():  # it was faster: once more from the beginning
            assert tree(destination) == tree(tmp_path / "unbroken")
            for path in sorted(destination.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            destination.rmdir()
            before = 0
            continue
        assert process.exitcode == -9
        kills += 1
        if not (unfinished / "journal.jsonl").exists():
            if before:  # between the last byte and the renaming
                present = tree(unfinished)
                present.pop(NOTICE, None)  # it goes after the journal
                assert present == tree(tmp_path / "unbroken")
            before = 0
            continue
        with pytest.raises(ValueError, match="not finished: run the same mis-jax command again"):
            read_checkpoint(unfinished)
        done = len(Journal(unfinished / "journal.jsonl").done)
        assert done >= before  # nothing is done twice
        before = done
    convert(open_checkpoint(source), destination, kind)
    assert tree(destination) == tree(tmp_path / "unbroken")
    assert not unfinished.exists()


def interrupted(source: Path, destination: Path, kind="hf", after: int = 20, **options) -> None:
    """Stop a conversion after some pieces."""

    def stop(done: int, total: int) -> None:
        if next(pieces) == after:
            raise KeyboardInterrupt

    pieces = iter(range(10**6))
    with contextlib.suppress(KeyboardInterrupt):
        convert(open_checkpoint(source), destination, kind, progress=stop, **options)
    assert not destination.exists()


def first_progress(source: Path, destination: Path, kind="hf", **options) -> int:
    """Bytes that were done already when a conversion goes on."""
    seen: list[int] = []
    convert(
        open_checkpoint(source), destination, kind, progress=lambda d, _: seen.append(d), **options
    )
    return seen[0]


def test_goes_on_after_an_interrupt(source, tmp_path):
    interrupted(source, tmp_path / "out")
    assert first_progress(source, tmp_path / "out") > 0


def test_other_options_start_again(source, tmp_path):
    interrupted(source, tmp_path / "out")
    assert first_progress(source, tmp_path / "out", dtype="bfloat16") == 0


def test_pieces_of_an_earlier_version_start_again(source, tmp_path, monkeypatch):
    """Up to version 3 the sums of an adapter were rounded to the dtype of the base."""
    with monkeypatch.context() as earlier:
        earlier.setattr("mis_jax.checkpoint.convert._PLAN_VERSION", 3)
        interrupted(source, tmp_path / "out")
    assert first_progress(source, tmp_path / "out") == 0


def test_a_changed_source_starts_again(source, tmp_path):
    interrupted(source, tmp_path / "out")
    shard = sorted(source.glob("*.safetensors"))[0]
    os.utime(shard)
    assert first_progress(source, tmp_path / "out") == 0


def test_another_boot_starts_again(source, tmp_path, monkeypatch):
    """After a crash of the machine, pages that the journal tells of may never have been written."""
    interrupted(source, tmp_path / "out")
    monkeypatch.setattr("mis_jax.storage.folders.boot_id", lambda: "another")
    assert first_progress(source, tmp_path / "out") == 0


def test_a_line_cut_short_does_not_count(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": true}\n{"b": tr')
    journal = Journal(path)
    assert journal.done == {"a": True}
    journal.record("c", False)
    assert Journal(path).done == {"a": True, "c": False}


def test_the_folder_says_that_it_is_not_finished(source, tmp_path):
    interrupted(source, tmp_path / "out")
    notice = json.loads((tmp_path / "out.incomplete" / NOTICE).read_text())
    assert "not finished" in notice["incomplete"]
    assert notice["plan"]["format"] == "hf"
    assert not (tmp_path / "out.incomplete" / "config.json").exists()


def test_two_at_once_are_refused(source, tmp_path):
    context = multiprocessing.get_context("forkserver")
    started = context.Event()
    process = context.Process(target=child, args=(source, tmp_path / "out", "hf", started))
    process.start()
    assert started.wait(60)
    os.kill(process.pid, 19)  # SIGSTOP: it holds the folder
    try:
        told = rf"another process is writing it \(process {process.pid} on host "
        with pytest.raises(ValueError, match=told):
            convert(open_checkpoint(source), tmp_path / "out", "hf")
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize("damage", ["deleted", "cut short", "zeros"])
def test_a_journal_is_believed_only_where_its_bytes_are_still_there(kind, damage, source, tmp_path):
    """A piece that was removed or spoilt since its line was written is written again."""
    convert(open_checkpoint(source), tmp_path / "unbroken", kind)
    interrupted(source, tmp_path / "out", kind)
    work = tmp_path / "out.incomplete"
    done = json.loads((work / "journal.jsonl").read_text().splitlines()[0])
    if kind == "native":
        name, layer = next(iter(done)).split()[:2]
        chunks = [p for p in (work / "params" / name).iterdir() if not p.name.startswith(".")]
        path = min(chunks, key=lambda p: (not p.name.startswith(f"{layer}."), p.name))
    else:
        path = min(work.glob("*.safetensors"))
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(content[: min(1000, len(content) // 2)])
    else:
        path.write_bytes(content[:100] + bytes(len(content) - 100))
    convert(open_checkpoint(source), tmp_path / "out", kind)
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


@pytest.mark.parametrize("notice", [None, "mine", '{"incomplete": "my own list"}'])
def test_a_folder_of_the_user_that_is_called_incomplete_is_refused(notice, source, tmp_path):
    work = tmp_path / "out.incomplete"
    work.mkdir()
    (work / "thesis.tex").write_text("years of work")
    if notice:
        (work / NOTICE).write_text(notice)
    before = tree(work)
    with pytest.raises(ValueError, match=r"out.incomplete: exists and is not .* of mis-jax"):
        convert(open_checkpoint(source), tmp_path / "out", "hf")
    assert tree(work) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.incomplete"]


def test_a_kill_just_before_the_renaming_is_gone_on_from(source, tmp_path):
    """The notice stands beside the folder for that moment, and the folder is still known."""
    interrupted(source, tmp_path / "out")
    (tmp_path / "out.incomplete" / NOTICE).rename(tmp_path / f".out.{NOTICE}")
    assert first_progress(source, tmp_path / "out") > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_destination_in_a_bucket_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for scheme in ("gs", "s3", "hdfs"):
        with pytest.raises(ValueError, match=rf"destination {scheme}://b/out: {scheme}:// paths"):
            convert(open_checkpoint(source), Path(f"{scheme}://b/out"), "hf")
    assert not list(tmp_path.iterdir())
