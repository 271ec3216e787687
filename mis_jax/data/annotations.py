"""Annotation files to checked entries: JSON lists and InternVL's jsonl, LLaVA's names included.

An entry that cannot be used keeps its place and says why (`Entry.problem`), so that a run can
report every one of them. Only a file that cannot be read at all raises.

Source: the fields are those of InternVL's chat data (`LazySupervisedDataset` in OpenGVLab/InternVL,
`internvl_chat/internvl/train/internvl_chat_finetune.py`), of LLaVA and M4-Instruct, and of
LLaMA-Factory (`images`, `messages`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mis_jax.data.chat_template import IMAGE_MARKER, count_images, from_sharegpt
from mis_jax.parsing import parse_json
from mis_jax.storage.files import open_binary, read_bytes

_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class Entry:
    """One sample as its file has it, under InternVL's names of fields.

    Attributes:
        where: file and place in it.
        id: the file's, or the sample's place among the others.
        fields: has `conversations` where `problem` is empty; its turns are checked when rendered.
        images: names of the images, as in the file.
        problem: why the entry cannot be used, with its place and the remedy; empty for a good one.
    """

    where: str
    id: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    problem: str = ""


def read_list(path: Path, *, pictured: bool = False) -> list[Entry]:
    """The entries of a JSON list, or of an object of samples.

    Args:
        path: the file, UTF-8.
        pictured: its samples have images by definition of their set.

    Raises:
        ValueError: a file that is missing, unreadable, not JSON, or empty.
    """
    return [
        check_entry(sample, f"{path}, row {index}", index, pictured=pictured)
        for index, sample in enumerate(read_samples(path))
    ]


def read_samples(path: Path) -> list[Any]:
    """The samples of a JSON list, or of an object of them, unchecked; raises as `read_list`."""
    content = _read(path)  # says itself that a file is missing
    try:
        content = parse_json(content.decode("utf-8-sig"))  # Windows editors put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    except ValueError as error:
        # What a file with one object a line looks like to a reader of lists.
        lines = "Extra data: line 2 " in str(error)
        remedy = "read it as kind jsonl" if lines else "download the file again"
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from None
    samples = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(samples, list):
        raise ValueError(f"{path}: holds {type(content).__name__}; expected a list of samples")
    return _some(samples, path)


def read_jsonl(path: Path) -> Iterator[Entry]:
    """The entries of a file with one JSON object a line, as they are read; blank lines are none.

    Raises:
        ValueError: a file that is missing, unreadable or empty.
    """
    index = 0
    # Only "\n" ends a line: str.splitlines() would also cut at U+2028, which JSON allows in a text.
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            entry = check_entry(parse_json(text), where, index)
        except UnicodeDecodeError as error:
            problem = f"{where}: not UTF-8 text ({error}); save it as UTF-8 or remove the line"
            entry = Entry(where, str(index), problem=problem)
        except ValueError as error:
            problem = f"{where}: not valid JSON ({error}); repair or remove the line"
            entry = Entry(where, str(index), problem=problem)
        yield entry
        index += 1
    if not index:
        raise _empty(path)


def _lines(path: Path) -> Iterator[bytes]:
    with _read_errors(path), open_binary(path) as file:
        for line in file:
            yield line.removesuffix(b"\n")


def check_entry(sample: Any, where: str, index: int, *, pictured: bool = False) -> Entry:
    """A sample under InternVL's names of fields, or why it cannot be used.

    Args:
        sample: as the file has it.
        where: file and place in it.
        index: its place, which is its id where the file gives none.
        pictured: it must have images.
    """
    name = entry_id(sample, index)
    try:
        fields, images = checked_fields(sample, pictured=pictured)
    except ValueError as error:
        fields = sample if isinstance(sample, dict) else {}
        return Entry(where, name, fields, problem=f"{where}: {error}")
    return Entry(where, name, fields, images)


def entry_id(sample: Any, index: int) -> str:
    """The id that a sample gives, or its place."""
    names = sample if isinstance(sample, dict) else {}
    name = next((str(names[key]) for key in ("id", "sample_id") if _has(names, key)), str(index))
    # Halves of surrogate pairs (see below) as they are written: an id is for people and for files.
    return name.encode("utf-8", "backslashreplace").decode()


def checked_fields(
    sample: Any, *, pictured: bool = False
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """A sample under InternVL's names of fields, and the names of its images.

    Raises:
        ValueError: why it cannot be used, with the field and the remedy.
    """
    if not isinstance(sample, dict):
        raise ValueError(
            f"expected an object with 'conversations', found {sample!r:.60}; "
            "check that the source's kind fits the file"
        )
    fields = _renamed(sample)
    images = _images(fields, pictured)
    _check_characters(images, fields["conversations"])
    return fields, images


def checked_messages(fields: Mapping[str, Any], images: int) -> list[dict[str, str]]:
    """The messages of checked fields, which have a marker for each image; one needs none.

    Raises:
        ValueError: turns that `from_sharegpt` refuses, another number of markers, or an empty
            list of images.
    """
    if _has(fields, "image") and not fields["image"]:
        raise ValueError(
            "field 'image' is empty; name its images, or drop the field for a text sample"
        )
    messages = from_sharegpt(fields)
    markers = count_images(messages)
    if images == markers or (images == 1 and markers == 0):
        return messages
    if images == 0:
        raise ValueError(
            f"field 'image' is missing but 'conversations' has {markers} {IMAGE_MARKER}; "
            f"name the images or take the {IMAGE_MARKER} out"
        )
    raise ValueError(
        f"field 'image' names {images} image(s) but the human turns of 'conversations' have "
        f"{markers} {IMAGE_MARKER}; write one {IMAGE_MARKER} for each image"
    )


def _has(sample: Mapping[str, Any], name: str) -> bool:
    """Tables that were exported to JSON say null where a sample has no such field."""
    return sample.get(name) is not None


def _renamed(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with `conversations` and `image`, whatever the file calls them."""
    fields = sample
    if not _has(sample, "conversations"):
        if not _has(sample, "messages"):
            raise ValueError("field 'conversations' is missing; add the turns or remove the row")
        fields = {name: sample[name] for name in sample if name != "messages"}
        fields["conversations"] = _turns(sample["messages"])
    if _has(sample, "images") and not _has(sample, "image"):
        fields = {name: fields[name] for name in fields if name != "images"}
        fields["image"] = sample["images"]
    return fields


