"""The verb generate."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from mis_jax.cli.common import (
    AdapterFolder,
    AutoDtype,
    Failed,
    MeshSizes,
    console,
    err_console,
    load_quietly,
    print_json,
)


def generate(
    model: Annotated[Positional[Path], arg(metavar="MODEL")],
    *,
    adapter: AdapterFolder = None,
    prompt: str | None = None,
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    system: str = "default",
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    max_tiles: int | None = None,
    dtype: AutoDtype = None,
    int8_weights: bool = False,
    int8_cache: bool = False,
    mesh: MeshSizes = MeshSizes(),  # noqa: B008  frozen
    check_digests: bool = True,
    batch: Path | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    r"""Answer one prompt, or many from a file.

    Example: mis-jax generate runs/mirage/final --prompt "What is it?" --image a.png --image b.png

    Args:
        model: Checkpoint folder (any of the three layouts), or OUT/checkpoints/STEP of a run.
        prompt: Input prompt; <image> marks the place of each image, otherwise images come first.
        image: Path to an input image; repeat the option for several images.
        system: System prompt: default (the checkpoint's), none, or a text.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus sampling: sample from the smallest set of most likely tokens whose
            probabilities add up to top_p.
        top_k: Sample from the k most likely tokens (0 = all).
        seed: Random seed for sampling.
        stop: Stop generating at this string, which is not returned; repeat for several, of which
            the one that is complete first counts.
        max_tiles: Maximum number of image tiles per conversation, divided over its images;
            if unset, the checkpoint's setting.
        dtype: Data type for weights and activations; auto: float32 on CPU, otherwise the
            checkpoint's.
        int8_weights: Quantize the decoder's weights to int8: half the memory, answers may differ.
        int8_cache: Quantize the KV cache to int8: half the memory, answers may differ.
        mesh: Number of devices along each axis of the device mesh.
        check_digests: Verify the weights against their stored SHA-256 digests, if present.
        batch: Input JSON Lines file with id, prompt and images (a list of paths) per line,
            instead of --prompt.
        out: Output JSON Lines file for --batch, one answer per line.
        json: Print text, prompt_tokens, completion_tokens and finish_reason as JSON.
    """
    from mis_jax.checkpoint.trained_model import model_fingerprint
    from mis_jax.inference.batch_file import Settings, answer_file, ask_once, printed
    from mis_jax.inference.sampling import Sampling
    from mis_jax.storage.files import make_folder
    from mis_jax.storage.hashing import digest
    from mis_jax.storage.paths import destination_path

    if (prompt is None) == (batch is None):
        raise ValueError("give either --prompt TEXT or --batch FILE.jsonl")
    if batch is not None and (out is None or image):
        raise ValueError("--batch needs --out FILE.jsonl, and takes images from the file's rows")
    if out is not None:
        make_folder(destination_path(out, "--out").parent)
    settings = Settings(
        Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        system=system,
        max_new_tokens=max_new_tokens,
        max_tiles=max_tiles,
        stop=stop,
        int8_cache=int8_cache,
    )
    network, processor = load_quietly(
        model, dtype, mesh, adapter=adapter, int8=int8_weights, check_digests=check_digests
    )
    if batch is not None and out is not None:
        from mis_jax.terminal import steps_bar

        with steps_bar(err_console) as bar:
            errors = answer_file(
                network,
                processor,
                batch,
                out,
                settings,
                fingerprint=digest([model_fingerprint(model, adapter), str(dtype), int8_weights]),
                progress=bar.answers("answers"),
            )
        if errors:
            raise Failed(
                f"{out}: {errors} row(s) with an error; mend their prompts or images and run it "
                "again"
            )
        return
    assert prompt is not None
    completion = ask_once(network, processor, prompt, image, settings)
    if json:
        print_json(printed(completion))
    else:
        console.print(completion.text, markup=False, highlight=False)
