"""Guard against a miscompilation in XLA's CPU back end; imported before JAX starts a back end.

jaxlib 0.10.2 to 0.11.x turn YNNPACK reductions on, which silently return wrong sums or crash
(jax issues 39103, 39257, 40412). Turning only the reduce fusion off keeps the fast bf16 product.
"""

import os
import re
from importlib.metadata import version

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
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