def _turns(messages: Any) -> list[dict[str, str]]:
    """OpenAI's and LLaMA-Factory's messages as turns of a conversation."""
    if not isinstance(messages, list):
        raise ValueError(f"field 'messages' is {messages!r:.60}; give a list of messages")
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(
                f"field 'messages[{index}]' must be an object with 'role' and a text 'content', "
                f"found {message!r:.60}; write its images as <image> in the text"
            )
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(
                f"field 'messages[{index}].role' is {role!r:.60}; "
                "use 'user', 'assistant' or 'system'"
            )
        turns.append({"from": _ROLES[role], "value": message["content"]})
    return turns


def _images(fields: Mapping[str, Any], pictured: bool) -> tuple[str, ...]:
    for name in ("video", "videos"):
        if fields.get(name):
            raise ValueError(
                f"field '{name}' is {fields[name]!r:.60}, and videos are not supported; "
                "give frames of it as 'image' or remove the row"
            )
    if not _has(fields, "image"):
        if pictured:
            raise ValueError("field 'image' is missing; name the images or remove the row")
        return ()
    images = fields["image"]
    names = [images] if isinstance(images, str) and images else images
    if names == "" or names == []:  # refused when the messages are checked, or a text sample
        return ()
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"field 'image' is {images!r:.60}; give a path or a list of paths")
    return tuple(names)


def _check_characters(images: tuple[str, ...], conversations: Any) -> None:
    """JSON can write half of a surrogate pair, which no tokenizer and no file name takes."""
    turns = conversations if isinstance(conversations, list) else []
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    try:
        "".join([*images, *(value for value in values if isinstance(value, str))]).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"holds {half!a}, half of a surrogate pair and no character; repair or remove the row"
        ) from None


def _read(path: Path) -> bytes:
    with _read_errors(path):
        return read_bytes(path)


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the source's root, path and split") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a file") from None


def _some(entries: list[Any], path: Path) -> list[Any]:
    if not entries:
        raise _empty(path)
    return entries


def _empty(path: Path) -> ValueError:
    return ValueError(f"{path}: holds no sample; take the source out or fill the file")
