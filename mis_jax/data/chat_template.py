"""Conversations to token ids: InternVL 2.5's prompt format, with the loss mask beside it.

A conversation is a list of OpenAI-style messages, `{"role": ..., "content": ...}`. Content is a
string, in which `<image>` marks an image in user turns, or a list of parts,
`{"type": "text", "text": ...}` and `{"type": "image"}`. In a text part `<image>` is plain text.

The format is `<|im_start|>{role}\n{text}<|im_end|>\n` for each turn. Control tokens are put in by
id; every stretch of text between two of them is encoded by itself, so nothing typed into a
message can become one.

Source: OpenGVLab/InternVL, template `internvl2_5` in `internvl_chat/internvl/conversation.py` and
`preprocess_internvl2_5` in `internvl_chat/internvl/train/dataset.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from mis_jax.tokenizer.tokenizer import Tokenizer

#: The system prompt InternVL 2.5, 3 and 3.5 were trained with.
DEFAULT_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)
IMAGE_MARKER = "<image>"
#: Field of a message: how many of its markers stand for images, where those after them are text.
MARKERS = "image_markers"

Message = Mapping[str, Any]

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as the model reads it.

    Attributes:
        input_ids: token ids, [length].
        loss_mask: True on the tokens to be learned, unshifted: position i belongs to
            input_ids[i], [length].
        image_spans: (start, stop) of each image in order, `<img>` and `</img>` included.
    """

    input_ids: Int32[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]
    image_spans: tuple[tuple[int, int], ...] = ()


