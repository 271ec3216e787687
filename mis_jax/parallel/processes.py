"""The processes of a run: how they find each other, what they tell each other, how they end.

The engine is JAX's multi-controller runtime with its coordination service; here are only the words
around it, so that a failure of one process is one line on all of them.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mis_jax import signals
from mis_jax.config import DistributedConfig
from mis_jax.parallel.launcher import supervise
from mis_jax.signals import RESUMABLE
from mis_jax.storage.paths import newest_step

CHECKPOINTS = "checkpoints"  # in a run's folder
_FAILED = "mis_jax/failed"
_PATIENCE = 600  # seconds that processes may differ in the time of reading their samples
_LOSS = re.compile(
    r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|[Cc]onnection|heartbeat"
)
_last_acts: list[Callable[[], None]] = []  # before this process is ended for all
_ending = threading.Lock()  # whoever takes it has the last word of this process


def start(config: DistributedConfig, output: Path) -> None:
    """Join the other processes of a run, before JAX looks for devices; alone, do nothing.

    Where `config` is empty, JAX tells whether a TPU pod, Slurm or Kubernetes started several
    processes. Raises ValueError when fewer came than `config` says; what JAX itself refuses ends
    the process with one line.
    """
    if config.coordinator is None and not _started_by_cluster():
        return
    supervise(lambda text, number: _explain(text, number, config, output))
    signals.watch()  # also while it waits for the others, in native code
    import jax

    if _only_cpu():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # `listen_for_stop` starts it
    jax.distributed.initialize(
        config.coordinator,
        config.num_processes,
        config.process_id,
        initialization_timeout=config.timeout,
        # So that everything has ended when `timeout` is over.
        heartbeat_timeout_seconds=max(5, config.timeout * 3 // 4),
        shutdown_timeout_seconds=config.timeout,
    )
    threading.Thread(target=_listen, daemon=True).start()
    if config.num_processes not in (None, jax.process_count()):
        raise ValueError(
            f"distributed.num_processes is {config.num_processes}, but process 0 waits for "
            f"{jax.process_count()}; give every process the same number"
        )


def _started_by_cluster() -> bool:
    """Whether JAX finds itself one of several processes, without being told."""
    # JAX has no public name for this; `initialize` would fail on a machine that is no cluster.
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return cluster.get_process_count() > 1
    return False


def _only_cpu() -> bool:
    import jax

    return jax.config.values["jax_platforms"] == "cpu"


def several() -> bool:
    """Whether the run has more than one process."""
    import jax

    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what a run writes once."""
    import jax

    return jax.process_index() == 0


def meet(name: str) -> None:
    """Wait until every process is here."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def first_says(answer: bool) -> bool:
    """The first process's answer, on every process."""
    if not several():
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(answer))


def is_loss(error: Exception) -> bool:
    """Whether an error tells that another process of the run no longer answers.

    Each back end has words of its own for it, and gloo's is a plain ValueError.
    """
    return several() and _LOSS.search(str(error)) is not None


def lost(output: Path, error: Exception | None = None) -> str:
    """The line about a lost process."""
    reason = ""
    if error and (word := _LOSS.search(str(error))):
        reason = f" ({' '.join(str(error)[word.start() :].split())[:120]})"
    return (
        f"lost contact with another process of the run{reason}; the newest checkpoint is of step "
        f"{newest_step(output / CHECKPOINTS) or 0}: run the same command again on every process"
    )


def listen_for_stop() -> None:
    """From here on SIGTERM is taken by JAX, for `stop_agreed`; before, it ends the process at once.

    To be called by all once there is something to save: JAX's handler is native code, which cannot
    be asked whether a signal has come, and a run agrees on its end only after a step.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", True)
    sys.modules["jax._src.distributed"].global_state.initialize_preemption_sync_manager()


def stop_agreed(step: int) -> bool:
    """Whether SIGTERM has come to any process and this is the step at which all of them stop.

    To be called once a step, with the same steps on all of them.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def note(topic: str, content: Any) -> None:
    """Leave plain JSON for the others, who find it once they know that this process came by."""
    import jax

    _client().key_value_set(f"mis_jax/{topic}/{jax.process_index()}", json.dumps(content))


