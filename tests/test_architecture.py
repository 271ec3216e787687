"""Rules of the house that no linter knows: who may import what, file sizes, nothing unsafe."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mis_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600

# What as a whole needs the extra of this name; everything else works without it.
NEEDS = {"server/": "serve", "cli/lmms_eval_model.py": "lmms-eval"}

# Distributions whose import name is not their own name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "orbax": "orbax-checkpoint",
    "jaxlib": "jax",
    "pydantic_core": "pydantic",
    "google": "protobuf",
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _defines(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of every module that the code imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def _importers(package: str) -> set[str]:
    return {
        _name(path)
        for path in SOURCES
        if any(module.split(".")[0] == package for module in _imported(_tree(path)))
    }


def test_the_sources_are_found() -> None:
    assert {"mis_jax/__init__.py", "mis_jax/model/internvl.py"} <= {_name(p) for p in SOURCES}


def test_no_file_is_too_long() -> None:
    lengths = {_name(path): path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_only_storage_touches_orbax() -> None:
    assert _importers("orbax") == {"mis_jax/checkpoint/train_state.py"}


@pytest.mark.parametrize(
    "package", ["torch", "torchvision", "tensorflow", "pickle", "dill", "cloudpickle", "shelve"]
)
def test_never_imported(package: str) -> None:
    assert _importers(package) == set()


def test_the_model_knows_no_files_and_no_tokenizers() -> None:
    outside = {
        "PIL", "etils", "grain", "io", "json", "orbax", "os", "pathlib", "safetensors",
        "sentencepiece", "shutil", "tempfile", "tokenizers", "transformers", "yaml",
    }  # fmt: skip
    found = {
        f"{_name(path)}: {module}"
        for path in SOURCES
        if path.is_relative_to(PACKAGE / "model")
        for module in _imported(_tree(path))
        if module.split(".")[0] in outside
    }
    assert found == set()


def _calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call))


def _unsafe(call: ast.Call) -> str | None:
    """Why the call could run code out of a file that came with a checkpoint or a data set."""
    for word in call.keywords:
        given = word.value.value if isinstance(word.value, ast.Constant) else "?"
        if word.arg == "trust_remote_code" and given is not False:
            return "trust_remote_code"
        if word.arg == "allow_pickle" and given is not False:
            return "allow_pickle"
    name = ast.unparse(call.func)
    if name in {"eval", "exec"} or re.fullmatch(r"(torch|pickle)\.loads?", name):
        return name
    if name in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
        return f"{name}; yaml.safe_load reads data alone"
    return None


@pytest.mark.parametrize(
    "call",
    [
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=trust)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "pickle.loads(data)",
        "yaml.load(text, Loader)",
        "eval(text)",
    ],
)
def test_the_search_for_unsafe_calls_finds_them(call: str) -> None:
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call)
    assert _unsafe(node)


def test_no_call_can_run_code_from_a_file() -> None:
    found = {
        f"{_name(path)}:{call.lineno}: {reason}"
        for path in SOURCES
        for call in _calls(path)
        if (reason := _unsafe(call))
    }
    assert found == set()


def test_every_image_is_opened_in_an_allowed_format() -> None:
    """Without `formats` Pillow opens 43, some of which run programs."""
    open_calls = [
        (f"{_name(path)}:{call.lineno}", {word.arg for word in call.keywords})
        for folder in (PACKAGE, ROOT / "tools", ROOT / "benchmarks")
        for path in sorted(folder.rglob("*.py"))
        for call in _calls(path)
        if ast.unparse(call.func) in {"Image.open", "PIL.Image.open"}
    ]
    assert {where.partition(":")[0] for where, _ in open_calls} >= {"mis_jax/data/images.py"}
    assert [where for where, words in open_calls if "formats" not in words] == []


# What opens, writes, moves or removes a file: storage/ alone does.
_FILE_METHODS = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "rename",
    "rmdir", "touch", "symlink_to", "hardlink_to",
}  # fmt: skip
_FILE_FUNCTIONS = re.compile(
    r"open|io\.open|os\.(open|replace|rename|renames|remove|unlink|rmdir|mkdir|makedirs|truncate|"
    r"fsync|link|symlink)|(shutil|tempfile)\.\w+|mmap\.mmap|"
    r"np\.(load|save|savez|savez_compressed|memmap|fromfile|tofile)"
)
# Not files: an image in memory (its file was opened by storage/), arrays of tensorstore, a stream
# to a client.
_NO_FILES = {"Image.open", "tensorstore.open"}


def _touches_files(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    if name in _NO_FILES:
        return None
    method = isinstance(call.func, ast.Attribute) and call.func.attr in _FILE_METHODS
    return name if method or _FILE_FUNCTIONS.fullmatch(name) else None


@pytest.mark.parametrize(
    "call",
    ["open(path)", "path.open('a')", "Path(out).write_text('')", "os.replace(a, b)",
     "np.savez(file, a=a)", "shutil.rmtree(out)", "(out / 'a').mkdir()", "tempfile.mkstemp()"],
)  # fmt: skip
def test_the_search_for_file_access_finds_it(call: str) -> None:
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call)
    assert _touches_files(node)


def test_only_storage_opens_writes_moves_and_removes_files() -> None:
    outside = {
        f"{_name(path)}:{call.lineno}: {name}"
        for path in SOURCES
        if not path.is_relative_to(PACKAGE / "storage")
        for call in _calls(path)
        if (name := _touches_files(call))
    }
    assert outside == set()


def _plain(requirement: str) -> str:
    """'Etils[epath]>=1.13' -> 'etils', with the dashes of the index."""
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _declared() -> set[str]:
    return {_plain(requirement) for requirement in _project()["dependencies"]}


def _optional(extra: str | None = None) -> set[str]:
    """Distributions of one extra, or of all that a user installs; `dev` is for this repository."""
    extras = _project()["optional-dependencies"]
    names = {extra} if extra else extras.keys() - {"dev"}
    return {_plain(line) for name in names for line in extras[name]}


def _undeclared(modules: Iterator[str], declared: set[str]) -> set[str]:
    return {
        module
        for module in modules
        if (top := module.split(".")[0]) != "mis_jax"
        and top not in sys.stdlib_module_names
        and _plain(DISTRIBUTIONS.get(top, top)) not in declared
    }


def _needed(path: Path) -> set[str]:
    inside = path.relative_to(PACKAGE).as_posix()
    extras = [extra for start, extra in NEEDS.items() if inside.startswith(start)]
    return {name for extra in extras for name in _optional(extra)}


def test_every_import_is_a_declared_dependency() -> None:
    """An extra may be imported too, but only inside a function: without it the module loads.

    Not so in `NEEDS`; what is there is imported by nothing else, or in a function.
    """
    core, optional, missing = _declared(), _optional(), set()
    for path in SOURCES:
        tree = _tree(path)
        top_level = ast.Module([node for node in tree.body if not _defines(node)], [])
        at_top = core | _needed(path)
        wrong = _undeclared(_imported(top_level), at_top)
        wrong |= _undeclared(_imported(tree), core | optional)
        missing |= {f"{_name(path)}: {module}" for module in wrong}
    assert missing == set()


def test_only_the_command_knows_the_server() -> None:
    """Without the extra `serve` everything else works; inside a function, the command may ask."""
    importers = {
        _name(path)
        for path in SOURCES
        if not path.is_relative_to(PACKAGE / "server")
        and any(module.startswith("mis_jax.server") for module in _imported(_tree(path)))
    }
    assert importers == {"mis_jax/cli/serving.py"}
    top_level = [node for node in _tree(PACKAGE / "cli/serving.py").body if not _defines(node)]
    assert not any(m.startswith("mis_jax.server") for m in _imported(ast.Module(top_level, [])))


def test_only_lmms_eval_loads_its_model() -> None:
    """By the entry point in pyproject.toml; where lmms-eval is not installed nothing misses it."""
    assert _importers("lmms_eval") == {"mis_jax/cli/lmms_eval_model.py"}
    imported = {module for path in SOURCES for module in _imported(_tree(path))}
    assert "mis_jax.cli.lmms_eval_model" not in imported


def test_constraints_hold_every_dependency_and_no_address() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    wrong = [
        line
        for line in lines
        if not re.fullmatch(r'[A-Za-z0-9_.-]+==[0-9a-z.]+( ; python_version < "3\.12")?', line)
    ]
    assert wrong == []
    assert _declared() <= {_plain(line) for line in lines}


def test_the_import_starts_no_jax_back_end() -> None:
    program = (
        "import mis_jax, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "print(mis_jax.__version__)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", finished.stdout.strip())
