"""How processes come together, and the one line where they do not."""

import os
import subprocess
import sys

import pytest
from several_processes import Job
from tiny_world import run_config, write_yaml

from mis_jax.config import DistributedConfig
from mis_jax.parallel import processes


def test_a_run_of_one_process_starts_nothing(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "supervise", None)
    processes.start(DistributedConfig(), tmp_path)
    processes.abandon("nobody listens", 1)
    processes.finish()


@pytest.mark.parametrize(("tasks", "several"), [("1", False), ("8", True)])
def test_slurm_is_found_by_jax(tmp_path, monkeypatch, tasks, several):
    words = dict(JOB_ID="7", STEP_NODELIST="node[01-08]", NTASKS=tasks, PROCID="0", LOCALID="0")
    for name, value in words.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    class Supervised(Exception):
        pass

    def supervise(explain):
        raise Supervised

    monkeypatch.setattr(processes, "supervise", supervise)
    if several:
        with pytest.raises(Supervised):
            processes.start(DistributedConfig(), tmp_path)
    else:
        processes.start(DistributedConfig(), tmp_path)


@pytest.mark.slow
def test_processes_that_do_not_come_together(tiny_checkpoint, tiny_data, tmp_path):
    """Waits ten seconds for a second process that never comes."""
    config = run_config(tiny_checkpoint, tiny_data, tmp_path / "run", distributed__timeout=10)
    path = write_yaml(config, tmp_path / "run.yaml")
    with Job(path, 2) as job:
        job.processes[1].kill()
        assert job.codes()[0] == 1
        (line,) = job.errors()[0].splitlines()
        assert "the 2 processes of the run did not come together within 10 s" in line
        assert "Traceback" not in line
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("text", "number", "line", "code"),
    [
        ("the JAX distributed service ... UNAVAILABLE", 6, "lost contact", 75),
        ("absl::Status: INVALID_ARGUMENT: Unexpected task registered", 6, "fewer processes", 1),
        ("", 11, "ended by SIGSEGV; the newest checkpoint is of step 40: run", 75),
    ],
)
def test_what_native_code_says_becomes_one_line(tmp_path, text, number, line, code):
    for step in (8, 40):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    config = DistributedConfig("host:1", 2, 0)
    told, ended = processes._explain(text, number, config, tmp_path)
    assert line in told and ended == code and "\n" not in told


def test_the_parent_passes_on_what_is_not_of_coordination(tmp_path):
    program = (
        "import os, sys\n"
        "from mis_jax.parallel.launcher import supervise\n"
        "supervise(lambda text, number: (f'{len(text.splitlines())} lines held', 75))\n"
        "print('from Python', file=sys.stderr)\n"
        "os.write(2, b'plain words\\n')\n"
        "os.write(2, b'E1125 03:04:32.203351 12 coordination_agent.cc:1] lost\\nmore of it\\n')\n"
        "os.write(2, b'W1125 03:04:32.203351 12 other.cc:1] kept\\n')\n"
        "os.abort()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 75
    assert sorted(done.stderr.splitlines()) == [
        "W1125 03:04:32.203351 12 other.cc:1] kept",
        "from Python",
        "mis-jax: error: 2 lines held",
        "plain words",
    ]
