"""Training sources to annotations by index, and how several sources mix into one epoch."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.config import Source
from mis_jax.data.annotation_store import Annotation, AnnotationStore
from mis_jax.data.annotations import Entry, check_entry, read_jsonl, read_list
from mis_jax.data.meta import read_meta
from mis_jax.data.mis.annotations import PUBLISHED_SIZES

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mixture:
    """The annotations of an epoch and where they come from.

    Attributes:
        annotations: one source after the other, each in the order of its file.
        sources: of each source `file`, `kind`, `available` and `used`; `copies` where it
            has a weight; `ids` of the chosen ones, in order, where not all were taken (beside
            `copies`, of those that come on top of the whole copies); `sets` of a meta file.
            Plain values, for a run folder's JSON.
        notes: what a reader of the run should know, such as a published set of another size.
    """

    annotations: AnnotationStore
    sources: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True)
class _Found:
    """What one source holds."""

    file: Path
    annotations: AnnotationStore
    notes: list[str] = field(default_factory=list)
    sets: list[dict[str, Any]] = field(default_factory=list)


def read_mixture(sources: Sequence[Source], seed: int) -> Mixture:
    """The annotations of an epoch, the same in every epoch.

    Without `count` and `weight` a source gives all its annotations. With `count` it gives that
    many, chosen by (seed, place of the source). With weights an epoch has as many samples as the
    sources have together, and each source has its share of them, rounded so that the sum is kept:
    whole copies of the source, and the rest chosen by (seed, place of the source).

    Raises:
        ValueError: a source that cannot be read, more asked for than there are, or a weight
            at some sources only.
    """
    found = [_read(source) for source in sources]
    notes = [note for one in found for note in one.notes]
    for note in notes:
        _log.warning(note)
    wanted = _wanted(sources, found)
    parts: list[AnnotationStore] = []
    told_of: list[dict[str, Any]] = []
    for place, (source, one, count) in enumerate(zip(sources, found, wanted, strict=True)):
        available = len(one.annotations)
        copies, rest = divmod(count, available)
        chosen = np.random.default_rng((seed, place)).permutation(available)[:rest]
        whole, picked = np.tile(np.arange(available), copies), np.sort(chosen)
        parts.append(one.annotations.take(np.concatenate([whole, picked])))
        told = {"file": str(one.file), "kind": source.kind, "available": available, "used": count}
        told |= {"copies": copies} if source.weight is not None else {}
        told |= {"ids": [one.annotations[place].id for place in picked]} if rest else {}
        told |= {"sets": one.sets} if one.sets else {}
        told_of.append(told)
    return Mixture(AnnotationStore.joined(parts), told_of, notes)


def read_sources(sources: Sequence[Source], seed: int) -> AnnotationStore:
    """The annotations of `read_mixture` alone."""
    return read_mixture(sources, seed).annotations


def read_source(source: Source) -> AnnotationStore:
    """Every annotation of one source; the images it names are not opened yet.

    An entry that cannot be used is one with a `problem`.

    Raises:
        ValueError: a file that cannot be read as a whole, or holds no sample.
    """
    return _read(source).annotations


def annotation_file(source: Source) -> Path:
    """The file that lists a source's samples, or a meta file's sets."""
    if source.kind == "mis":
        assert source.root is not None
        return source.root / f"mis_{source.split}.json"
    assert source.path is not None
    return source.path


def size_note(source: Source, count: int, file: Path | None = None) -> str | None:
    """A remark when a published set, read from `file`, does not have its published size."""
    wanted = PUBLISHED_SIZES.get(source.split) if source.kind == "mis" else None
    if wanted is None or wanted == count:
        return None
    return f"{file or annotation_file(source)}: {count} samples, the published set has {wanted}"


def _wanted(sources: Sequence[Source], found: Sequence[_Found]) -> list[int]:
    """How many annotations each source gives to an epoch, copies included."""
    if any(source.weight is not None for source in sources):
        return _shares(sources, sum(len(one.annotations) for one in found))
    wanted = []
    for place, (source, one) in enumerate(zip(sources, found, strict=True)):
        available = len(one.annotations)
        if source.count is not None and source.count > available:
            raise ValueError(
                f"{one.file}: count is {source.count} but the file has "
                f"{available} samples; lower data.sources[{place}].count"
            )
        wanted.append(available if source.count is None else source.count)
    return wanted


def _shares(sources: Sequence[Source], total: int) -> list[int]:
    """Shares by weight of `total` samples, by the largest remainder."""
    weights = []
    for place, source in enumerate(sources):
        if source.weight is None:
            raise ValueError(
                f"data.sources[{place}] has no weight, but another source has; "
                "give every source a weight, or none"
            )
        weights.append(Fraction(str(source.weight)))  # as written: 0.1 is a tenth
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(shares)), key=lambda place: shares[place] - exact[place])
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    if 0 in shares:
        place = shares.index(0)
        raise ValueError(
            f"data.sources[{place}].weight {sources[place].weight} is less than one of the "
            f"{total} samples of an epoch; raise it or take the source out"
        )
    return shares


def _read(source: Source) -> _Found:
    path = annotation_file(source)
    if source.kind == "meta":
        return _read_sets(source, path)
    if source.kind == "mis":
        found = _built(source, path)
        if found is None:
            entries = read_list(path, pictured=True)
            found = _Found(path, _stored(entries, path.parent, source.max_tiles, source.augment))
        note = size_note(source, len(found.annotations), found.file)
        return _Found(found.file, found.annotations, [note] if note else [])
    entries = read_jsonl(path) if source.kind == "jsonl" else read_list(path)
    root = source.root or path.parent
    return _Found(path, _stored(entries, root, source.max_tiles, source.augment))


def _annotations(
    entries: Iterable[Entry], root: Path, max_tiles: int | None, augment: bool
) -> Iterator[Annotation]:
    return (
        Annotation(
            id=entry.id,
            where=entry.where,
            images=tuple(root / name for name in entry.images),
            fields=entry.fields,
            problem=entry.problem,
            max_tiles=max_tiles,
            augment=augment,
        )
        for entry in entries
    )


def _stored(
    entries: Iterable[Entry], root: Path, max_tiles: int | None, augment: bool
) -> AnnotationStore:
    return AnnotationStore.of(_annotations(entries, root, max_tiles, augment))


def _built(source: Source, published: Path) -> _Found | None:
    """The annotations of a set that `mis-jax data build` wrote, None where `root` holds none."""
    root = source.root
    assert root is not None
    if published.exists() or not root.is_dir():
        return None
    from mis_jax.data.mis import dataset  # most runs do without it

    if not dataset.is_built(root):
        return None
    samples = dataset.read_built(root, source.split)
    where = f"{root}, split {source.split}"
    if not samples:
        raise ValueError(f"{where}: holds no sample; build the set again")
    entries = [
        check_entry(fields, f"{where}, row {index}", index, pictured=True)
        for index, (fields, _) in enumerate(samples)
    ]
    annotations = list(_annotations(entries, root, source.max_tiles, source.augment))
    for index, (annotation, (_, images)) in enumerate(zip(annotations, samples, strict=True)):
        problem = annotation.problem
        if not problem and len(images) != len(annotation.images):
            problem = (
                f"{annotation.where}: field 'image' names {len(annotation.images)} image(s) but "
                f"{len(images)} are stored; build the set again"
            )
        annotations[index] = replace(annotation, images=() if problem else images, problem=problem)
    return _Found(root, AnnotationStore.of(annotations))


def _read_sets(source: Source, path: Path) -> _Found:
    """What a set says of tiles and augmentation goes before what the source says."""
    sets, sizes = read_meta(path), []

    def annotations() -> Iterator[Annotation]:
        for one in sets:
            max_tiles = source.max_tiles if one.max_tiles is None else one.max_tiles
            augment = source.augment if one.augment is None else one.augment
            sizes.append(0)
            for each in _annotations(read_jsonl(one.annotation), one.root, max_tiles, augment):
                sizes[-1] += 1
                yield each

    stored = AnnotationStore.of(annotations())  # in one file: a meta may name thousands of sets
    notes: list[str] = []
    places: list[np.ndarray] = []
    told: list[dict[str, Any]] = []
    start = 0
    for one, available in zip(sets, sizes, strict=True):
        if one.length not in (None, available):
            notes.append(
                f"{path}, set '{one.name}': length is {one.length}, "
                f"{one.annotation} has {available} samples"
            )
        used = one.taken(available)
        if used < 1:
            raise ValueError(
                f"{path}, set '{one.name}': repeat_time {one.repeat} leaves none of its "
                f"{available} samples; raise it or take the set out"
            )
        places.append(start + np.arange(used) % available)
        start += available
        file = str(one.annotation)
        told.append({"name": one.name, "file": file, "available": available, "used": used})
    return _Found(path, stored.take(np.concatenate(places)), notes, told)
