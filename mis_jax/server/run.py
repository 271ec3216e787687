"""A loaded model, served until it is told to stop."""

import queue
import socket
from collections.abc import Callable

import jax
from PIL import Image

from mis_jax.data.processor import Processor
from mis_jax.inference.async_engine import Service
from mis_jax.inference.engine import Engine
from mis_jax.inference.requests import Request, RequestOutput
from mis_jax.model.internvl import InternVL
from mis_jax.model.unrolled import unrolled
from mis_jax.server.app import create_app
from mis_jax.server.server import run
from mis_jax.server.settings import Settings

STEPS = 8  # tokens of every answer between two looks at what has arrived
BETWEEN = 1  # tokens of every answer between two chunks of a new prompt


def serve(
    model: InternVL,
    processor: Processor,
    settings: Settings,
    bound: socket.socket,
    *,
    max_concurrent: int,
    max_queue: int,
    drain: float,
    int8_cache: bool = False,
    longest: int = 0,
    started: Callable[[], None],
) -> None:
    """Answers requests at a bound socket; returns after SIGTERM or SIGINT.

    What the engine raises on its very first prompts, such as for want of memory, is raised here.
    """
    engine = engine_for(
        model,
        processor,
        max_num_seqs=max_concurrent,
        max_length=settings.context,
        int8_cache=int8_cache,
    )
    if longest:
        engine.warm_up(min(longest, settings.context))
    service = Service(engine, max_concurrent=max_concurrent, max_queue=max_queue)
    warm_up(service, processor)
    app = create_app(service, processor, settings)
    run(app, service, bound, drain=drain, started=started)


def engine_for(
    model: InternVL,
    processor: Processor,
    *,
    max_num_seqs: int,
    max_length: int,
    int8_cache: bool = False,
) -> Engine:
    """An engine that turns to new prompts soon, for answers that somebody is waiting for."""
    if jax.default_backend() == "cpu":
        model = unrolled(model)
    return Engine(
        model,
        stop_ids=processor.tokenizer.stop_ids,
        decode=processor.tokenizer.decode,
        max_num_seqs=max_num_seqs,
        between=BETWEEN,
        steps=STEPS,
        max_length=max_length,
        int8_cache=int8_cache,
    )


def warm_up(service: Service, processor: Processor) -> None:
    """Answer a prompt without and one with a picture: clients do not wait for the compiler."""
    size = processor.config.vision.image_size
    for pictures in ([], [Image.new("RGB", (size, size))]):
        parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "Hello"}]
        example = processor.example([{"role": "user", "content": parts}], pictures)
        heard: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
        service.submit(Request(example, max_new_tokens=2 * STEPS), heard.put)
        while not (isinstance(what := heard.get(), RequestOutput) and what.finish_reason):
            if isinstance(what, Exception):
                raise what
