"""Write safety chain-of-thought labels for your own two-picture questions, by a teacher model.

Any vision model behind an OpenAI-compatible address will do. DATA is a MIS file, of the test style
(question, image_path1, image_path2) or of the training style, as JSON or jsonl. OUT gets
labels.jsonl, mis_train.json and review.csv. The same command again asks only for what is missing.

    python tools/write_labels.py mine.json labels --base-url http://127.0.0.1:8000/v1 --model NAME
    python tools/write_labels.py mine.json labels --base-url http://127.0.0.1:8000/v1 --model NAME \
--review checked.csv

Exit code 0 when every sample has a label or was turned down in the review, 1 when some have none,
2 for bad input.
"""

import asyncio
import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from label_prompt import PROMPT_VERSION, find_flags
from label_review import (
    SHOWN,
    Entries,
    Reviewed,
    merge_entries,
    read_entries,
    review,
    write_review,
)
from label_rows import Sample, read_samples, sample_key, training_row
from label_teacher import Reply, Stopped, Teacher, ask_all

from mis_jax.storage.json_files import replace_json
from mis_jax.storage.jsonl import AppendLog
from mis_jax.terminal import Bars, open_console, steps_bar

_IDS_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python tools/write_labels.py mine.json labels --base-url URL --model NAME"""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The samples: a MIS file of either style, .json or .jsonl."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write, or to go on with."""
    base_url: str
    """Where the teacher answers, such as http://127.0.0.1:8000/v1."""
    model: str
    """The teacher's name there."""
    root: Path | None = None
    """Folder that image paths are relative to; the folder of DATA without it."""
    api_key_env: str | None = None
    """Environment variable that holds the key; local servers need none."""
    concurrency: int = 8
    """Samples asked at the same time."""
    timeout: float = 300.0
    """Seconds to wait for an answer, each attempt."""
    retries: int = 4
    """Further attempts after a timeout, HTTP 429 or 5xx."""
    max_tokens: int = 1024
    """Longest reply, in tokens; a reply cut off there is no label."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the server calls that field; newer models of OpenAI know the second only."""
    temperature: float | None = 0.0
    """None leaves it to the server, which some reasoning models demand."""
    limit: int | None = None
    """Ask only about the first so many samples, for a trial."""
    retry_refused: bool = False
    """Ask again where the teacher refused."""
    review: Path | None = None
    """An edited copy of review.csv; the one in OUT is always read."""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"--base-url {self.base_url}: give an address such as http://host/v1")
        least = {"concurrency": 1, "retries": 0, "max_tokens": 1, "limit": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {value}: give at least {bound}")
        if self.timeout <= 0:
            raise ValueError(f"--timeout {self.timeout}: give a number of seconds above 0")


def main(words: Sequence[str] | None = None) -> int:
    """The exit code."""
    console = open_console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        config = (tyro.conf.FlagCreatePairsOff,)
        return run(tyro.cli(Settings, description=__doc__, args=words, config=config), console)
    except KeyboardInterrupt:
        say("stopped; every reply so far is kept: run the same command again to go on")
        return 1
    except ValueError as error:
        say(f"write_labels: error: {error}")
        return 2
    except OSError as error:  # no room, no permission: what was written stays
        say(f"write_labels: error: {error}; every reply so far is kept")
        return 1


def run(settings: Settings, console: Console) -> int:
    """Ask for what is missing, write both files, and say in counts and ids how it stands."""
    teacher = _teacher(settings)
    root = settings.root or settings.data.parent
    samples = read_samples(settings.data, root)
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"{settings.out}: a file has this name; choose another folder")
    with steps_bar(console) as bars, AppendLog(settings.out / "labels.jsonl") as log:
        keys = _keys(samples, settings.model, bars)
        latest = _latest(log)
        asked = samples[: settings.limit]
        # Before any request: a review that cannot be used must not be found after an hour's work.
        _reviewed(samples, keys, latest, _entries(settings))
        stopped = ""
        try:
            asyncio.run(_ask_missing(asked, keys, latest, log, teacher, settings, bars))
        except Stopped as error:
            stopped = str(error)
        entries = _entries(settings)  # again: somebody may have gone on reading meanwhile
        reviewed = _reviewed(samples, keys, latest, entries)
        labelled = [training_row(item.sample, item.label) for item in reviewed if item.is_label]
        replace_json(settings.out / "mis_train.json", labelled)
        outdated = write_review(settings.out / "review.csv", reviewed, entries)
    settled = {item.sample.id for item in reviewed if item.is_label or item.ok == "no"}
    missing: dict[str, list[str]] = defaultdict(list)
    for sample in asked:
        if sample.id not in settled:
            missing[_reason(latest.get(keys[sample.id]))].append(sample.id)
    lines = _summary(settings, len(samples), reviewed, outdated, missing)
    for line in [*lines, *([f"stopped: {stopped}"] if stopped else [])]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if missing else 0


