"""MIS as one TensorFlow-Datasets set of array_record files: build it, list it, read its images.

Importing this imports neither tensorflow_datasets nor array_record; the first image read does.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mis_jax.data.mis.annotations import PUBLISHED_SIZES, VERSION, read_published
from mis_jax.parsing import parse_json
from mis_jax.storage.files import read_bytes, remove_file, replace_file, write_text
from mis_jax.storage.folders import finished_folder
from mis_jax.storage.jsonl import split_lines
from mis_jax.storage.locks import LOCK, locked
from mis_jax.storage.paths import destination_path

if TYPE_CHECKING:
    from mis_jax.data.mis.annotations import Split

NAME = "mis"
BAD_SAMPLES = "bad_samples.jsonl"
_INFO = "dataset_info.json"  # tensorflow_datasets writes it

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RecordImage:
    """An image file inside a built set; small, and safe to send to other processes."""

    folder: Path  # with the records
    split: str
    index: int  # of the record in its split
    number: int  # of the image in its record
    name: str  # as the annotation gives it
    width: int  # pixels
    height: int

    def __str__(self) -> str:
        return f"{self.name} (record {self.index} of '{self.split}' in {self.folder})"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels, without opening the image."""
        return self.width, self.height

    def encoded(self) -> bytes:
        """The image file as it was published.

        Raises:
            ValueError: the record is damaged or gone.
            RuntimeError: in a fork of a process that has read records itself.
        """
        _refuse_in_fork()
        try:
            return _record_images(self.folder, self.split, self.index)[self.number]
        except MemoryError:
            raise
        except Exception as error:  # the readers report damage with many exception types
            raise ValueError(
                f"image {self}: cannot be read ({error}); build the set again"
            ) from error


_last = threading.local()
_readers_process: int | None = None  # that opened the first reader


def _refuse_in_fork() -> None:
    """array_record's threads do not survive a fork: measured, the child hangs or crashes."""
    if _readers_process not in (None, os.getpid()):
        raise RuntimeError(
            "this process is a fork of one that has read records of a built set, which "
            "array_record cannot go on with; start processes with 'spawn', as grain does"
        )


def _record_images(folder: Path, split: str, index: int) -> Sequence[bytes]:
    """The image files of one record; each thread keeps its last, for the sample's other images."""
    key = (folder, split, index)
    if getattr(_last, "key", None) != key:
        images = _data_source(folder, split)[index]["images"]
        _last.key, _last.images = key, images
    return _last.images


@lru_cache(maxsize=16)
def _data_source(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds

    global _readers_process
    _readers_process = os.getpid()
    builder: Any = tfds.builder_from_directory(os.fspath(folder))
    return builder.as_data_source(split)


def _forget_readers() -> None:
    """A set that is built again in the place of another must not be read as the old one."""
    _data_source.cache_clear()
    _last.__dict__.clear()


def _built_folder(folder: Path) -> Path | None:
    """Where the records are: `folder` itself, or `mis/VERSION` in it."""
    for place in (Path(folder), Path(folder) / NAME / VERSION):
        try:
            info = parse_json(read_bytes(place / _INFO))
        except (OSError, ValueError):
            continue
        if isinstance(info, dict) and info.get("name") == NAME:
            return place
    return None


def is_built(folder: Path) -> bool:
    """Whether `folder` is the `out` of a `build`, or the folder of records inside it."""
    return _built_folder(folder) is not None


def read_built(folder: Path, split: str) -> list[tuple[dict[str, Any], tuple[RecordImage, ...]]]:
    """Annotation row, as published, and images of each sample of a split, in the file's order.

    Raises:
        ValueError: no built set, no such split, or a list that does not fit the records.
    """
    place = _built_folder(folder)
    if place is None:
        raise ValueError(f"{folder}: is not a set that `mis-jax data build` made; build it first")
    try:
        info = parse_json(read_bytes(place / _INFO))
        counts = {
            entry["name"]: sum(map(int, entry["shardLengths"])) for entry in info.get("splits", ())
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{place / _INFO}: lengths of the splits cannot be read ({error!r:.200}); "
            "build the set again"
        ) from None
    if split not in counts:
        raise ValueError(f"{place}: has no split '{split}'; it has {', '.join(counts)}")
    path = place / f"{split}.jsonl"
    try:
        entries = [parse_json(line) for line in split_lines(read_bytes(path))[0]]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); build the set again") from None
    if len(entries) != counts[split]:
        raise ValueError(
            f"{path}: has {len(entries)} lines for {counts[split]} records; build the set again"
        )
    return [
        (
            entry["row"],
            tuple(
                RecordImage(place, split, index, number, **image)
                for number, image in enumerate(entry["images"])
            ),
        )
        for index, entry in enumerate(entries)
    ]


