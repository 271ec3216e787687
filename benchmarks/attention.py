"""Attention alone, forward and with its gradients: ours against torch's scaled dot product."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tyro

from benchmarks.common import save
from benchmarks.harness import Cell, Dtype, compared, expect_close, serve, show

_REASON = (
    "torch's kernel keeps a block of the map in the cache; XLA:CPU writes it to memory between "
    "products, and its row reductions read 2.4 GB/s"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of queries, and whether a token sees only earlier ones."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool

    @property
    def flops(self) -> float:
        """Of a forward pass; a causal one needs half of the square."""
        square = self.rows * self.heads * self.length**2 * self.head_dim
        return 4.0 * square * (0.5 if self.causal else 1.0)


#: InternViT-300M over one tile; Qwen2.5-0.5B over a prompt with two tiles, and over a long row.
SHAPES = {
    "tile": Shape(1, 1025, 16, 16, 64, False),
    "prompt of 662": Shape(1, 662, 14, 2, 64, True),
    "row of 4096": Shape(1, 4096, 14, 2, 64, True),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks attention --rounds 9 --save"""

    rounds: int = 9
    """Turns of each side."""
    save: bool = False
    """Write the figures into benchmarks/results."""
    side: str = ""
    """Used by the benchmark itself: serve one side over stdin and stdout."""
    dtype: Dtype = "float32"
    """Of one side; used by the benchmark itself."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.side:
        serve((ours if settings.side == "ours" else theirs)(settings.dtype))
        return
    cells = [
        Cell(f"{name}, {what}", unit="calls", flops=shape.flops * times, target=1.0, reason=_REASON)
        for name, shape in SHAPES.items()
        for what, times in (("forward", 1), ("with gradients", 3))
    ]
    found = compared("attention", cells, settings.rounds, agree)
    show("attention, calls a second", found["cells"])
    if settings.save:
        save("attention", {"benchmark": "attention"} | found)


def agree(cell: Cell, results: dict[str, dict[str, Any]]) -> None:
    expect_close(cell, results, float32=1e-4, bfloat16=2e-2)


def inputs(shape: Shape) -> list[np.ndarray]:
    """Queries, keys and values, [rows, length, heads, head_dim], and a slope for the output."""
    rng = np.random.default_rng(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [
        rng.standard_normal((shape.rows, shape.length, count, shape.head_dim), np.float32)
        for count in heads
    ]


def sample(arrays: list[np.ndarray]) -> list[float]:
    """Numbers that stand for an output or for three gradients."""
    return [float(x) for array in arrays for x in array.reshape(-1)[:: array.size // 256]]


def ours(dtype: Dtype) -> Callable[[str], dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from mis_jax.config import MeshConfig
    from mis_jax.parallel.attention_kernels import attend_on, choose
    from mis_jax.parallel.sharding import make_mesh

    mesh = make_mesh(MeshConfig())
    kernel = choose("auto", mesh, jnp.dtype(dtype))
    attend = attend_on(mesh, kernel, packed=False)

    def forward(shape: Shape, q, k, v):
        segments = jnp.ones((shape.rows, shape.length), jnp.int32) if shape.causal else None
        return attend[0 if shape.causal else 1](q, k, v, segments)

    def loss(q, k, v, slope, shape: Shape):
        return jnp.sum(forward(shape, q, k, v) * slope)

    outputs = jax.jit(lambda shape, q, k, v, slope: [forward(shape, q, k, v)], static_argnums=0)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=4)

    def answer(cell: str) -> dict[str, Any]:
        name, what = cell.split(", ")
        shape = SHAPES[name]
        arrays = [jnp.asarray(x, dtype) for x in inputs(shape)]
        jax.block_until_ready(arrays)
        began = time.perf_counter()
        found = outputs(shape, *arrays) if what == "forward" else gradients(*arrays, shape)
        jax.block_until_ready(found)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "sample": sample([np.asarray(x, np.float32) for x in found])}

    return answer


def theirs(dtype: Dtype) -> Callable[[str], dict[str, Any]]:
    import torch

    torch.set_num_threads(2)

    def answer(cell: str) -> dict[str, Any]:
        name, what = cell.split(", ")
        shape = SHAPES[name]
        q, k, v, slope = (
            torch.from_numpy(x.swapaxes(1, 2).copy()).to(getattr(torch, dtype))
            for x in inputs(shape)
        )
        wanted = [x.requires_grad_(what != "forward") for x in (q, k, v)]
        began = time.perf_counter()
        out = torch.nn.functional.scaled_dot_product_attention(
            *wanted, is_causal=shape.causal, enable_gqa=shape.heads != shape.kv_heads
        )
        if what == "forward":
            found = [out]
        else:
            out.backward(slope)
            found = [x.grad for x in wanted]
        seconds = time.perf_counter() - began
        arrays = [x.detach().float().numpy().swapaxes(1, 2) for x in found]  # pyright: ignore[reportOptionalMemberAccess]
        return {"seconds": seconds, "sample": sample(arrays)}

    return answer


if __name__ == "__main__":
    main()
