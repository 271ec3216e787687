"""A conversation with one model, answer by answer."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mis_jax.data.chat_template import with_image_markers
from mis_jax.data.processor import Message, Processor
from mis_jax.inference.batch_file import Settings
from mis_jax.inference.engine import Engine
from mis_jax.inference.requests import Request, RequestOutput
from mis_jax.model.internvl import InternVL

_STEPS = 4  # tokens between two pieces of text


class Chat:
    """Turns so far, and the pictures that belong to them."""

    def __init__(self, model: InternVL, processor: Processor, settings: Settings):
        self._model = model
        self._processor = processor
        self._settings = settings
        self._engine = self._new_engine()
        self.clear()

    def _new_engine(self) -> Engine:
        tokenizer = self._processor.tokenizer
        return Engine(
            self._model,
            stop_ids=tokenizer.stop_ids,
            decode=tokenizer.decode,
            max_num_seqs=1,
            steps=_STEPS,
            int8_cache=self._settings.int8_cache,
        )

    def clear(self) -> None:
        """Begin a new conversation."""
        self._turns: list[Message] = []
        self._images: list[Path] = []

    def ask(self, text: str, images: Sequence[Path], show: Callable[[str], None]) -> RequestOutput:
        """Answer the next turn, its text shown as it comes; the last piece tells how it ended.

        A turn that is refused (ValueError) or interrupted is no part of the conversation.
        """
        turns = [*self._turns, {"role": "user", "content": with_image_markers(text, len(images))}]
        pictures = [*self._images, *images]
        example = self._processor.example(
            turns, pictures, system=self._settings.system, max_tiles=self._settings.max_tiles
        )
        self._engine.add(
            Request(
                example,
                self._settings.max_new_tokens,
                self._settings.sampling,
                stream=len(turns),
                stop=self._settings.stop,
            )
        )
        answer, last = "", None
        try:
            while last is None or last.finish_reason is None:
                for _, last in self._engine.step():
                    answer += last.text
                    show(last.text)
        except BaseException:
            # Ctrl-C may fall between two lines of the engine, its cache given to the device.
            self._engine = self._new_engine()
            raise
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        self._images = pictures
        return last