def notes(topic: str, *, forget: bool = True) -> list[tuple[int, Any]]:
    """What processes have left under a topic, in their order; process 0 may `forget` it."""
    found = _client().key_value_dir_get(f"mis_jax/{topic}/")
    if found and forget:
        _client().key_value_delete(f"mis_jax/{topic}/")
    return sorted((int(name.rsplit("/", 1)[1]), json.loads(value)) for name, value in found)


def word_of_first(topic: str, word: Callable[[], str]) -> str:
    """What the first process says, on every process."""
    if is_first():
        said = word()
        _client().key_value_set(f"mis_jax/{topic}", said)
        return said
    return _client().blocking_key_value_get(f"mis_jax/{topic}", _PATIENCE * 1000)


def abandon(line: str, code: int) -> None:
    """End all processes with this line; alone, do nothing.

    JAX's own end waits for the others, who wait for this one in the middle of a step.
    """
    if _client() is None:
        return
    import jax

    _ending.acquire()
    with suppress(Exception):  # another process was faster, or nobody is there any more
        _client().key_value_set(_FAILED, json.dumps([jax.process_index(), line, code]))
    _leave(line, code)


def before_leaving(act: Callable[[], None]) -> None:
    """Do this when the run is abandoned, which unwinds no stack."""
    _last_acts.append(act)


def finish() -> None:
    """End together with the other processes."""
    if _client() is not None:
        import jax

        _ending.acquire()  # from here on an end of the others is none that must be told
        jax.distributed.shutdown()


def _listen() -> None:
    """Wait for the line of a process that gives up; native code tells the loss of one."""
    import jax

    while True:
        try:
            sender, line, code = json.loads(_client().blocking_key_value_get(_FAILED, 600_000))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return
        except AttributeError:  # the run has finished
            return
    if sender != jax.process_index() and _ending.acquire(blocking=False):
        _leave(f"process {sender}: {line}", code)


def _leave(line: str, code: int) -> NoReturn:
    import jax

    sys.stdout.flush()
    sys.stderr.write(f"mis-jax: error: {line}\n")
    sys.stderr.flush()
    with suppress(Exception):  # a lost process does not come
        _client().wait_at_barrier(_FAILED, 5_000)
    if jax.process_index() == 0:
        time.sleep(0.5)  # the service that the others ask ends with this process
    for act in _last_acts:
        with suppress(Exception):
            act()
    os._exit(code)


def _client() -> Any:
    # The key-value store and barriers of the service have no public name yet; orbax uses the same.
    jax = sys.modules.get("jax")
    return None if jax is None else sys.modules["jax._src.distributed"].global_state.client


def _explain(text: str, number: int, config: DistributedConfig, output: Path) -> tuple[str, int]:
    """Line and exit code of an end that JAX's native code or the machine made."""
    where = f"distributed.coordinator {config.coordinator or '(found by JAX)'}"
    if "Unexpected task registered" in text:
        return f"{where}: it knows fewer processes; give all of them the same num_processes", 1
    if "RegisterTask" in text:
        return (
            f"{where}: the {config.num_processes or ''} processes of the run did not come together "
            f"within {config.timeout} s; check that process 0 runs there, that num_processes is "
            "the same everywhere and that every process has its own process_id"
        ).replace("  ", " "), 1
    if number == signal.SIGABRT and "JAX distributed service" in text:
        return lost(output), RESUMABLE
    sys.stderr.write(text)  # no loss of a process: what was held back may tell the reason
    line = f"the process of the run was ended by {signal.Signals(number).name}"
    newest = newest_step(output / CHECKPOINTS) or 0
    return (
        f"{line}; the newest checkpoint is of step {newest}: run the same command again",
        RESUMABLE,
    )
