"""Published checkpoint folders: which tensors their safetensors files hold, and reading them.

A file is memory-mapped; its header is checked before a value is touched.
"""

import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mis_jax.checkpoint.dtype_cast import NUMPY_DTYPES
from mis_jax.checkpoint.mapping import COPY, Layout, Rule, Shape, disk_key, normal_key, rules
from mis_jax.checkpoint.peft.mapping import Factor, plain_key
from mis_jax.model.config import InternVLConfig
from mis_jax.parsing import parse_json
from mis_jax.storage.files import map_file, open_binary, refuse_lfs_pointer
from mis_jax.storage.json_files import Fields, read_json

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LONGEST_HEADER = 100_000_000  # bytes, the format's own bound


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    dtype: str  # ours where it is one of them, else the file's own name
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes


class TensorFile:
    """Tensors by key; values come as read-only views of the file.

    Raises ValueError, with the remedy, for a file that is cut short or whose header lies.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries = _header(path)
        self._map = map_file(path)

    def tensor(self, key: str) -> np.ndarray:
        """A view of one tensor, of a dtype of `NUMPY_DTYPES`."""
        entry = self.entries[key]
        values = np.frombuffer(self._map, np.uint8, entry.size, entry.start)
        dtype = NUMPY_DTYPES[entry.dtype]
        if entry.start % dtype.itemsize:  # a header of a length that nothing aligned
            values = values.copy()
        return values.view(dtype).reshape(entry.shape)

    def read_ahead(self, key: str, start: int, stop: int) -> None:
        """Let the disk bring these bytes of a tensor, several times as fast as page by page."""
        entry = self.entries[key]
        begin = (entry.start + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, begin, entry.start + stop - begin)

    def release(self) -> None:
        """Let go of the pages read so far; the next look at them reads them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _header(path: Path) -> dict[str, Entry]:
    try:
        with open_binary(path) as file:
            held, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if held < 8 or length > _LONGEST_HEADER or 8 + length > held:
                raise _Unsound(f"{held} bytes, and the header is said to take {8 + length}")
            with safe_open(path, framework="np"):  # sizes, offsets, overlaps, length of the file
                pass
            header = parse_json(file.read(length))
    except (SafetensorError, _Unsound, OSError, ValueError) as error:
        refuse_lfs_pointer(path)
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from None
    header.pop("__metadata__", None)
    entries = {}
    for key, fields in header.items():
        start, stop = fields["data_offsets"]
        stored: str = fields["dtype"]
        dtype = _DTYPES.get(stored, stored)
        entry = Entry(dtype, tuple(fields["shape"]), 8 + length + start, stop - start)
        wanted = (
            NUMPY_DTYPES[dtype].itemsize * math.prod(entry.shape) if dtype in NUMPY_DTYPES else 0
        )
        assert not wanted or entry.size == wanted, key  # the library has checked it
        entries[key] = entry
    return entries


class _Unsound(Exception):
    """What is wrong with a header."""


INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old checkpoints stored
_LISTED = 50  # problems; beyond it those that differ in the layer alone share a line
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)|(?<=\.layer\.)\d+(?=\.)")
_RESIDENT = 2**28  # bytes of the mapped files that may stay in memory after they were read


