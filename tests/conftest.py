"""Settings that must hold before the first test module is imported."""

import importlib.util
import os
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Read by torch (and OpenMP) when it loads: the reference network shares the machine with JAX.
os.environ["OMP_NUM_THREADS"] = "2"
# No hidden state of the developer's own in what the command line prints.
os.environ.pop("FORCE_COLOR", None)

import pytest  # noqa: I001

from compilation import mappings_bounded, optimized, remove_cache  # noqa: F401  before mis_jax
import mis_jax  # noqa: F401  before JAX starts a back end, so that its guard acts
from time_report import TimeReport, pytest_addoption  # noqa: F401
from tiny_world import tiny_checkpoint, tiny_data, tiny_processor  # noqa: F401

_HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore = [] if _HAS_TORCH else ["parity"]


def pytest_configure(config: pytest.Config) -> None:
    """Count where the time goes; and let Ctrl-C through.

    A shell starts jobs in the background with SIGINT ignored, which is inherited by every process
    that a test starts.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(TimeReport(config))


def pytest_unconfigure() -> None:
    """Leave no compiled programs behind."""
    remove_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a long one begun last would have one core work alone."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_report_header() -> str:
    """Say which JAX runs, and say it when a part of the tests is left out."""
    import jax

    reference = "" if _HAS_TORCH else "; torch is not installed: tests/parity is left out"
    return f"jax {jax.__version__} on {os.environ['JAX_PLATFORMS']}{reference}"
