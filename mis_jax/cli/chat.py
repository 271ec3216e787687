"""The verb chat."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from mis_jax.cli.common import (
    AdapterFolder,
    AutoDtype,
    MeshSizes,
    console,
    err_console,
    load_quietly,
)

_HELP = "/image FILE adds a picture to the next question, /clear begins anew, /quit ends"


def chat(
    model: Annotated[Positional[Path], arg(metavar="MODEL")],
    *,
    adapter: AdapterFolder = None,
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    system: str = "default",
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    max_tiles: int | None = None,
    dtype: AutoDtype = None,
    int8_weights: bool = False,
    int8_cache: bool = False,
    mesh: MeshSizes = MeshSizes(),  # noqa: B008  frozen
    check_digests: bool = True,
) -> None:
    r"""Chat with a model in the terminal; answers are streamed.

    Example: mis-jax chat runs/mirage/final --image a.png

    Commands: /image FILE adds an image to the next question, /clear starts a new conversation,
    /quit exits; Ctrl-C interrupts an answer.

    Args:
        model: Checkpoint folder (any of the three layouts), or OUT/checkpoints/STEP of a run.
        image: Path to an image for the first question; repeat the option for several images.
        system: System prompt: default (the checkpoint's), none, or a text.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus sampling: sample from the smallest set of most likely tokens whose
            probabilities add up to top_p.
        top_k: Sample from the k most likely tokens (0 = all).
        seed: Random seed for sampling.
        max_tiles: Maximum number of image tiles per conversation, divided over its images;
            if unset, the checkpoint's setting.
        dtype: Data type for weights and activations; auto: float32 on CPU, otherwise the
            checkpoint's.
        int8_weights: Quantize the decoder's weights to int8: half the memory, answers may differ.
        int8_cache: Quantize the KV cache to int8: half the memory, answers may differ.
        mesh: Number of devices along each axis of the device mesh.
        check_digests: Verify the weights against their stored SHA-256 digests, if present.
    """
    from mis_jax.data.images import open_image
    from mis_jax.inference.batch_file import Settings
    from mis_jax.inference.chat_session import Chat
    from mis_jax.inference.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    network, processor = load_quietly(
        model, dtype, mesh, adapter=adapter, int8=int8_weights, check_digests=check_digests
    )
    settings = Settings(sampling, system, max_new_tokens, max_tiles, int8_cache=int8_cache)
    talk = Chat(network, processor, settings)
    err_console.print(_HELP, style="dim")
    waiting = list(image)
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        word, _, rest = line.partition(" ")
        if not line:
            continue
        if word == "/quit":
            return
        if word == "/clear":
            talk.clear()
            waiting = []
        elif word == "/image":
            path = Path(rest.strip()).expanduser()
            try:
                open_image(path)
            except (ValueError, OSError) as error:
                err_console.print(str(error), style="red", markup=False)
                continue
            waiting.append(path)
        elif word.startswith("/"):
            err_console.print(f"{word} is no command; {_HELP}", style="red", markup=False)
        else:
            try:
                talk.ask(line, waiting, _show)
                waiting = []
            except ValueError as error:
                err_console.print(str(error), style="red", markup=False)
            except KeyboardInterrupt:
                err_console.print("\nstopped", style="dim")
            console.print()


def _show(text: str) -> None:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
