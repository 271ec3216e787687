"""What is set before JAX starts: the guard against wrong sums, and quiet where no TPU is."""

import glob
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from mis_jax import _xla

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
SAFE = f"{FLAG}=-reduce"

# Row i holds (i, 0, 0), so its sum of squares is i * i; jax issue 39103 reports the last row wrong.
SUM_OF_SQUARES = """
import jax.numpy as jnp

numbers = jnp.arange(32769, dtype=jnp.float32)
rows = jnp.stack([numbers, 0 * numbers, 0 * numbers], axis=1)
sums = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
assert jnp.allclose(sums, numbers**2, rtol=1e-6), "some rows are wrong"
print(int(sums[-1]))
"""


@pytest.mark.parametrize(
    ("jaxlib", "affected"),
    [
        ("0.9.2", False),
        ("0.10.0", False),
        ("0.10.1", False),
        ("0.10.2", True),
        ("0.10.10", True),
        ("0.11.0", True),
        ("0.11.2.dev20260901", True),
        ("0.12.0", False),
        ("0.12.0.1", False),
        ("1.0.0", False),
    ],
)
def test_which_jaxlibs_are_affected(jaxlib: str, affected: bool) -> None:
    assert _xla.is_affected(jaxlib) is affected


@pytest.mark.parametrize(
    ("jaxlib", "before", "after"),
    [
        ("0.10.2", None, SAFE),
        ("0.10.2", "--xla_other=1", f"--xla_other=1 {SAFE}"),
        ("0.10.2", SAFE, SAFE),
        ("0.10.2", f"{FLAG}=+dot", f"{FLAG}=+dot"),  # the user's own choice stands
        ("0.10.2", f"{FLAG}=", f"{FLAG}="),
        ("0.12.0", None, None),
        ("0.12.0", "--xla_other=1", "--xla_other=1"),
    ],
)
def test_what_the_guard_does_to_the_flags(
    monkeypatch: pytest.MonkeyPatch, jaxlib: str, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(_xla, "version", lambda _: jaxlib)
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    _xla.guard_cpu_reductions()
    assert os.environ.get("XLA_FLAGS") == after


def _fresh_python(program: str, **environment: str) -> str:
    """What a new interpreter prints; it inherits nothing of how these tests compile."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == "JAX_PLATFORMS" or not name.startswith(("XLA_", "JAX_"))
    }
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import mis_jax, jax",
        "import jax, mis_jax",  # the flag counts until the first array is made
        "import mis_jax.model.batch, jax",  # a submodule alone brings the guard too
    ],
)
def test_sums_are_right_after_the_import(imports: str) -> None:
    assert _fresh_python(imports + SUM_OF_SQUARES) == "1073741824"


def test_the_flag_is_set_in_a_fresh_interpreter_only_where_needed() -> None:
    printed = _fresh_python("import mis_jax, os; print(os.environ.get('XLA_FLAGS', ''))")
    assert (SAFE in printed) == _xla.is_affected(version("jaxlib"))


def test_a_users_flag_survives_the_import() -> None:
    program = "import mis_jax, os; print(os.environ['XLA_FLAGS'])"
    assert _fresh_python(program, XLA_FLAGS=f"{FLAG}=") == f"{FLAG}="


@pytest.mark.parametrize(
    ("libtpu", "files", "chosen", "after"),
    [
        (True, (), None, "cpu"),
        (False, (), None, None),
        (True, ("/dev/accel*",), None, None),
        (True, ("/dev/vfio/*",), None, None),
        (True, ("/dev/nvidia*",), None, None),
        (True, (), "tpu", "tpu"),  # the user's own choice stands
        (True, (), "", ""),
    ],
)
def test_when_the_cpu_is_chosen(monkeypatch, libtpu, files, chosen, after) -> None:
    monkeypatch.setattr(_xla, "find_spec", lambda name: name if libtpu else None)
    monkeypatch.setattr(_xla.glob, "glob", lambda pattern: ["0"] if pattern in files else [])
    if chosen is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
    _xla.stay_on_cpu()
    assert os.environ.get("JAX_PLATFORMS") == after


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or any(map(glob.glob, _xla._ACCELERATORS)),
    reason="libtpu is not installed (extra tpu), or an accelerator is here",
)
def test_libtpu_says_nothing_where_no_tpu_is() -> None:
    quiet = {
        n: v for n, v in os.environ.items() if n not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")
    }
    program = "import mis_jax, jax; print(jax.devices()[0].platform)"
    finished = subprocess.run(
        [sys.executable, "-c", program], env=quiet, capture_output=True, text=True, timeout=120
    )
    assert (finished.stdout.strip(), finished.stderr) == ("cpu", "")