@dataclass
class BuildReport:
    """What `build` did."""

    out: Path
    splits: dict[str, int] = field(default_factory=dict)  # samples stored, by split
    missing: list[str] = field(default_factory=list)  # splits whose file is not there
    size_notes: list[str] = field(default_factory=list)  # files of another size than published
    bad: list[dict[str, Any]] = field(default_factory=list)  # samples left out, with the reason


def build(
    root: Path,
    out: Path,
    *,
    on_bad_sample: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Check the published MIS files and store them in the new folder `out`, all or nothing.

    Every row is checked and every image decoded before anything is stored.

    Args:
        root: folder with `mis_train.json`, `mis_easy.json`, `mis_hard.json`, `mis_real.json`, or
            some of them, and the images they name.
        out: may not exist yet; `out/mis/VERSION/` gets the records and, beside them, a
            `<split>.jsonl` with the annotation rows and image sizes.
        on_bad_sample: "stop" stores nothing and lists every bad sample in
            `<out>.bad_samples.jsonl`; "skip" leaves them out and keeps that list with the records.
        workers: processes that decode images; one for each CPU without it.
        progress: called with (steps done, steps in all); a sample is one step when it is checked
            and one when it is stored.

    Raises:
        ValueError: no published file, bad samples, an `out` that exists, or another process that
            builds it.
        mis_jax.data.mis.verify_images.WorkersDied: a process that decodes images crashed.
    """
    from mis_jax.data.mis.verify_images import check_images

    root, out = Path(root), Path(out)
    if on_bad_sample not in ("stop", "skip"):
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}; use 'stop' or 'skip'")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1 or leave it out")
    show = progress or (lambda done, total: None)
    splits = read_published(root)
    report = BuildReport(out, missing=[name for name in PUBLISHED_SIZES if name not in splits])
    place = destination_path(out, "out")
    complaint = place.with_name(f"{place.name}.{BAD_SAMPLES}")
    with locked(place.with_name(f".{place.name}{LOCK}"), out), finished_folder(out) as work:
        checked = sum(len(split.samples) for split in splits.values())
        check_images(root, splits, workers, lambda done: show(done, 2 * checked))
        for split in splits.values():
            report.bad += sorted(split.bad, key=lambda entry: entry["row"])
        good = {name: split for name, split in splits.items() if split.samples}
        if report.bad and (on_bad_sample == "stop" or not good):
            replace_file(complaint, _lines(report.bad))
            raise ValueError(_bad_message(splits, report.bad, complaint))
        _store(work, root, good, report, lambda done, of: show(checked + done, checked + of))
    _forget_readers()
    remove_file(complaint)  # of an earlier attempt
    for name, split in splits.items():
        if split.total != PUBLISHED_SIZES[name]:
            report.size_notes.append(
                f"{split.path}: {split.total} samples, the published set has "
                f"{PUBLISHED_SIZES[name]}"
            )
        if name not in good:
            report.size_notes.append(f"{split.path}: every sample is bad; split '{name}' left out")
    return report


def _store(
    work: Path, root: Path, splits: dict[str, "Split"], report: BuildReport, show: Progress
) -> None:
    """Records, annotation rows and the list of what was left out."""
    from mis_jax.data.mis.builder import write_records

    total = sum(len(split.samples) for split in splits.values())
    done = 0

    def written() -> None:
        nonlocal done
        done += 1
        show(done, total)

    samples = {name: split.samples for name, split in splits.items()}
    place = write_records(work, root, samples, written)
    for name, stored in samples.items():
        entries = (
            {
                "row": sample.fields,
                "images": [
                    {"name": image, "width": width, "height": height}
                    for image, (width, height) in zip(sample.names, sample.sizes, strict=True)
                ],
            }
            for sample in stored
        )
        write_text(place / f"{name}.jsonl", _lines(entries))
        report.splits[name] = len(stored)
    if report.bad:
        write_text(place / BAD_SAMPLES, _lines(report.bad))


def _lines(entries: Iterable[Any]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _bad_message(splits: dict[str, "Split"], bad: Sequence[dict[str, Any]], complaint: Path) -> str:
    first = bad[0]
    rows = sum(split.total for split in splits.values())
    return (
        f"{len(bad)} of {rows} samples are bad, nothing was built; the first is "
        f"{splits[first['split']].path}, row {first['row']}: {first['reason']}; {complaint} lists "
        "them all: repair them, or build with --on-bad-sample skip"
    )
