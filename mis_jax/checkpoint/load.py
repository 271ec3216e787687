"""A checkpoint folder of any of the three formats, opened, and read into memory or onto a mesh."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.dtype_cast import NUMPY_DTYPES, check_dtype, packed
from mis_jax.checkpoint.hf.config import detect_format, read_config
from mis_jax.checkpoint.mapping import Layout, head_key, rules
from mis_jax.checkpoint.native import PARAMS, NativeSource, native_problems, stored_shapes
from mis_jax.checkpoint.parameter_source import WORKERS, ParameterSource, Progress, is_stacked
from mis_jax.checkpoint.peft.files import LORA_FIELDS, official_settings, read_adapter
from mis_jax.checkpoint.peft.mapping import (
    Adapter,
    Merged,
    Settings,
    adapter_from_tensors,
    factor_problems,
    value_problems,
)
from mis_jax.checkpoint.safetensors_reader import PublishedSource, Shards, misfit, problems
from mis_jax.checkpoint.train_state import is_run_checkpoint
from mis_jax.checkpoint.trained_model import (
    Trained,
    adapter_of,
    check_saved,
    refuse_part_of_run,
    run_of,
    trained_values,
)
from mis_jax.model.config import InternVLConfig
from mis_jax.storage.json_files import Fields
from mis_jax.storage.paths import files_below


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose tensors are known and fit its config, and whose values are not read."""

    config: InternVLConfig
    weights: ParameterSource
    dtype: str  # of most stored tensors
    folder: Path | None  # its tokenizer files go with every export
    published: dict[str, Any] | None  # the published config.json it comes from
    files: tuple[Path, ...] = ()  # that the values lie in


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters in memory, with what is needed to write them again."""

    config: InternVLConfig
    arrays: dict[str, Any]  # by dotted path, as `parameters.flat` gives them
    dtype: str
    folder: Path | None  # its tokenizer files go with every export
    source: dict[str, Any] | None  # the published config.json it comes from


def open_checkpoint(
    folder: Path, adapter: Path | None = None, *, check_digests: bool = True
) -> OpenCheckpoint:
    """Open a folder of any format, and merge a PEFT `adapter` into it; no value of it is read.

    A checkpoint that holds LoRA factors beside its weights, as the official scripts save it, is
    merged as well, and one of a run (`OUT/checkpoints/STEP`) with its base model. Raises
    ValueError: a folder, config.json or weight file that is missing or broken, a model outside the
    family, or tensors that do not fit, all of them in one error. With `check_digests` what has
    digests is compared with them: a native checkpoint as it is read, one of a run here.
    """
    folder = Path(folder)
    opened = (_open_of_run if is_run_checkpoint(folder) else _open)(folder, check_digests)
    if adapter is None:
        return opened
    config, entries = _with_head(opened, read_adapter(adapter, opened.config))
    files = (*opened.files, *(path for path in sorted(adapter.iterdir()) if path.is_file()))
    weights = Merged(opened.weights, entries)
    return dataclasses.replace(opened, config=config, weights=weights, files=files)


def _with_head(opened: OpenCheckpoint, adapter: Adapter) -> tuple[InternVLConfig, Adapter]:
    """The merged model's config, and an adapter with its head where it is no longer tied.

    PEFT trains a copy of an embedding or a head and leaves the other one as it was.
    """
    tables = "text.embedding", "text.head"
    if not opened.config.text.tie_embeddings or not any(name in adapter for name in tables):
        return opened.config, adapter
    base = opened.weights.read("text.embedding")
    embedding, head = (np.asarray(adapter.get(name, base)) for name in tables)
    rest = {name: entry for name, entry in adapter.items() if name not in tables}
    if np.array_equal(embedding, head):
        return opened.config, rest | {"text.embedding": embedding}
    return opened.config.untied, rest | {"text.embedding": embedding, "text.head": head}


def _open_of_run(folder: Path, check_digests: bool) -> OpenCheckpoint:
    """Trained parameters over the base's; adapters are merged, as `final/` says it of its own."""
    run = run_of(folder)
    base = open_checkpoint(run.model, check_digests=check_digests)
    if check_digests:
        check_saved(folder)
    values = trained_values(folder, base.config, run.lora)
    files = (*base.files, *(folder / name for name in files_below(folder)))
    if run.lora.rank:
        adapter = adapter_of({name: values.whole(name) for name in values.shapes}, run.lora)
        return dataclasses.replace(base, weights=Merged(base.weights, adapter), files=files)
    weights = Trained(base.weights, values)
    return dataclasses.replace(base, weights=weights, dtype=run.dtype.params, files=files)