def from_sharegpt(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a training row in InternVL's jsonl format.

    Args:
        row: has `conversations`, a list of `{"from": "human" | "gpt" | "system", "value": text}`:
            an optional system turn, then human and gpt turns in alternation, gpt last.

    Raises:
        ValueError: a missing field, an unknown role, turns out of order or an empty answer; the
            field is named, and the caller knows the place.
    """
    messages: list[dict[str, str]] = []
    for index, (role, value) in enumerate(checked_turns(row)):
        where = f"conversations[{index}]"
        expected = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        if role not in ("system", expected):
            wanted = "gpt" if expected == "assistant" else "human"
            raise ValueError(
                f"{where}.from is {row['conversations'][index]['from']!r} where {wanted!r} is due; "
                "human and gpt turns must alternate, human first: merge or reorder them"
            )
        if role == "assistant" and not value.strip():
            raise ValueError(f"{where}.value is an empty answer; fill it in or drop the row")
        messages.append({"role": role, "content": value})
    if messages[-1]["role"] != "assistant":
        raise ValueError("'conversations' ends without a 'gpt' turn; add the answer")
    return messages


def checked_turns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Role and text of each turn of such a row, in whatever order; raises as `from_sharegpt`."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError("'conversations' must be a list with at least one turn")
    checked: list[tuple[str, str]] = []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where} must be an object with 'from' and a text 'value'")
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise ValueError(
                f"{where}.from is {turn.get('from')!r}; rename it to 'human', 'gpt' or 'system'"
            )
        if role == "system" and index:
            raise ValueError(f"{where}.from is 'system'; only the first turn may be")
        checked.append((role, turn["value"]))
    return checked


def count_images(messages: Sequence[Message]) -> int:
    """How many images the messages refer to, in markers and parts.

    Raises:
        ValueError: a message that `render` would refuse.
    """
    return sum(len(_stretches(message, i)) - 1 for i, message in enumerate(messages))


def insert_image_markers(messages: Sequence[Message], n_images: int) -> list[Message]:
    """The messages with as many image markers as there are images.

    One image without a marker goes in front of the first user turn, as in training upstream.

    Args:
        messages: the conversation; not changed.
        n_images: images that come with it.

    Raises:
        ValueError: the counts differ in any other way.
    """
    n_markers = count_images(messages)
    if n_markers == n_images:
        return list(messages)
    if n_markers == 0 and n_images == 1:
        for index, message in enumerate(messages):
            if message["role"] == "user":
                content = message["content"]
                if isinstance(content, str):
                    content = f"{IMAGE_MARKER}\n{content}"
                else:
                    content = [{"type": "image"}, *content]
                changed = {**message, "content": content}
                return [*messages[:index], changed, *messages[index + 1 :]]
        raise ValueError("1 image but no user turn to show it in; add a user message")
    raise ValueError(
        f"{n_images} image(s) given but {n_markers} image marker(s) in the user turns; write one "
        f"'{IMAGE_MARKER}' per image where it belongs, such as 'Image-1: {IMAGE_MARKER}\\n"
        f"Image-2: {IMAGE_MARKER}\\n...' (a '{IMAGE_MARKER}' meant as text goes into a text part)"
    )


def with_image_markers(prompt: str, n_images: int) -> str:
    """A prompt, its images named before it as InternVL's demo does where it has no marker."""
    if not n_images or IMAGE_MARKER in prompt:
        return prompt
    if n_images == 1:
        return f"{IMAGE_MARKER}\n{prompt}"
    names = (f"Image-{number}: {IMAGE_MARKER}\n" for number in range(1, n_images + 1))
    return "".join(names) + prompt


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int],
    tokens_per_tile: int,
    *,
    system: str = "default",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> Rendered:
    """Token ids and loss mask of a conversation, in the `internvl2_5` format.

    Args:
        messages: an optional system turn, then user and assistant turns.
        tokenizer: of the checkpoint; its BOS, if it has one, opens the prompt.
        tiles_per_image: tiles of each image in marker order, thumbnails included.
        tokens_per_tile: tokens a tile becomes (256 in the published models).
        system: "default" for `DEFAULT_SYSTEM`, "none" for no system turn at all, or the text.
            A system turn among the messages wins over it.
        add_generation_prompt: end with an open assistant turn, unless the last turn is the
            assistant's own.
        continue_final_message: leave the last turn open, so that the model goes on with it; it
            must be the assistant's.

    Returns:
        Ids with the loss on every answer and its `<|im_end|>`, and on nothing else; there is none
        on an answer that is left open.

    Raises:
        ValueError: malformed messages, images and markers that differ in number, or a last turn
            that cannot be continued.
    """
    if not messages:
        raise ValueError("the conversation is empty; give at least one user message")
    checked = [_stretches(message, i) for i, message in enumerate(messages)]
    n_markers = sum(len(stretches) - 1 for stretches in checked)
    if n_markers != len(tiles_per_image):
        raise ValueError(
            f"{len(tiles_per_image)} image(s) given but {n_markers} image marker(s) in the "
            f"messages; write one '{IMAGE_MARKER}' per image"
        )
    if any(tiles < 1 for tiles in tiles_per_image):
        raise ValueError(f"every image needs at least one tile, got {list(tiles_per_image)}")
    turns = [(message["role"], part) for message, part in zip(messages, checked, strict=True)]
    if turns[0][0] != "system" and system != "none":
        turns.insert(0, ("system", [DEFAULT_SYSTEM if system == "default" else system]))

    if continue_final_message:
        _check_open_answer(*turns[-1], f"messages[{len(messages) - 1}]")

    writer = _Writer(tokenizer)
    images = iter(tiles_per_image)
    for number, (role, (first, *rest)) in enumerate(turns, start=1):
        start = writer.open_turn(f"{role}\n{first}")
        for stretch in rest:
            writer.image(next(images) * tokens_per_tile)
            writer.text(stretch)
        if continue_final_message and number == len(turns):
            break
        writer.control(tokenizer.im_end_id)
        if role == "assistant":
            # The header is counted, not searched for: where a token spans the end of the header
            # and the start of the answer, it is masked, as upstream does.
            header = 1 + len(tokenizer.encode_text("assistant\n"))
            writer.learn_from(start + header)
        writer.text("\n")
    if add_generation_prompt and turns[-1][0] != "assistant":
        writer.open_turn("assistant\n")
    return Rendered(
        np.array(writer.ids, dtype=np.int32),
        np.array(writer.mask, dtype=np.bool_),
        tuple(writer.image_spans),
    )


