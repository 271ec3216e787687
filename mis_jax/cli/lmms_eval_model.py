"""The model `mis_jax` of `python -m lmms_eval --model mis_jax --model_args pretrained=FOLDER`.

lmms-eval finds `MANIFEST` by the entry point in pyproject.toml and loads the class by its path.
Nothing else imports this module: it needs lmms-eval, which is an extra.

A task's messages are asked as they are, pictures where they stand; typed `<image>` stays text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import (  # pyright: ignore[reportMissingImports]
    GenerationResult,
    TokenCounts,
)
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from mis_jax.cli.common import MeshSizes, err_console, load_quietly
from mis_jax.data.processor import ImageLike, Message
from mis_jax.inference.offline import answer
from mis_jax.inference.sampling import Sampling
from mis_jax.terminal import steps_bar

MANIFEST = ModelManifest(
    model_id="mis_jax", chat_class_path="mis_jax.cli.lmms_eval_model.LmmsEvalModel"
)

_MAX_NEW_TOKENS = 1024  # of a task that says nothing; the same as of lmms-eval's own models
# lmms-eval puts this into every task that names no stop text; its own models take it for none.
_NO_STOP = "\n\n"
# What would change an answer and has no counterpart here, with the value that changes nothing.
_LEFT_OUT = {"num_beams": 1, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
_BATCHES_AT_ONCE = 8  # so many batches of decoded pictures are in memory


@dataclass(frozen=True)
class Decoding:
    """A task's `generation_kwargs` as the engine takes them; those alike go together."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]


def decoding_of(settings: Mapping[str, Any]) -> Decoding:
    """ValueError for a setting that would change answers and is not known here.

    `do_sample` decides where it is given, as in transformers; else a temperature above 0 samples.
    """
    for name, neutral in _LEFT_OUT.items():
        if settings.get(name) not in (None, neutral):
            raise ValueError(
                f"generation_kwargs: {name} is {settings[name]}, which mis_jax does not have; "
                f"pass --gen_kwargs {name}={neutral}"
            )
    temperature = settings.get("temperature")
    samples = settings.get("do_sample")
    if samples is None:
        samples = bool(temperature)
    sampling = Sampling()
    if samples:
        sampling = Sampling(
            temperature=1.0 if temperature is None else float(temperature),
            top_p=float(settings.get("top_p") or 1.0),
            top_k=int(settings.get("top_k") or 0),
            seed=int(settings.get("seed") or 0),
        )
    until = settings.get("until") or ()
    stop = [until] if isinstance(until, str) else until
    return Decoding(
        sampling,
        int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
        tuple(text for text in stop if text and text != _NO_STOP),
    )


def conversation_of(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[ImageLike]]:
    """A task's chat messages as the processor takes them, and the pictures in order."""
    conversation: list[Message] = []
    images: list[ImageLike] = []
    for message in messages:
        parts, content = [], message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] not in ("text", "image"):
                raise ValueError(
                    f"the task shows {part['type']} to the model; mis_jax reads text and pictures"
                )
            if part["type"] == "image":
                images.append(part["url"])
                part = {"type": "image"}
            parts.append(part)
        conversation.append({"role": message["role"], "content": parts})
    return conversation, images


class LmmsEvalModel(lmms):
    """A checkpoint in any of the three formats, answering chat requests.

    Args:
        pretrained: Checkpoint folder.
        dtype: Data type for weights and activations; if unset, float32 on CPU, otherwise the
            checkpoint's.
        max_tiles: Maximum number of image tiles per conversation, divided over its images;
            if unset, the checkpoint's setting.
        max_tiles_per_image: Tiles of every image instead.
        system: default (the checkpoint's own), none, or a text; a task's own turn wins over it.
        batch_size: Questions answered at once; lmms-eval's option of this name.
        max_batch_size: Refused; lmms-eval's option for an automatic batch size.
        device: Refused; JAX takes every device that it sees.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        max_tiles: int | None = None,
        max_tiles_per_image: int | None = None,
        system: str = "default",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"--batch_size {batch_size}, --max_batch_size {max_batch_size}: mis_jax takes a "
                "number as --batch_size, and no other"
            )
        if device is not None:
            raise ValueError(
                f"--device {device}: JAX takes the devices that it sees; leave --device out and "
                "choose with the environment variable JAX_PLATFORMS"
            )
        self.rows = int(batch_size)
        self.prompting: dict[str, Any] = {
            "system": str(system),
            "max_tiles": max_tiles,
            "max_tiles_per_image": max_tiles_per_image,
        }
        self.model, self.processor = load_quietly(Path(str(pretrained)), dtype, MeshSizes())

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """One answer a request, in their order, with its tokens counted.

        A request that cannot be asked ends the run: lmms-eval has no state for a missing answer,
        and an empty one would be counted as the model's.
        """
        results: dict[int, Any] = {}
        with steps_bar(err_console) as bar:
            show = bar.task("lmms-eval")
            for decoding, places in _groups(requests, self.rows * _BATCHES_AT_ONCE):
                asked = [self._asked(requests[place]) for place in places]
                completions = answer(
                    self.model,
                    self.processor,
                    [conversation for conversation, _ in asked],
                    [images for _, images in asked],
                    max_new_tokens=decoding.max_new_tokens,
                    sampling=decoding.sampling,
                    stop=decoding.stop,
                    batch_size=self.rows,
                    row_ids=places,  # so that the repeats of a sampled question differ
                    **self.prompting,
                )
                for place, done in zip(places, completions, strict=True):
                    counts = TokenCounts(
                        input_tokens=done.prompt_tokens, output_tokens=done.completion_tokens
                    )
                    results[place] = GenerationResult(text=done.text, token_counts=counts)
                show(len(results), len(requests))
        return [results[place] for place in range(len(requests))]

    def _asked(self, request: Any) -> tuple[list[Message], list[ImageLike]]:
        _, messages_of, _, document, task, split = request.args
        return conversation_of(messages_of(self.task_dict[task][split][document]))

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Refused: mis_jax gives the probabilities of what it wrote, not of a given text."""
        raise NotImplementedError(
            "mis_jax answers generate_until tasks; this task asks for loglikelihood"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refused."""
        raise NotImplementedError(
            "mis_jax answers generate_until tasks; this task asks for several rounds"
        )


def _groups(requests: Sequence[Any], size: int) -> Iterator[tuple[Decoding, list[int]]]:
    """The requests' places by their decoding, at most `size` at a time."""
    together: dict[Decoding, list[int]] = {}
    for place, request in enumerate(requests):
        together.setdefault(decoding_of(request.args[2]), []).append(place)
    for decoding, places in together.items():
        for start in range(0, len(places), size):
            yield decoding, places[start : start + size]
