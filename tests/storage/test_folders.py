"""Where what is written lies in the end: links, `..`, mount points, and what is refused at once."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_world import run_config

from mis_jax.checkpoint.convert import convert
from mis_jax.checkpoint.load import open_checkpoint, read_checkpoint
from mis_jax.cli.main import main
from mis_jax.storage.files import replace_file, replace_text
from mis_jax.storage.folders import Journal, finished_folder, resumable_folder
from mis_jax.storage.paths import destination_path
from mis_jax.train.trainer import train

BEGUN = []  # the blocks that were entered


def write(destination: Path) -> None:
    with finished_folder(destination) as work:
        BEGUN.append(destination)
        (work / "it").write_text("whole")


def write_resumable(destination: Path) -> None:
    with resumable_folder(destination, {}) as (work, journal):
        BEGUN.append(destination)
        (work / "it").write_text("whole")
        journal.record("it", 1)


WRITERS = [write, write_resumable]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("there", [True, False], ids=["link", "dangling"])
def test_what_is_written_to_a_link_lies_in_its_target(writer, there, tmp_path):
    target = tmp_path / "disk" / "model"
    if there:
        target.mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    writer(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (target / "it").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_circle_of_links_and_a_path_below_a_file_are_refused_before_the_first_byte(
    writer, tmp_path
):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    BEGUN.clear()
    for path, reason in [
        ("a", "is a link to itself; remove it"),
        ("a/out", "is a link to itself; remove it"),
        ("file/out", "file is a file, nothing can be written below it"),
        ("file", "exists already; remove it"),
    ]:
        with pytest.raises(ValueError, match=reason):
            writer(tmp_path / path)
    assert not BEGUN
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "file"}


def test_what_comes_into_the_way_of_finished_work_costs_none_of_it(tmp_path):
    begun = []

    def work_on(destination: Path) -> None:
        with resumable_folder(destination, {"plan": 1}) as (work, journal):
            begun.append(dict(journal.done))
            (work / "it").write_text("whole")
            journal.record("it", 1)
            if len(begun) == 1:
                destination.mkdir()
                (destination / "mine").write_text("mine")

    with pytest.raises(OSError, match=r"out: cannot be put in place \(.*out.incomplete keeps"):
        work_on(tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    shutil.rmtree(tmp_path / "out")
    work_on(tmp_path / "out")
    assert begun == [{}, {"it": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["it"]


MOUNTED = """
import sys
from pathlib import Path
from mis_jax.storage.files import replace_text
from mis_jax.storage.folders import Journal, finished_folder
from mis_jax.storage.paths import destination_path
for name in sys.argv[1:]:
    try:
        with finished_folder(Path(name)):
            print("begun")
    except ValueError as error:
        print(error)
"""


def test_a_mount_point_is_refused_before_the_first_byte(tmp_path):
    """Also one of the same disk, which has the device number of the folder around it."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("mounting needs user namespaces")
    for name in ("other disk", "same disk", "from"):
        (tmp_path / name).mkdir()
    mounts = "mount -t tmpfs none 'other disk' && mount --bind from 'same disk' && exec \"$@\""
    words = ["unshare", "-rm", "sh", "-c", mounts, "sh", sys.executable, "-c", MOUNTED]
    ended = subprocess.run(
        [*words, "other disk", "same disk"], cwd=tmp_path, capture_output=True, text=True
    )
    lines = ended.stdout.splitlines()
    assert len(lines) == 2, ended.stderr
    assert all("is a mount point" in line and "give a folder inside it" in line for line in lines)
    assert lines[0].startswith("destination other disk")


def test_a_file_that_is_replaced_through_a_link_leaves_the_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    replace_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "new"


def test_a_report_through_a_dangling_link_lies_in_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "report")
    replace_text(tmp_path / "link" / "report.md", "figures")
    assert (tmp_path / "disk" / "report" / "report.md").read_text() == "figures"


def test_two_dots_are_resolved_through_links(tmp_path, monkeypatch):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    monkeypatch.chdir(tmp_path / "disk")
    assert destination_path("../link/../x") == tmp_path / "disk" / "x"


def test_native_checkpoints_are_written_and_read_at_paths_with_two_dots(
    tiny_checkpoint, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(open_checkpoint(tiny_checkpoint), Path("../native"), "native")
    before, after = read_checkpoint(tiny_checkpoint), read_checkpoint(Path("../native"))
    assert all(np.array_equal(after.arrays[name], x) for name, x in before.arrays.items())
    main(["inspect", "../native"])  # ends with 1 where something is wrong


def test_a_run_ends_with_its_model_where_output_has_two_dots_or_is_a_link(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "link").symlink_to("real")
    for output in ("../run", "../link"):
        config = run_config(tiny_checkpoint, tiny_data, Path(output), train__steps=1)
        read_checkpoint(train(config).model)
    assert (tmp_path / "real" / "final").is_dir() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("verb", ["report", "merge", "eval", "generate", "quickstart"])
def test_verbs_refuse_an_output_below_a_file_at_once(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("asked.jsonl").write_text("")
    words = {
        "report": ["report", "run", "--out", "file/out"],
        "merge": ["merge", "file/out", "run", "run"],
        "eval": ["eval", "m", "--benchmarks", "mini_easy", "--data-root", ".", "--out", "file/out"],
        "generate": ["generate", "m", "--batch", "asked.jsonl", "--out", "file/out.jsonl"],
        "quickstart": ["quickstart", "--out", "file/out"],
    }[verb]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "file is a file, nothing can be written below it" in capsys.readouterr().err


def test_a_torn_journal_is_cut_in_place_so_that_a_kill_leaves_no_stray_file(tmp_path, monkeypatch):
    """A copy beside it, which a kill would leave there, would lie in the finished folder."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    inode = path.stat().st_ino
    assert Journal(path).done == {"a": 1}
    assert path.read_bytes() == b'{"a": 1}\n' and path.stat().st_ino == inode
