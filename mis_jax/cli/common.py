"""What every verb shares: the two consoles, JSON, failures, loading a model."""

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from mis_jax.signals import RESUMABLE, LostWorker, Stop, came
from mis_jax.storage.files import FULL, os_error_text
from mis_jax.terminal import bytes_bar, open_console

_DISK_ERRORS = (*FULL, errno.EIO)  # the run's fate, not the user's mistake
Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES = ("auto", *get_args(Dtype))
#: `auto` on the command line, None in the verb.
AutoDtype = Annotated[
    Dtype | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(_DTYPES)}}}",
        instance_from_str=lambda words: None if words[0] == "auto" else words[0],
        is_instance=lambda value: value is None or value in _DTYPES,
        str_from_instance=lambda value: ["auto" if value is None else value],
        choices=_DTYPES,
    ),
]
AdapterFolder = Annotated[
    Path | None,
    arg(
        metavar="DIR",
        help="Folder of a LoRA adapter in PEFT format to apply to MODEL, its base model, such as "
        "OUT/final of a LoRA run; it is merged into the weights as they are read.",
    ),
]
console = open_console()
err_console = open_console(stderr=True)


class Failed(RuntimeError):
    """The command ran and did not reach its goal: exit code 1."""


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the end."""
    err_console.print(f"mis-jax: error: {message}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(code)


def described(error: BaseException) -> tuple[str, int]:
    """The line that tells an error, and the exit code."""
    if isinstance(error, Stop):  # it may have come in the middle of an import: import nothing
        return str(error), RESUMABLE
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 1
    from mis_jax.train.outcome import FailedRun

    if isinstance(error, FailedRun | LostWorker):
        return str(error), error.exit_code
    if isinstance(error, Failed):
        return str(error), 1
    if not isinstance(error, ValueError | OSError):
        if stop := came():  # an import that was interrupted raises anything
            return str(stop), RESUMABLE
        shown = f"{type(error).__name__}: {error} (a fault of mis-jax? --debug shows where)"
        return shown, 1
    if isinstance(error, OSError):
        return os_error_text(error), 1 if error.errno in _DISK_ERRORS else 2
    return str(error), 2


def print_json(content: Any) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(content, ensure_ascii=False))


@dataclass(frozen=True)
class MeshSizes:
    """Number of devices along each axis of the device mesh, as in a run's configuration."""

    data: int = 1
    """Data-parallel replicas of the model."""
    fsdp: int = 1
    """Fully sharded data parallelism: shards of every parameter (-1 = all remaining devices)."""
    tensor: int = 1
    """Tensor parallelism: shards of heads and MLP columns (-1 = all remaining devices)."""


def mesh_of(sizes: MeshSizes):
    """The mesh that sizes ask for; None for one device."""
    from mis_jax.config import MeshConfig
    from mis_jax.parallel.sharding import make_mesh

    if sizes == MeshSizes():
        return None
    return make_mesh(MeshConfig(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor))


def load_quietly(
    path: Path,
    dtype: str | None,
    sizes: MeshSizes,
    *,
    adapter: Path | None = None,
    int8: bool = False,
    check_digests: bool = True,
):
    """Model and processor, for answers: layers written out, on a mesh where sizes ask for one.

    float32 on a CPU, where it answers one prompt as fast as bfloat16. `int8` rounds the decoder's
    kernels, those of an `adapter` merged into them.
    """
    import jax

    from mis_jax.api import load
    from mis_jax.model.unrolled import unrolled

    mesh = mesh_of(sizes)
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    with bytes_bar(err_console) as bar:
        progress = bar.task("reading tensors")
        model, processor = load(
            path,
            adapter=adapter,
            dtype=dtype,
            mesh=mesh,
            progress=progress,
            check_digests=check_digests,
        )
    return unrolled(model, consume=True, int8=int8), processor
