"""What this machine can do at most, measured beside a benchmark: matrix rate and memory rate."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

#: Shapes of products that occur in the models (rows, inner, columns) and fill the matrix units.
_PRODUCTS = {
    "cpu": ((1025, 1024, 4096), (512, 4096, 4096)),
    "gpu": ((8192, 8192, 8192), (8192, 4096, 14336)),
    "tpu": ((8192, 8192, 8192), (8192, 4096, 14336)),
}
_MEMORY = {"cpu": 256 << 20, "gpu": 4 << 30, "tpu": 2 << 30}


def limits(repeats: int = 8) -> dict[str, float]:
    """Best of `repeats`: floating point operations and bytes a second."""
    platform = jax.default_backend()
    found = {
        f"{dtype}_flops": max(
            2 * rows * inner * columns / _product(rows, inner, columns, dtype, repeats)
            for rows, inner, columns in _PRODUCTS[platform]
        )
        for dtype in ("float32", "bfloat16")
    }
    found["bytes"] = max(_copied(_MEMORY[platform], repeats), _read(_MEMORY[platform], repeats))
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _product(rows: int, inner: int, columns: int, dtype: str, repeats: int) -> float:
    left = jnp.ones((rows, inner), dtype)
    right = jnp.ones((inner, columns), dtype)
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return _best(lambda: multiply(left, right), repeats)


def _copied(size: int, repeats: int) -> float:
    numbers = jnp.ones((size // 4,), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * size / _best(lambda: add(numbers), repeats)


def _read(size: int, repeats: int) -> float:
    """A product with one row, what decoding does: it reads the matrix once."""
    matrix = jnp.ones((size // 4 // 4096, 4096), jnp.float32)
    row = jnp.ones((4096,), jnp.float32)
    multiply = jax.jit(lambda a, b: a @ b)
    return size / _best(lambda: multiply(matrix, row), repeats)


def _best(call: Any, repeats: int) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    for name, value in limits().items():
        print(f"{name}: {value / 1e9:.1f} G/s")


if __name__ == "__main__":
    main()
