"""The Python names that a user imports from `mis_jax`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import load as load_weights
from mis_jax.checkpoint.load import open_checkpoint
from mis_jax.checkpoint.parameter_source import Progress
from mis_jax.checkpoint.trained_model import model_files
from mis_jax.data.processor import ImageLike, Message, Processor
from mis_jax.inference.offline import answer
from mis_jax.inference.sampling import Sampling
from mis_jax.model.internvl import InternVL
from mis_jax.parallel.sharding import FSDP_TENSOR, parameter_shardings


def load(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    check_digests: bool = True,
) -> tuple[InternVL, Processor]:
    """Model and processor of a checkpoint folder in any of the three formats, or of a run's.

    An `adapter` is the folder of a LoRA adapter in PEFT format to merge into it as it is read.
    `dtype` (float32, bfloat16 or float16) is that of parameters and activations; None keeps the
    file's. With a `mesh` (axes data, fsdp, tensor, context) parameters are split over it: every
    process reads its own slices straight onto its devices, and no host holds a full copy.
    With `check_digests` values are compared with the digests that were written with them.
    Raises ValueError that names the file and the field of whatever does not fit.
    """
    name = None if dtype is None else jnp.dtype(dtype).name
    opened = open_checkpoint(
        Path(path), None if adapter is None else Path(adapter), check_digests=check_digests
    )
    abstract = nnx_state.abstract_model(opened.config)
    if mesh is None:
        here = SingleDeviceSharding(jax.devices()[0])
        shardings = dict.fromkeys(nnx_state.flat(abstract), here)
    else:
        shardings = parameter_shardings(abstract, mesh, FSDP_TENSOR)
    checkpoint = load_weights(opened, name, progress, shardings)
    model = nnx_state.build(
        checkpoint.config, checkpoint.arrays, compute_dtype=jnp.dtype(checkpoint.dtype)
    )
    return model, Processor.from_folder(model_files(Path(path)), checkpoint.config)


def generate(
    model: InternVL,
    processor: Processor,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Sequence[ImageLike]] | None = None,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str = "default",
    max_tiles: int | None = None,
    max_tiles_per_image: int | None = None,
) -> list[str]:
    """One answer a conversation, in their order; greedy at temperature 0.

    Of a conversation that ends with an assistant's message, the answer is how that message goes on.
    """
    completions = answer(
        model,
        processor,
        conversations,
        images,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        system=system,
        max_tiles=max_tiles,
        max_tiles_per_image=max_tiles_per_image,
    )
    return [completion.text for completion in completions]
