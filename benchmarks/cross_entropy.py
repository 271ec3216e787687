"""The loss with its gradients from hidden states and the vocabulary's table: ours against torch.

Ours takes the positions under the loss alone, a chunk at a time; the peer does what transformers'
models do: the logits of all positions, in float32, and cross-entropy over them.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tyro

from benchmarks.common import save
from benchmarks.harness import Cell, Dtype, compared, expect_close, serve, show

_VOCABULARY = {"1B": (151_674, 896)}  # words and width of InternVL2.5-1B
#: Tokens of a row, and how many of them are under the loss: a sample of MIS is like the first.
ROWS = {"384 tokens, 96 with loss": (384, 96), "1112 tokens, all with loss": (1112, 1111)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks cross_entropy --rounds 5 --save"""

    rounds: int = 5
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
    words, width = _VOCABULARY["1B"]
    cells = [
        Cell(name, unit="calls", flops=6.0 * weighted * words * width, target=1.0)
        for name, (_, weighted) in ROWS.items()
    ]
    found = compared("cross_entropy", cells, settings.rounds, agree)
    show("losses with gradients a second", found["cells"])
    if settings.save:
        save("cross_entropy", {"benchmark": "cross_entropy"} | found)


def agree(cell: Cell, results: dict[str, dict[str, Any]]) -> None:
    expect_close(cell, results, float32=1e-4, bfloat16=3e-2)


def inputs(cell: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states, table, tokens and which of them are under the loss."""
    words, width = _VOCABULARY["1B"]
    length, weighted = ROWS[cell]
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1, length, width), np.float32)
    table = rng.standard_normal((words, width), np.float32) * np.float32(0.02)
    loss = (np.arange(length) >= length - weighted)[None]
    return hidden, table, rng.integers(0, words, (1, length)), loss


def sample(loss: float, of_hidden: np.ndarray, of_table: np.ndarray) -> list[float]:
    """The loss, and numbers that stand for its two gradients, each set to one length."""
    found = [loss]
    for gradient in (of_hidden, of_table):
        some = gradient.reshape(-1)[:: gradient.size // 4096].astype(np.float64)
        found += (some / np.linalg.norm(gradient) * 100).tolist()
    return found


def ours(dtype: Dtype) -> Callable[[str], dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from mis_jax.model.batch import Batch
    from mis_jax.train.loss import weighted_loss

    @jax.jit
    def step(hidden, table, ids, loss):
        ones = jnp.ones_like(ids)
        none = jnp.zeros((0,), bool)
        batch = Batch(ids, ones, ones, loss.astype(jnp.float32), none, none)

        def mean(hidden, table):
            total, weight = weighted_loss(hidden, table, batch)
            return total / weight

        return jax.value_and_grad(mean, (0, 1))(hidden, table)

    def answer(cell: str) -> dict[str, Any]:
        hidden, table, ids, loss = inputs(cell)
        arrays = jax.block_until_ready(
            (jnp.asarray(hidden, dtype), jnp.asarray(table, dtype), jnp.asarray(ids), loss)
        )
        began = time.perf_counter()
        found = jax.block_until_ready(step(*arrays))
        seconds = time.perf_counter() - began
        value, gradients = found
        wide = [np.asarray(gradient, np.float32) for gradient in gradients]
        return {"seconds": seconds, "sample": sample(float(value), *wide)}

    return answer


def theirs(dtype: Dtype) -> Callable[[str], dict[str, Any]]:
    import torch

    torch.set_num_threads(2)

    def answer(cell: str) -> dict[str, Any]:
        made = inputs(cell)
        hidden, table = (
            torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_() for x in made[:2]
        )
        labels = torch.from_numpy(np.where(made[3], made[2], -100))
        began = time.perf_counter()
        logits = (hidden @ table.T).float()
        value = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        value.backward()
        seconds = time.perf_counter() - began
        assert hidden.grad is not None and table.grad is not None
        wide = [gradient.float().numpy() for gradient in (hidden.grad, table.grad)]
        return {"seconds": seconds, "sample": sample(value.item(), *wide)}

    return answer


if __name__ == "__main__":
    main()