class Shards:
    """All tensors of a folder's safetensors files, by the key of the layout.

    Opening reads the headers alone. Raises ValueError when there is no file, or one is broken.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.factors: dict[Factor, tuple[TensorFile, str]] = {}  # of LoRA that is not merged yet
        self._place: dict[str, tuple[TensorFile, str]] = {}
        self._files = [TensorFile(path) for path in _weight_files(folder)]
        self._looked_at = 0
        for file in self._files:
            for key in file.entries:
                if not key.endswith(_IGNORED):
                    self._add(layout, file, key)

    def _add(self, layout: Layout, file: TensorFile, key: str) -> None:
        plain, role = plain_key(key)
        name = normal_key(layout, plain)
        other = self._place.get(name) if role == "weight" else self.factors.get((name, role))
        if other is not None:
            raise ValueError(
                f"{file.path}: tensor '{key}' occurs twice, also in {other[0].path}; "
                "remove the file that is left over"
            )
        if role != "weight":
            self.factors[name, role] = (file, key)
            return
        self._place[name] = (file, key)
        self.shapes[name] = file.entries[key].shape
        self.dtypes[name] = file.entries[key].dtype

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some of its rows, in the dtype of the file: a view of the file."""
        file, key = self._place[name]
        count, size = file.entries[key].shape[0], file.entries[key].size
        first, last, _ = rows.indices(count)
        file.read_ahead(key, first * size // count, last * size // count)
        self._looked_at += (last - first) * size // count
        if self._looked_at > _RESIDENT:  # or whole files would pile up in the resident set
            self._looked_at = 0
            for mapped in self._files:
                mapped.release()
        return file.tensor(key)[rows]

    def key(self, name: str) -> str:
        """The tensor's key as the file has it."""
        return self._place[name][1]

    def drop(self, name: str) -> None:
        """Leave a tensor out, as if the files did not hold it."""
        for table in (self._place, self.shapes, self.dtypes):
            del table[name]

    @property
    def files(self) -> list[Path]:
        return [file.path for file in self._files]

    @property
    def dtype(self) -> str:
        """The dtype of most tensors."""
        values = list(self.dtypes.values())
        return max(sorted(set(values)), key=values.count, default="float32")


class PublishedSource:
    """Our parameters as a published checkpoint has them; a `ParameterSource`."""

    def __init__(self, shards: Shards, layout: Layout, config: InternVLConfig):
        self._shards, self._config = shards, config
        self._rules = {
            ours: (rule, index)
            for rule in rules(layout, config)
            for index, ours in enumerate(rule.ours)
        }

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        rule, index = self._rules[name]
        key = rule.theirs.format(i=layer)
        if rule.codec is COPY:
            return self._shards.read(key, rows)
        theirs = self._shards.read(key)
        return rule.codec.to_ours(theirs, self._config)[index][rows]

    def key(self, name: str, layer: int | None = None) -> str:
        rule, _ = self._rules[name]
        if rule.per_layer and layer is None:  # all of them
            return rule.theirs
        return self._shards.key(rule.theirs.format(i=layer))


def _weight_files(folder: Path) -> list[Path]:
    """The files the index names, else every safetensors file."""
    index = folder / INDEX
    if index.exists():
        names = sorted({_plain(index, n) for n in _weight_map(index).values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{index}: names files that are not there: {', '.join(missing)}; download them"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
        found = f", only {pickled[0]}" if pickled else ""
        raise ValueError(
            f"{folder}: no .safetensors file{found}; pickled .bin and .pt weights are never "
            "opened: where you trust them, load them with upstream's code and write them with "
            "save_pretrained(DIR, safe_serialization=True)"
        )
    return files


def _weight_map(index: Path) -> dict[str, object]:
    values = Fields(index, read_json(index)).section("weight_map").values
    if not values:
        raise ValueError(f"{index}: field 'weight_map' is empty; download the file again")
    return values


def _plain(index: Path, name: object) -> str:
    """A file name that cannot lead out of the folder."""
    plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
    if not (plain and str(name).endswith(".safetensors")):
        raise ValueError(
            f"{index}: field 'weight_map' names {name!r}, which is no plain name of a "
            ".safetensors file; download the index again"
        )
    return str(name)


def our_shapes_of_layer(rule: Rule, shapes: Mapping[str, Shape]) -> list[Shape]:
    """Shapes of a rule's parameters, without the axis of stacked layers."""
    return [shapes[name][1:] if rule.per_layer else shapes[name] for name in rule.ours]


def tensors(rule: Rule, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, int | None]]:
    """Their keys under a rule, each with its layer."""
    if not rule.per_layer:
        yield rule.theirs, None
        return
    for layer in range(shapes[rule.ours[0]][0]):
        yield rule.theirs.format(i=layer), layer


def problems(
    shards: Shards, layout: Layout, config: InternVLConfig, shapes: Mapping[str, Shape]
) -> list[str]:
    """Every missing, extra, misshapen or undecodable tensor of a checkpoint, one line each."""
    expected: dict[str, Shape] = {}
    for rule in rules(layout, config):
        theirs = rule.codec.their_shape(our_shapes_of_layer(rule, shapes), config)
        expected |= {key: tuple(theirs) for key, _ in tensors(rule, shapes)}
    return differences(shards, expected, lambda name: disk_key(layout, name))


def differences(
    shards: Shards, expected: Mapping[str, Shape], on_disk: Callable[[str], str]
) -> list[str]:
    """Every tensor that is not as expected, one line each; `on_disk` gives a missing one's key."""
    found = [
        f"missing tensor '{on_disk(name)}' {shape}"
        for name, shape in expected.items()
        if name not in shards.shapes
    ]
    for name, shape in shards.shapes.items():
        key, wanted, dtype = shards.key(name), expected.get(name), shards.dtypes[name]
        if wanted is None:
            found.append(f"unexpected tensor '{key}' {shape}")
            continue
        if shape != wanted:
            found.append(f"tensor '{key}' has shape {shape}, config.json asks for {wanted}")
        if dtype not in NUMPY_DTYPES:
            found.append(f"tensor '{key}' has dtype {dtype}; supported: F32, BF16, F16")
    return found


def misfit(folder: Path, found: Sequence[str], remedy: str) -> ValueError:
    """One error that tells every problem; a short list verbatim, a long one layer by layer."""
    lines = list(found) if len(found) <= _LISTED else _by_layer(found)
    if len(lines) == 1:
        return ValueError(f"{folder}: {lines[0]}; {remedy}")
    listed = "\n  ".join(lines)
    return ValueError(f"{folder}: {len(found)} problems with its tensors; {remedy}\n  {listed}")


def _by_layer(found: Sequence[str]) -> list[str]:
    layers: dict[str, list[int]] = {}
    for line in found:
        match = _LAYER.search(line)
        numbers = layers.setdefault(_LAYER.sub("{i}", line, count=1), [])
        numbers += [int(match[0])] if match else []
    return [f"{line} for i in {_ranges(n)}" if n else line for line, n in layers.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
