"""Programs and training runs in several processes of a few CPU devices, which JAX joins."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from waiting import DEADLINE, until

_START = """
import sys

import jax

port, count, process = (int(word) for word in sys.argv[1:4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=process)
words = sys.argv[4:]
"""
_TRAIN = "import mis_jax.cli; mis_jax.cli.main()"


def run_together(program: str, *words: object, count: int = 2) -> None:
    """Run `program` so often; it finds its number as `process` and its arguments as `words`."""
    command = [sys.executable, "-c", _START + program, str(free_port()), str(count)]
    processes = [
        subprocess.Popen([*command, str(i), *map(str, words)], env=_environment(devices=2))
        for i in range(count)
    ]
    try:
        assert [process.wait(timeout=DEADLINE) for process in processes] == [0] * count
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Job:
    """`mis-jax train` in several processes; as a context it ends what is left of them.

    Each may have a configuration, a folder and an environment of its own. With `group` each leads
    a group of processes.
    """

    def __init__(
        self,
        config: Path | list[Path],
        count: int,
        *options: str,
        folders: list[Path] | None = None,
        environments: list[dict[str, str]] | None = None,
        group: bool = False,
    ):
        configs = config if isinstance(config, list) else [config] * count
        self._errors = [path.with_suffix(f".{i}.err") for i, path in enumerate(configs)]
        command = [sys.executable, "-c", _TRAIN, "train"]
        coordinator = ["--distributed.coordinator", f"127.0.0.1:{free_port()}"]
        self.processes = []
        for i, path in enumerate(self._errors):
            place = ["--distributed.num-processes", str(count), "--distributed.process-id", str(i)]
            with path.open("w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [*command, str(configs[i]), *options, *coordinator, *place],
                        env=_environment(devices=1) | (environments[i] if environments else {}),
                        cwd=folders[i] if folders else None,
                        start_new_session=group,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Return once something happened; no process may end before."""

        def running() -> bool:
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes), (codes, self.errors())
            return True

        until(happened, still=running)

    def codes(self, seconds: float = DEADLINE) -> list[int]:
        """Exit codes, which all processes must give in so many seconds."""
        end = time.monotonic() + seconds
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def errors(self) -> list[str]:
        """What each process has written on stderr."""
        return [path.read_text() for path in self._errors]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _environment(devices: int) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