def _teacher(settings: Settings) -> Teacher:
    key = None
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise ValueError(
                f"--api-key-env {settings.api_key_env}: this variable is not set; export the key "
                "under that name, or leave the option out for a server without keys"
            )
    limits: dict[str, Any] = {settings.max_tokens_name: settings.max_tokens}
    if settings.temperature is not None:
        limits["temperature"] = settings.temperature
    return Teacher(
        settings.base_url,
        settings.model,
        api_key=key,
        timeout=settings.timeout,
        retries=settings.retries,
        limits=limits,
    )


def _latest(log: AppendLog) -> dict[str, dict[str, Any]]:
    """The last reply to every key."""
    for row in log.entries:
        if not {"key", "state", "label"} <= row.keys():
            raise ValueError(f"{log.path}: not a log of this script; choose another folder")
    return {row["key"]: row for row in log.entries}


def _entries(settings: Settings) -> Entries:
    """What has been decided so far: the review in OUT, and the given one over it."""
    own = settings.out / "review.csv"
    entries = read_entries(own) if own.exists() else {}
    if settings.review is not None:
        entries = merge_entries(entries, read_entries(settings.review))
    return entries


def _reviewed(
    samples: list[Sample],
    keys: dict[str, str],
    latest: dict[str, dict[str, Any]],
    entries: Entries,
) -> list[Reviewed]:
    """Every sample with a reply that a human can judge, in the order of the input."""
    rows = [(sample, latest.get(keys[sample.id])) for sample in samples]
    return [review(sample, row, entries) for sample, row in rows if row and row["state"] in SHOWN]


def _keys(samples: list[Sample], model: str, bars: Bars) -> dict[str, str]:
    """The content key of every sample, by id."""
    show = bars.task("reading pictures")
    keys = {}
    for number, sample in enumerate(samples, start=1):
        keys[sample.id] = sample_key(sample, model)
        show(number, len(samples))
    return keys


async def _ask_missing(
    samples: list[Sample],
    keys: dict[str, str],
    latest: dict[str, dict[str, Any]],
    log: AppendLog,
    teacher: Teacher,
    settings: Settings,
    bars: Bars,
) -> None:
    """Ask once for every key without a settled reply; each reply is on disk before the next."""
    settled = {"ok", "harmless"} if settings.retry_refused else {"ok", "harmless", "refused"}
    by_key = {keys[sample.id]: sample for sample in reversed(samples)}
    waiting = [
        sample
        for sample in samples
        if by_key[keys[sample.id]] is sample
        and latest.get(keys[sample.id], {}).get("state") not in settled
    ]
    show = bars.task("asking")
    done = len(by_key) - len(waiting)
    show(done, len(by_key))

    def record(sample: Sample, reply: Reply) -> None:
        nonlocal done
        row = _log_row(sample, keys[sample.id], reply, settings.model)
        log.append([row])
        latest[row["key"]] = row
        done += 1
        show(done, len(by_key))

    async with teacher:
        await ask_all(waiting, teacher.ask, record, settings.concurrency)


def _log_row(sample: Sample, key: str, reply: Reply, model: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": sample.id, "key": key, "model": model, "prompt": PROMPT_VERSION}
    row |= dataclasses.asdict(reply)
    row["flags"] = find_flags(reply.label) if reply.label else []
    return {name: value for name, value in row.items() if name not in ("error", "detail") or value}


def _reason(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not asked"
    return f"error ({row['error']})" if row["state"] == "error" else row["state"]


def _summary(
    settings: Settings,
    total: int,
    reviewed: list[Reviewed],
    outdated: int,
    missing: dict[str, list[str]],
) -> list[str]:
    """Lines for the console: counts and ids, never a question or a label."""
    labelled = [item for item in reviewed if item.is_label]
    flagged = sum(bool(item.flags) for item in labelled)
    agreed = sum(item.ok == "yes" for item in labelled)
    left_out = sum(item.ok == "no" for item in reviewed)
    lines = [
        f"{settings.out / 'mis_train.json'}: {len(labelled)} of {total} samples, {flagged} of them "
        f"flagged, {agreed} marked yes; {left_out} left out by review"
    ]
    for reason, ids in missing.items():
        more = ", ..." if len(ids) > _IDS_SHOWN else ""
        lines.append(f"no label: {len(ids)} {reason} (id {', '.join(ids[:_IDS_SHOWN])}{more})")
    if outdated:
        lines.append(f"decisions about replies that have changed since, not used: {outdated}")
    if agreed < len(labelled):
        lines.append(f"read {settings.out / 'review.csv'} before you train on these labels")
    return lines


if __name__ == "__main__":
    sys.exit(main())