def _open(folder: Path, check_digests: bool) -> OpenCheckpoint:
    refuse_part_of_run(folder)
    kind = detect_format(folder)
    config, raw = read_config(folder)
    if kind == "native":
        found = native_problems(folder, nnx_state.shapes(config))
        if found:
            raise misfit(folder, found, "convert the checkpoint again")
        dtype = str(next(iter(stored_shapes(folder).values())).dtype)
        files = tuple(path for path in sorted((folder / PARAMS).rglob("*")) if path.is_file())
        weights = NativeSource(folder, check_digests=check_digests)
        return OpenCheckpoint(config, weights, dtype, folder, raw.get("source"), files)
    shards = Shards(folder, kind)
    config = _tied_as_stored(config, kind, shards)
    found = problems(shards, kind, config, nnx_state.shapes(config))
    found += _lora_problems(shards, kind, config, raw)
    if found:
        raise misfit(folder, found, "weights and config.json must come from the same checkpoint")
    weights: ParameterSource = PublishedSource(shards, kind, config)
    if shards.factors:
        factors = {factor: file.tensor(key) for factor, (file, key) in shards.factors.items()}
        if found := value_problems(factors):
            raise misfit(folder, found, "download the file again")
        adapter = adapter_from_tensors(factors, kind, config, _lora_settings(shards, raw))
        weights = Merged(weights, adapter)
        raw = raw | dict.fromkeys(LORA_FIELDS, 0)
    return OpenCheckpoint(config, weights, shards.dtype, folder, raw, tuple(shards.files))


def _lora_settings(shards: Shards, raw: dict[str, Any]) -> Settings:
    return official_settings(Fields(shards.folder / "config.json", raw))


def _lora_problems(
    shards: Shards, layout: Layout, config: InternVLConfig, raw: dict[str, Any]
) -> list[str]:
    if not shards.factors:
        return []
    entries = {factor: file.entries[key] for factor, (file, key) in shards.factors.items()}
    shapes = {factor: entry.shape for factor, entry in entries.items()}
    return factor_problems(shapes, layout, config, _lora_settings(shards, raw)) + [
        f"tensor '{module}.{role}' has dtype {entry.dtype}; supported: F32, BF16, F16"
        for (module, role), entry in entries.items()
        if entry.dtype not in NUMPY_DTYPES
    ]


def read_checkpoint(
    folder: Path,
    dtype: str | None = None,
    progress: Progress | None = None,
    shardings: Mapping[str, Sharding] | None = None,
) -> Checkpoint:
    """Read a folder of any format; `dtype` None keeps that of the file (of most of its tensors).

    Without `shardings` (by dotted path) parameters are numpy arrays. With them they go straight to
    their devices, one parameter after the other, and a process reads the slices it holds alone.
    Raises ValueError as `open_checkpoint`.
    """
    if dtype is not None:
        check_dtype(dtype)
    return load(open_checkpoint(folder), dtype, progress, shardings)


def load(
    opened: OpenCheckpoint,
    dtype: str | None = None,
    progress: Progress | None = None,
    shardings: Mapping[str, Sharding] | None = None,
    vocab_rows: int | None = None,
    then: Callable[[str, Any], Mapping[str, Any]] | None = None,
) -> Checkpoint:
    """`read_checkpoint` of one that is open; tables get zeros up to `vocab_rows` rows.

    `then` says what to keep of each parameter.
    """
    kept = dtype or opened.dtype
    shapes = nnx_state.shapes(opened.config, vocab_rows=vocab_rows)
    rows = opened.config.text.vocab_size
    arrays = read_parameters(opened.weights, shapes, kept, rows, progress, shardings, then)
    return Checkpoint(opened.config, arrays, kept, opened.folder, opened.published)


