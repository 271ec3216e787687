"""InternVL in JAX: load, fine-tune for safety, generate, and prove the result."""

from typing import TYPE_CHECKING, Any

from mis_jax._xla import guard_cpu_reductions, stay_on_cpu

# Before anything starts a JAX back end.
guard_cpu_reductions()
stay_on_cpu()

if TYPE_CHECKING:
    from mis_jax.api import generate, load

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `generate` on first use, so that `import mis_jax` stays quick."""
    if name in ("generate", "load"):
        from mis_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'mis_jax' has no attribute {name!r}")
