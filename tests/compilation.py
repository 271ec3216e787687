"""How the tests compile: plainly, and equal programs once a run. Import this before JAX.

Compiling was half of the suite's time. The environment set here reaches pytest-xdist's processes
and those that tests start.

* One persistent cache for the run, in a new folder, so that nothing stale is believed.
* Without most of XLA's optimizations, and without the CPU's fusion emitters: a prefill and a decode
  step of the engine take 3.4 s of a core as users compile them, 0.8 s so. Tests that hold numbers
  against a reference of ours or another's, or a command as a user runs it, ask for `optimized`.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # of pytest-xdist; it inherits what is set here
#: The CPU compiler's defaults and what tests choose. XLA aborts on flags it does not know, so they
#: are given only to the releases that they were tried with.
_DEFAULTS = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
_PLAIN = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_HAS_FLAGS = version("jaxlib").startswith("0.10.")
#: Linux allows a process 65,530 mappings of memory, and every compiled program takes some: beyond
#: that the process dies with a segmentation fault wherever it asks for the next one.
_MAX_MAPPINGS = 25_000

if not IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mis-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if _HAS_FLAGS:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_PLAIN}".strip()


@pytest.fixture(autouse=True, scope="module")
def mappings_bounded() -> Iterator[None]:
    """Drop compiled programs before they fill the process."""
    yield
    with open("/proc/self/maps", "rb") as maps:
        count = sum(1 for _ in maps)
    if count > _MAX_MAPPINGS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Compile as users do, here and in processes that the test starts."""
    import jax
    from jax._src import compiler  # flags are read once a process; only here can they change

    setting, compile_options = "jax_disable_most_optimizations", compiler.get_compile_options

    def options(*words: Any, env_options_overrides: dict | None = None, **more: Any) -> Any:
        overrides = {**(env_options_overrides or {}), **(_DEFAULTS if _HAS_FLAGS else {})}
        return compile_options(*words, env_options_overrides=overrides, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        patch.delenv(setting.upper())
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(_PLAIN, ""))
        jax.clear_caches()
        jax.config.update(setting, False)
        yield
        jax.config.update(setting, True)
        jax.clear_caches()


def remove_cache() -> None:
    """The programs of this run serve no other."""
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
