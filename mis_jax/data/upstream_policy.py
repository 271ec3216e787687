"""`data.rows: upstream`: annotations as the official code takes them, and what strict would refuse.

Source: `LazySupervisedDataset` and `preprocess_internvl2_5` in OpenGVLab/InternVL,
`internvl_chat/internvl/train/`. What makes it fail there, and put a random other sample in the
place, is refused here too.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from mis_jax.data.chat_template import IMAGE_MARKER, MARKERS, checked_turns


def upstream_messages(fields: Mapping[str, Any], images: int) -> list[dict[str, Any]]:
    """The messages of checked fields; markers beyond the images are text.

    Raises:
        ValueError: turns that are none, or fewer markers than images.
    """
    turns, left, messages = _marked(fields), images, []
    for role, value in turns:
        message: dict[str, Any] = {"role": role, "content": value}
        if role == "user":
            message[MARKERS] = min(value.count(IMAGE_MARKER), left)
            left -= message[MARKERS]
        messages.append(message)
    if left:
        raise ValueError(
            f"field 'image' names {images} image(s) but the human turns of 'conversations' have "
            f"{images - left} {IMAGE_MARKER}; write one {IMAGE_MARKER} for each image"
        )
    return messages


def _marked(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Roles and texts; one image named as a string comes first, unless the first turn shows it."""
    turns = checked_turns(fields)
    image, (role, value) = fields.get("image"), turns[0]
    if image and isinstance(image, str) and IMAGE_MARKER not in value:
        turns[0] = role, f"{IMAGE_MARKER}\n{value}"
    return turns


def deviations(annotations: Iterable[Any]) -> dict[str, int]:
    """How many annotations are of each kind that strict would refuse or read in another way."""
    counts: Counter[str] = Counter()
    for annotation in annotations:
        if not annotation.problem:
            try:
                counts.update(_kinds(annotation.fields, len(annotation.images)))
            except ValueError:  # refused by both
                continue
    return dict(sorted(counts.items()))


def _kinds(fields: Mapping[str, Any], images: int) -> set[str]:
    upstream_messages(fields, images)  # or it is refused
    turns = checked_turns(fields)
    spoken = [role for role, _ in turns if role != "system"]
    markers = sum(value.count(IMAGE_MARKER) for role, value in turns if role == "user")
    image = fields.get("image")
    found = {
        "an empty list or name of images": image is not None and not image,
        "<image> without an image": bool(markers) and not images,
        "more <image> than images": markers > images > 0,
        "a single image whose <image> is not in the first turn": (
            isinstance(image, str)
            and images == 1
            and markers > 0
            and IMAGE_MARKER not in turns[0][1]
        ),
        "an empty answer": any(r == "assistant" and not v.strip() for r, v in turns),
        "no answer at the end": spoken[-1:] != ["assistant"],
        "an answer first": spoken[:1] == ["assistant"],
        "two turns of a kind in a row": any(a == b for a, b in pairwise(spoken)),
    }
    return {kind for kind, holds in found.items() if holds}
