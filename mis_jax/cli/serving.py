"""The verb serve."""

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from mis_jax.cli.common import (
    AdapterFolder,
    AutoDtype,
    Failed,
    MeshSizes,
    console,
    err_console,
    load_quietly,
)


def serve(
    model: Annotated[Positional[Path], arg(metavar="MODEL")],
    *,
    adapter: AdapterFolder = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_host: Annotated[tuple[str, ...], UseAppendAction] = (),
    allow_origin: Annotated[tuple[str, ...], UseAppendAction] = (),
    name: str | None = None,
    api_key_env: str | None = None,
    max_concurrent: int = 16,
    max_queue: int = 64,
    dtype: AutoDtype = None,
    int8_weights: bool = False,
    int8_cache: bool = False,
    mesh: MeshSizes = MeshSizes(),  # noqa: B008  frozen
    check_digests: bool = True,
    warm_up: int = 0,
    timeout: float = 600.0,
    drain: float = 120.0,
    allow_image_folder: Path | None = None,
    max_body_mib: int = 32,
    max_megapixels: int = 100,
) -> None:
    """Serve a model through an OpenAI-compatible HTTP API, with a chat page at /.

    Example: mis-jax serve runs/mirage/final --port 8000 --api-key-env MIS_JAX_KEY

    Args:
        model: Checkpoint folder (any of the three layouts), or OUT/checkpoints/STEP of a run.
        host: Host name or address to bind to; 0.0.0.0 binds all interfaces.
        port: Port number to listen on; 0 picks a free port.
        allow_host: Host header to accept in addition to localhost, --host and IP addresses;
            repeat the option for several. '*' accepts any, the default with 0.0.0.0.
        allow_origin: Origin of web pages that may ask this server from a browser (CORS), such as
            http://localhost:3000; repeat the option for several, '*' allows any.
        name: Model name used in the API; if unset, the folder's name,
            with --adapter both names.
        api_key_env: Environment variable that holds the API key clients must send.
        max_concurrent: Maximum number of requests processed concurrently.
        max_queue: Maximum number of queued requests; further requests are rejected with 429.
        dtype: Data type for weights and activations; auto: float32 on CPU, otherwise the
            checkpoint's.
        int8_weights: Quantize the decoder's weights to int8: half the memory, answers may differ.
        int8_cache: Quantize the KV cache to int8: half the memory, answers may differ.
        mesh: Number of devices along each axis of the device mesh.
        check_digests: Verify the weights against their stored SHA-256 digests, if present.
        warm_up: Compile before accepting requests, for prompt plus answer of up to this many
            tokens (0 = compile on the first request of each size).
        timeout: Request timeout in seconds, including time in the queue.
        drain: Seconds to wait for running requests to finish after SIGTERM.
        allow_image_folder: Let requests read local images below this folder; if unset, none.
        max_body_mib: Maximum size of a request body in MiB.
        max_megapixels: Maximum total size of the images of a request, in megapixels.
    """
    try:
        from mis_jax.checkpoint.trained_model import model_name
        from mis_jax.inference.async_engine import EngineFailure
        from mis_jax.inference.memory import OutOfMemory
        from mis_jax.server import run
        from mis_jax.server.access import Settings, allowed_hosts, allowed_origins
    except ImportError as error:
        raise ValueError(
            f"{error}; serving needs the extra 'serve': pip install 'mis-jax[serve]'"
        ) from None
    for option, number in (
        ("--max-concurrent", max_concurrent), ("--timeout", timeout),
        ("--max-body-mib", max_body_mib), ("--max-megapixels", max_megapixels),
    ):  # fmt: skip
        if not 0 < number < float("inf"):
            raise ValueError(f"{option} is {number}; give a number above 0")
    if max_queue < 0:
        raise ValueError(f"--max-queue is {max_queue}; give at least 0")
    if warm_up < 0:
        raise ValueError(f"--warm-up is {warm_up}; give a number of tokens, or 0 for none")
    if not 0 <= drain < float("inf"):
        raise ValueError(f"--drain is {drain}; give at least 0 seconds")
    if allow_image_folder is not None and not allow_image_folder.is_dir():
        raise ValueError(f"--allow-image-folder {allow_image_folder}: no such folder")
    origins = allowed_origins(allow_origin)
    key = _key(api_key_env)
    with run.bind(host, port) as bound:  # before minutes of loading
        url = run.address_of(bound)
        if key is None and not run.is_local(bound):
            err_console.print(
                f"warning: anybody who reaches {url} can use it; see --api-key-env",
                style="yellow", markup=False,
            )  # fmt: skip
        network, processor = load_quietly(
            model, dtype, mesh, adapter=adapter, int8=int8_weights, check_digests=check_digests
        )
        settings = Settings(
            model=name or model_name(model, adapter),
            context=processor.config.text.max_position,
            api_key=key,
            hosts=allowed_hosts(bound, host, allow_host),
            origins=origins,
            image_folder=allow_image_folder,
            timeout=timeout,
            max_body=max_body_mib << 20,
            max_pixels=max_megapixels * 1_000_000,
        )
        try:
            run.serve(
                network,
                processor,
                settings,
                bound,
                max_concurrent=max_concurrent,
                max_queue=max_queue,
                drain=drain,
                int8_cache=int8_cache,
                longest=warm_up,
                started=lambda: console.print(
                    f"{settings.model} is served at {url} (chat page) and {url}/v1 (API)",
                    markup=False, highlight=False, soft_wrap=True,
                ),
            )  # fmt: skip
        except (EngineFailure, OutOfMemory) as failure:  # a supervisor starts it again
            raise Failed(str(failure)) from failure


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env {variable}: this environment variable is empty; set it")
    return key