def _check_open_answer(role: str, stretches: list[str], where: str) -> None:
    if role != "assistant":
        raise ValueError(
            f"{where}.role is {role!r}; only an assistant's message can be continued: end with one"
        )
    if not stretches[0].strip():
        raise ValueError(
            f"{where}.content is empty; give the beginning of the answer that is to be continued, "
            "or end with the user's message"
        )


def truncate(rendered: Rendered, max_length: int) -> tuple[Rendered, int]:
    """Cut a rendered conversation off at max_length tokens, from the right.

    Returns:
        The shortened conversation and the number of tokens cut, 0 when it already fitted.

    Raises:
        ValueError: the cut would take an image, or a part of one, away.
    """
    length = len(rendered.input_ids)
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; give at least 1")
    if length <= max_length:
        return rendered, 0
    last = max((stop for _, stop in rendered.image_spans), default=0)
    if last > max_length:
        raise ValueError(
            f"cutting {length} tokens down to {max_length} would cut into an image (images reach "
            f"up to token {last}); raise max_length or lower max_tiles"
        )
    shortened = Rendered(
        rendered.input_ids[:max_length], rendered.loss_mask[:max_length], rendered.image_spans
    )
    return shortened, length - max_length


class _Writer:
    """Ids, loss mask and image positions of a conversation in the making."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.mask: list[bool] = [False] * len(self.ids)
        self.image_spans: list[tuple[int, int]] = []

    def control(self, *ids: int) -> None:
        """Append tokens by id."""
        self.ids += ids
        self.mask += [False] * len(ids)

    def text(self, stretch: str) -> None:
        """Append one stretch of ordinary text."""
        self.control(*self.tokenizer.encode_text(stretch))

    def open_turn(self, stretch: str) -> int:
        """Append `<|im_start|>` and a stretch that begins with the role; where the turn starts."""
        start = len(self.ids)
        self.control(self.tokenizer.im_start_id)
        self.text(stretch)
        return start

    def image(self, n_tokens: int) -> None:
        """Append an image of n_tokens places."""
        start = len(self.ids)
        tokenizer = self.tokenizer
        self.control(tokenizer.img_start_id, *[tokenizer.img_context_id] * n_tokens)
        self.control(tokenizer.img_end_id)
        self.image_spans.append((start, len(self.ids)))

    def learn_from(self, start: int) -> None:
        """Put the loss on everything from start to the present end."""
        self.mask[start:] = [True] * len(self.mask[start:])


def _stretches(message: Message, index: int) -> list[str]:
    """A message's text, split where its images stand: one stretch more than images.

    Raises:
        ValueError: an unknown role or part, or an image outside a user turn.
    """
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"{where}.role is {role!r}; use 'system', 'user' or 'assistant'")
    if role == "system" and index:
        raise ValueError(f"{where}.role is 'system'; only the first message may be")
    if isinstance(content, str):
        most = message.get(MARKERS, -1)
        return content.split(IMAGE_MARKER, most) if role == "user" else [content]
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}.content must be text or a list of parts, not {content!r}")
    stretches = [""]
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            stretches[-1] += part["text"]
        elif kind == "image" and role == "user":
            # The line break belongs to the image: transformers' template writes it too.
            stretches.append("\n")
        elif kind == "image":
            raise ValueError(
                f"{where}.content[{number}] is an image, but the role is {role!r}; only user "
                "turns may hold images: move it to one"
            )
        else:
            raise ValueError(
                f"{where}.content[{number}] must be {{'type': 'text', 'text': ...}} or "
                f"{{'type': 'image'}}, not {part!r}"
            )
    return stretches
