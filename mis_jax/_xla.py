"""What has to be set before JAX starts a back end.

* A guard against a miscompilation on the CPU: jaxlib 0.10.2 to 0.11.x turn YNNPACK reductions on,
  which silently return wrong sums or crash (jax issues 39103, 39257, 40412). Turning only the
  reduce fusion off keeps the fast bf16 product.
* No search for TPUs where there are none.
"""

import glob
import os
import re
from importlib.metadata import version
from importlib.util import find_spec

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd")  # their device files
_FIRST_BAD, _FIRST_GOOD = (0, 10, 2), (0, 12, 0)


def is_affected(jaxlib_version: str) -> bool:
    """Whether a jaxlib of this version miscompiles reductions on the CPU."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", jaxlib_version)[:3])
    return _FIRST_BAD <= numbers < _FIRST_GOOD


def guard_cpu_reductions() -> None:
    """Set the safe XLA flag when jaxlib is affected and the user has not chosen a value."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags and is_affected(version("jaxlib")):
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=-reduce".strip()


def stay_on_cpu() -> None:
    """Choose the CPU where libtpu is installed for `plan` alone, with no accelerator in sight.

    JAX would look for TPUs, in vain and aloud. What the user has chosen stands.
    """
    if "JAX_PLATFORMS" in os.environ or find_spec("libtpu") is None:
        return
    if not any(glob.glob(pattern) for pattern in _ACCELERATORS):
        os.environ["JAX_PLATFORMS"] = "cpu"