def read_parameters(
    source: ParameterSource,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    stored_rows: int,
    progress: Progress | None = None,
    shardings: Mapping[str, Sharding] | None = None,
    then: Callable[[str, Any], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Parameters by dotted path, as `load`; the tables of `source` have `stored_rows` rows."""
    sizes = {name: NUMPY_DTYPES[dtype].itemsize * math.prod(s) for name, s in shapes.items()}
    arrays: dict[str, Any] = {}
    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, shape in shapes.items():
            rows = stored_rows if name in nnx_state.TABLES else None
            part = _Parts(source, name, shape, dtype, pool, rows)
            if shardings is None:
                arrays[name] = part(tuple(slice(None) for _ in shape))
            else:
                arrays[name] = jax.make_array_from_callback(shape, shardings[name], part)
            if then is not None:
                arrays |= then(name, arrays.pop(name))
            done += sizes[name]
            if progress:
                progress(done, sum(sizes.values()))
    return arrays


class _Parts:
    """Slices of one parameter, each read once; layers are read in parallel."""

    def __init__(
        self,
        source: ParameterSource,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        pool: ThreadPoolExecutor,
        stored_rows: int | None,
    ):
        self._source, self._name, self._shape = source, name, shape
        self._dtype, self._pool = dtype, pool
        self._stored_rows = stored_rows  # of a table that may have more
        self._read: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # None is for types that have no axes
        spans = tuple(s.indices(side) for s, side in zip(index, self._shape, strict=True))
        if spans not in self._read:  # devices that hold copies ask for the same slice
            self._read[spans] = self._slice([slice(*span) for span in spans])
        return self._read[spans]

    def _slice(self, index: list[slice]) -> np.ndarray:
        if not is_stacked(self._name):
            return packed(self._padded(index), self._dtype, self._source.key(self._name))
        result = np.empty([len(range(s.start, s.stop)) for s in index], NUMPY_DTYPES[self._dtype])

        def fill(place: int, layer: int) -> None:
            key = self._source.key(self._name, layer)
            result[place] = packed(self._rows(layer, index[1:]), self._dtype, key)

        layers = range(index[0].start, index[0].stop)
        list(self._pool.map(fill, itertools.count(), layers))
        return result

    def _padded(self, index: list[slice]) -> np.ndarray:
        if self._stored_rows is None:
            return self._rows(None, index)
        first, last = (min(place, self._stored_rows) for place in (index[0].start, index[0].stop))
        found = self._rows(None, [slice(first, last), *index[1:]])
        missing = index[0].stop - index[0].start - (last - first)
        return np.pad(found, [(0, missing), (0, 0)]) if missing else found

    def _rows(self, layer: int | None, index: list[slice]) -> np.ndarray:
        return self._source.read(self._name, layer, index[0])[:, *index[1:]]


def find_problems(folder: Path) -> list[str]:
    """What keeps a folder from being read, one line each; empty when it is sound.

    Looks at headers alone and reads no weights.
    """
    folder = Path(folder)
    try:
        kind = detect_format(folder)
        config, raw = read_config(folder)
        if kind == "native":
            return native_problems(folder, nnx_state.shapes(config))
        shards = Shards(folder, kind)
        if config.text.tie_embeddings and head_key(kind, config.text) in shards.shapes:
            config = config.untied  # either way of reading it is sound
        found = problems(shards, kind, config, nnx_state.shapes(config))
        return found + _lora_problems(shards, kind, config, raw)
    except ValueError as error:
        return [str(error)]


def _tied_as_stored(config: InternVLConfig, layout: Layout, shards: Shards) -> InternVLConfig:
    """The file decides: a head that differs from the embedding is one of its own.

    Published checkpoints have heads of their own under a config.json that calls them tied, and
    exports of tied models in the original layout hold the embedding twice.
    """
    head = head_key(layout, config.text)
    if not config.text.tie_embeddings or head not in shards.shapes:
        return config
    own_head = config.untied
    if problems(shards, layout, own_head, nnx_state.shapes(own_head)):
        return own_head  # whose import tells them
    embedding = next(r.theirs for r in rules(layout, config) if r.ours == ("text.embedding",))
    if not np.array_equal(shards.read(head), shards.read(embedding)):
        return own_head
    shards.drop(head)
    return config
