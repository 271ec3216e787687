"""README and docs against what they describe: commands, make targets, links, the Python example."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from mis_jax.mini import files, world

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TWO_WORD_VERBS = {"data"}


@dataclass(frozen=True)
class Command:
    """One shown command: the page and line it stands in, and its words after `mis-jax`."""

    where: str
    words: tuple[str, ...]

    @property
    def verb(self) -> tuple[str, ...]:
        return self.words[: 2 if self.words[0] in TWO_WORD_VERBS else 1]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(word.split("=")[0] for word in self.words if word.startswith("--"))


def _fenced(page: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, language, line) of every line inside a fenced block."""
    language: str | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if fence := re.match(r"\s*```(\w*)", line):
            language = fence[1] if language is None else None
        elif language is not None:
            yield number, language, line


def _shown(page: Path, program: str) -> Iterator[tuple[int, str]]:
    """(line number, rest of the command) of every `$ program ...` in a console block."""
    for number, language, line in _fenced(page):
        if language == "console" and line.startswith(f"$ {program} "):
            assert not line.endswith("\\"), f"{page.name}:{number}: keep a command on one line"
            yield number, line.removeprefix(f"$ {program} ")


def _commands() -> list[Command]:
    found = [
        Command(f"{page.name}:{number}", tuple(shlex.split(rest)))
        for page in PAGES
        for number, rest in _shown(page, "mis-jax")
    ]
    # The README's table of verbs names commands too.
    table = re.findall(r"^\| `mis-jax ([^`]+)` \|", README.read_text(encoding="utf-8"), re.M)
    return found + [Command("README.md table", tuple(shlex.split(rest))) for rest in table]


COMMANDS = _commands()


@cache
def _help(verb: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and text of `mis-jax VERB --help`, run in this process."""
    import contextlib
    import io

    from mis_jax.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main([*verb, "--help"])
    code = stopped.value.code
    return code if isinstance(code, int) else 0 if code is None else 1, printed.getvalue()


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_the_docs_show_every_verb() -> None:
    shown = {" ".join(command.verb) for command in COMMANDS}
    assert shown == {
        "quickstart", "convert", "inspect", "verify", "data build", "data show", "train",
        "plan", "generate", "chat", "serve", "eval", "judge", "merge", "report",
    }  # fmt: skip


@pytest.mark.parametrize("verb", sorted({command.verb for command in COMMANDS}), ids=" ".join)
def test_every_shown_verb_has_help_with_an_example(verb: tuple[str, ...]) -> None:
    code, text = _help(verb)
    assert code == 0
    assert f"mis-jax {' '.join(verb)}" in text


def test_every_shown_option_exists() -> None:
    unknown = []
    for command in COMMANDS:
        _, text = _help(command.verb)
        known = set(re.findall(r"--[a-z][a-z0-9.-]*", text))
        if left := set(command.options) - known:
            unknown.append((command.where, command.verb, left))
    assert unknown == []


def test_every_shown_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    shown = {
        word
        for page in PAGES
        for _, rest in _shown(page, "make")
        for word in shlex.split(rest)
        if "=" not in word
    }
    assert {"quickstart", "test"} <= shown <= targets


def test_the_readme_starts_with_the_two_commands() -> None:
    lines = [line for _, language, line in _fenced(README) if language == "console"]
    assert lines[:2] == ["$ make quickstart", "$ make test"]


def test_links_to_files_lead_somewhere() -> None:
    gone = [
        (page.name, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not link.startswith(("http://", "https://")) and not (page.parent / link).exists()
    ]
    assert gone == []


def test_the_mini_world_is_described_as_it_is() -> None:
    text = (ROOT / "docs" / "mini-world.md").read_text(encoding="utf-8")
    assert f"{len(world.OBJECTS)} household objects" in text
    table = dict(re.findall(r"^\| (\w+) \| ([a-z ,⚠]+) \|$", text, re.M))
    for kind in world.KINDS:
        things = [thing for thing in world.OBJECTS.values() if thing.kind == kind]
        assert table[kind] == ", ".join(t.name + " ⚠" * t.alarming for t in things)
    for file, rows in {
        "mini_train.json": files.TRAIN_ROWS,
        "general.jsonl": files.GENERAL_ROWS,
        "mini_easy.json": files.EASY_ROWS,
        "mini_hard.json": files.HARD_ROWS,
        "mini_benign.json": files.BENIGN_ROWS,
        "mini_recognition.json": files.RECOGNITION_ROWS,
    }.items():
        assert f"| `{file}` | {rows:,} |" in text
    for name, pairs in (("mini_hard", world.PAIRS.test_hard), ("mini_easy", world.PAIRS.test_easy)):
        assert re.search(rf"`{name}` (are drawings )?of {len(pairs)}\b", text)


def test_every_example_configuration_is_accepted(tmp_path: Path) -> None:
    from mis_jax.config import load_config

    page = ROOT / "docs" / "train.md"
    text = "\n".join(line for _, language, line in _fenced(page) if language == "yaml")
    _, *examples = re.split(r"^(?=model:)", text, flags=re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        path = tmp_path / "run.yaml"
        path.write_text(example, encoding="utf-8")
        load_config(path)


def test_every_shown_configuration_file_is_shipped() -> None:
    shown = {word for command in COMMANDS for word in command.words if word.startswith("configs/")}
    assert shown
    assert {name for name in shown if not (ROOT / name).is_file()} == set()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(f[1] == "python" for f in _fenced(page))], ids=str
)
def test_python_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from mis_jax.mini.icons import draw_scene

    example = "\n".join(line for _, language, line in _fenced(page) if language == "python")
    assert "mis_jax" in example
    for place, name in (("first", "toaster"), ("second", "bathtub")):
        draw_scene(name, np.random.default_rng(0)).save(tmp_path / f"{place}.png")
    monkeypatch.chdir(tmp_path)  # as where the package is installed, no checkout is in sight
    exec(compile(example, str(page), "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip() or "print(" not in example


def test_shown_scripts_take_the_shown_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [rest for page in PAGES for _, rest in _shown(page, "python")]
    assert shown
    monkeypatch.chdir(tmp_path)
    for rest in shown:
        script, *words = shlex.split(rest)
        command = [sys.executable, str(ROOT / script), *words]
        subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "small" / "config.json").is_file()
