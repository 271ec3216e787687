"""Prompts from the command line or a file, answers to a file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mis_jax.data.processor import Processor
from mis_jax.generation.answers import Completion, answer
from mis_jax.generation.sampling import Sampling
from mis_jax.model.internvl import InternVL


def with_image_markers(prompt: str, images: int) -> str:
    """The prompt, its images named before it as InternVL's demo does where it has no <image>."""
    if not images or "<image>" in prompt:
        return prompt
    if images == 1:
        return f"<image>\n{prompt}"
    names = "".join(f"Image-{number}: <image>\n" for number in range(1, images + 1))
    return names + prompt


@dataclass(frozen=True)
class Settings:
    """How prompts are answered; the same for every prompt of a file."""

    sampling: Sampling = field(default_factory=Sampling)
    system: str = "default"
    max_new_tokens: int = 1024
    max_tiles: int | None = None  # per conversation; None is the checkpoint's own
    stop: tuple[str, ...] = ()
    int8_cache: bool = False


def ask_once(
    model: InternVL,
    processor: Processor,
    prompt: str,
    images: Sequence[Path],
    settings: Settings,
) -> Completion:
    """One answer."""
    return _ask(model, processor, [Question("0", 0, prompt, list(images))], settings)[0]


def answer_file(
    model: InternVL,
    processor: Processor,
    questions: Path,
    answers: Path,
    settings: Settings,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Answer JSON lines of `id`, `prompt` and `images`; rows already in `answers` are kept.

    Answers are written in the order of the questions, each as soon as it may.
    """
    asked = _read_questions(questions)
    done = _read_done(answers)
    waiting = [question for question in asked if question.id not in done]
    finished = len(asked) - len(waiting)
    answers.parent.mkdir(parents=True, exist_ok=True)
    with answers.open("a", encoding="utf-8") as file:

        def write(index: int, completion: Completion) -> None:
            line = {"id": waiting[index].id, **printed(completion)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        def show(answered: int, total: int, tokens: int) -> None:
            if progress:
                progress(finished + answered, len(asked), tokens)

        _ask(model, processor, waiting, settings, each=write, progress=show)


def printed(completion: Completion) -> dict[str, Any]:
    """The fields of an answer that are shown and written."""
    return {
        "text": completion.text,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "finish_reason": completion.finish_reason,
    }


@dataclass(frozen=True)
class Question:
    """One row of a file; `place` names its random stream, so that a resumed file is the same."""

    id: str
    place: int
    prompt: str
    images: list[Path]


def _ask(
    model: InternVL,
    processor: Processor,
    questions: Sequence[Question],
    settings: Settings,
    **told: Any,
) -> list[Completion]:
    conversations = [
        [{"role": "user", "content": with_image_markers(q.prompt, len(q.images))}]
        for q in questions
    ]
    return answer(
        model,
        processor,
        conversations,
        [question.images for question in questions],
        sampling=settings.sampling,
        system=settings.system,
        max_new_tokens=settings.max_new_tokens,
        max_tiles=settings.max_tiles,
        row_ids=[question.place for question in questions],
        stop=settings.stop,
        int8_cache=settings.int8_cache,
        **told,
    )


def _read_questions(path: Path) -> list[Question]:
    rows: list[Question] = []
    seen: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; give JSON lines of id, prompt and images"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{path}, line {number}: field 'prompt' (a text) is missing")
        name, images = str(row.get("id", number - 1)), row.get("images", [])
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise ValueError(f"{path}, line {number}: field 'images' must be a list of paths")
        if name in seen:
            raise ValueError(f"{path}, line {number}: id '{name}' occurs twice; ids must differ")
        seen.add(name)
        pictures = [path.parent / image for image in images]
        rows.append(Question(name, number, row["prompt"], pictures))
    return rows


def _read_done(path: Path) -> set[str]:
    """Ids answered already; a line torn by a kill is cut off the file."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return {json.loads(line)["id"] for line in whole.decode("utf-8").splitlines()}
