"""A program in two processes of two CPU devices each, which jax.distributed joins."""

import os
import socket
import subprocess
import sys

_START = """
import sys

import jax

port, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
words = sys.argv[3:]
"""


def run_two(program: str, *words: object) -> None:
    """Run `program` twice; it finds its number as `process` and its arguments as `words`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _START + program, str(port)]
    processes = [
        subprocess.Popen([*command, str(i), *map(str, words)], env=os.environ | settings)
        for i in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
