"""What every verb shares: the two consoles, JSON, failures, loading a model."""

import json
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console

Dtype = Literal["float32", "bfloat16", "float16"]
console = Console()
err_console = Console(stderr=True)


class Failed(RuntimeError):
    """The command ran and did not reach its goal: exit code 1."""


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the end."""
    err_console.print(f"mis-jax: error: {message}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(code)


def print_json(content: Any) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(content, ensure_ascii=False))


def load_quietly(path: Path, dtype: str | None):
    """Model and processor; float32 on a CPU, whose bf16 products of one row are very slow."""
    import jax

    from mis_jax.api import load
    from mis_jax.terminal import bytes_bar

    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    with bytes_bar(err_console) as bar:
        return load(path, dtype=dtype, progress=bar.task("reading tensors"))
