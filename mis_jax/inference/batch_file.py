"""Prompts from the command line or a file, answers to a file."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mis_jax.data.chat_template import with_image_markers
from mis_jax.data.images import image_size
from mis_jax.data.processor import Processor
from mis_jax.inference.offline import Completion, answer
from mis_jax.inference.requests import check_stop
from mis_jax.inference.sampling import Sampling
from mis_jax.model.internvl import InternVL
from mis_jax.parsing import parse_json
from mis_jax.storage.files import make_folder, read_bytes, read_text, replace_file
from mis_jax.storage.hashing import digest, file_digest
from mis_jax.storage.jsonl import AppendLog, split_lines
from mis_jax.storage.locks import LOCK, locked


@dataclass(frozen=True)
class Settings:
    """How prompts are answered; the same for every prompt of a file."""

    sampling: Sampling = field(default_factory=Sampling)
    system: str = "default"
    max_new_tokens: int = 1024
    max_tiles: int | None = None  # per conversation; None is the checkpoint's own
    stop: tuple[str, ...] = ()
    int8_cache: bool = False

    def __post_init__(self) -> None:
        check_stop(self.stop)


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
    *,
    fingerprint: str,
    progress: Callable[[int, int, int], None] | None = None,
) -> int:
    """Answer JSON lines of `id`, `prompt` and `images`; how many ended in an error.

    Answers are written in the order of the questions, each as soon as it may. Rows that `answers`
    has are kept: each carries a key of its question, its images, the settings and the model's
    `fingerprint`. A question that cannot be asked (an image that cannot be used, a prompt longer
    than the context) gets a row with `error`, and is asked again by the next call. Raises
    ValueError where a row answers something else, and where another process writes `answers`.
    """
    make_folder(answers.parent)
    with locked(answers.with_name(f".{answers.name}{LOCK}"), answers):
        return _answer_file(model, processor, questions, answers, settings, fingerprint, progress)


def _answer_file(
    model: InternVL,
    processor: Processor,
    questions: Path,
    answers: Path,
    settings: Settings,
    fingerprint: str,
    progress: Callable[[int, int, int], None] | None,
) -> int:
    asked = _read_questions(questions)
    keys: dict[str, str] = {}
    errors: dict[str, str] = {}
    for question in asked:
        try:
            keys[question.id] = _key(question, settings, fingerprint)
        except ValueError as error:
            errors[question.id] = str(error)
    done = _read_done(answers, keys)
    errors = {name: message for name, message in errors.items() if name not in done}
    waiting = [q for q in asked if q.id not in done and q.id not in errors]
    finished = len(asked) - len(waiting)
    with AppendLog(answers, durable=False) as log:

        def write(index: int, completion: Completion) -> None:
            name = waiting[index].id
            log.append([{"id": name, **printed(completion), "key": keys[name]}])

        def fail(index: int, message: str) -> None:
            question = waiting[index]
            errors[question.id] = f"{questions}, line {question.place}: {message}"
            log.append([{"id": question.id, "error": errors[question.id]}])

        def show(answered: int, total: int, tokens: int) -> None:
            if progress:
                progress(finished + answered, len(asked), tokens)

        log.append({"id": name, "error": message} for name, message in errors.items())
        _ask(model, processor, waiting, settings, each=write, failed=fail, progress=show)
    return len(errors)


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
        # Only "\n" ends a line: str.splitlines() would also cut at U+2028, which JSON allows.
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; give JSON lines of id, prompt and images"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not valid JSON ({error}); correct the line"
            ) from None
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


def _key(question: Question, settings: Settings, fingerprint: str) -> str:
    """What decides an answer; ValueError where an image is missing or none."""
    for image in question.images:
        image_size(image)
    asked = [question.prompt, question.place, [file_digest(image) for image in question.images]]
    return digest([asked, asdict(settings), fingerprint])


def _read_done(path: Path, keys: dict[str, str]) -> set[str]:
    """Ids answered already; torn lines and rows of errors are taken off the file.

    Raises:
        ValueError: a row answers another question, or under other settings or another model.
    """
    if not path.exists():
        return set()
    content = read_bytes(path)
    lines, torn = split_lines(content)
    begin = b'{"id": '
    done, kept = set(), []
    for number, line in enumerate([*lines, torn], start=1):
        ours = line.startswith(begin)
        if number > len(lines) and (ours or begin.startswith(line)):
            break  # nothing, or torn by a kill
        try:
            row = parse_json(line) if ours else {}
            name, key = row["id"], row.get("key")
        except (ValueError, KeyError):
            raise ValueError(
                f"{path}, line {number}: no answer of this command; give another --out"
            ) from None
        if row.keys() == {"id", "error"}:
            continue
        if name in keys and key != keys[name]:
            raise ValueError(
                f"{path}, line {number}: the answer to '{name}' is one to another prompt or other "
                "images, or under other settings or of another model; give another --out"
            )
        done.add(name)
        kept.append(line + b"\n")
    if b"".join(kept) != content:
        replace_file(path, b"".join(kept))
    return done
