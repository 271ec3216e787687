"""Where the suite's time goes: seconds per area and file, and tests that break the budget.

A plugin of pytest, registered by conftest.py. Every phase of a test carries its own figures to the
process that prints the summary, so that it works under pytest-xdist too.
"""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: A test that takes longer and is not marked slow is named in the summary.
BUDGET_SECONDS = 10.0
_COLUMNS = ("wall", "cpu", "compile", "children")
_COMPILE_EVENT = "/jax/core/compile/"  # tracing, lowering and XLA itself


class TimeReport:
    """Measures every phase of every test; the controlling process adds up and prints."""

    def __init__(self, config: pytest.Config):
        self._by_file = config.getoption("seconds_by_file")
        self._compiling = 0.0
        self._listening = False
        self._imports: dict[Path, float] = {}
        self._files: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._tests: dict[str, float] = defaultdict(float)
        self._slow: set[str] = set()

    def _measure(self) -> dict[str, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "wall": time.perf_counter(),
            "cpu": time.process_time(),
            "compile": self._compiling,
            "children": children.ru_utime + children.ru_stime,
        }

    def _listen(self) -> None:
        """Count JAX's own compile events."""
        if not self._listening:
            import jax

            def add(event: str, seconds: float, **_: Any) -> None:
                if event.startswith(_COMPILE_EVENT):
                    self._compiling += seconds

            jax.monitoring.register_event_duration_secs_listener(add)
            self._listening = True

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        """Seconds to import a test file."""
        start = time.perf_counter()
        report = yield
        if isinstance(collector, pytest.Module):
            self._imports[collector.path] = time.perf_counter() - start
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._listen()
        self._before = self._measure()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        report = yield
        now = self._measure()
        figures = {name: now[name] - self._before[name] for name in _COLUMNS}
        self._before = now
        figures["import"] = self._imports.pop(item.path, 0.0)  # with the file's first test
        figures["slow"] = float(item.get_closest_marker("slow") is not None)
        report.user_properties.append(("seconds", figures))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, figures in report.user_properties:
            if name == "seconds" and isinstance(figures, dict):
                for column in ("import", *_COLUMNS):
                    self._files[report.nodeid.partition("::")[0]][column] += figures[column]
                self._tests[report.nodeid] += figures["wall"]
                if figures["slow"]:
                    self._slow.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._tests:
            return
        areas: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for file, figures in self._files.items():
            for column, seconds in figures.items():
                areas[str(Path(file).parent)][column] += seconds
        columns = ("import", *_COLUMNS)
        for title, table in (("area", areas), ("file", self._files if self._by_file else {})):
            if table:
                terminalreporter.section(f"seconds by {title}", sep="-")
                head = "".join(f"{column:>10}" for column in columns)
                terminalreporter.write_line(f"{title:44}{head}")
                for name, figures in sorted(table.items(), key=lambda p: -p[1]["wall"]):
                    cells = "".join(f"{figures[column]:10.1f}" for column in columns)
                    terminalreporter.write_line(f"{name:44}{cells}")
        over = {
            test: seconds
            for test, seconds in self._tests.items()
            if seconds > BUDGET_SECONDS and test not in self._slow
        }
        if over:
            terminalreporter.section(
                f"over {BUDGET_SECONDS:.0f} s and not marked slow", sep="-", yellow=True
            )
            for test, seconds in sorted(over.items(), key=lambda p: -p[1]):
                terminalreporter.write_line(f"{seconds:8.1f}  {test}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--seconds-by-file`."""
    parser.addoption(
        "--seconds-by-file", action="store_true", help="print the table of seconds for each file"
    )
