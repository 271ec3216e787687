"""The verb chat."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from mis_jax.cli.common import AdapterFolder, Dtype, MeshSizes, console, err_console, load_quietly

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
    dtype: Dtype | None = None,
    int8_weights: bool = False,
    int8_cache: bool = False,
    mesh: MeshSizes = MeshSizes(),  # noqa: B008  frozen
    check_digests: bool = True,
) -> None:
    r"""Talk with a model in the terminal; answers appear as they are made.

    Example: mis-jax chat runs/mirage/final --image a.png

    Within: /image FILE adds a picture to the next question, /clear begins anew, /quit ends;
    Ctrl-C stops an answer.

    Args:
        model: Checkpoint folder in any of the three formats, or OUT/checkpoints/STEP of a run.
        image: An image file for the first question; repeat the option for several.
        system: default (the checkpoint's own), none, or a text.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Sample from the most probable tokens of this total probability.
        top_k: Sample from so many of the most probable tokens; 0 is all.
        seed: Of the sampling.
        max_tiles: Tiles of a conversation, divided over its images; the checkpoint's without it.
        dtype: Number format; float32 on a CPU and the file's own elsewhere without it.
        int8_weights: Keep the decoder's kernels in 8 bits: half the memory, answers may differ.
        int8_cache: Keep keys and values in 8 bits: half the memory, answers may differ.
        mesh: Devices that share the model.
        check_digests: Compare the weights with the digests written with them, where there are any.
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
