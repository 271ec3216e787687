"""Published checkpoint folders: safetensors shards in, stacked arrays out, and back."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mis_jax.model.config import InternVLConfig
from mis_jax.weights.fields import Fields, read_json
from mis_jax.weights.layouts import Layout, Rule, Shape, disk_key, head_key, normal_key, rules

Progress = Callable[[int, int], None]  # tensors done, tensors in all
NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
INDEX = "model.safetensors.index.json"
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old checkpoints stored
_LISTED = 50  # problems; beyond it those that differ in the layer alone share a line
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)|(?<=\.layer\.)\d+(?=\.)")


class Shards:
    """All tensors of a folder's safetensors files, read one at a time by the key of the layout.

    Opening reads the headers alone. Raises ValueError when there is no file, or one is broken.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[Path, Any] = {}
        self._place: dict[str, tuple[Path, str]] = {}
        for path in _weight_files(folder):
            try:
                self._files[path] = handle = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path}: not a readable safetensors file ({error}); download it again"
                ) from None
            for key in handle.keys():  # noqa: SIM118  not a dict
                if not key.endswith(_IGNORED):
                    self._add(layout, path, key, handle.get_slice(key))

    def _add(self, layout: Layout, path: Path, key: str, tensor: Any) -> None:
        name = normal_key(layout, key)
        if name in self._place:
            raise ValueError(
                f"{path}: tensor '{key}' occurs twice, also in {self._place[name][0]}; "
                "remove the file that is left over"
            )
        self._place[name] = (path, key)
        self.shapes[name] = tuple(tensor.get_shape())
        dtype = str(tensor.get_dtype())
        self.dtypes[name] = _SAFETENSORS_DTYPES.get(dtype, dtype)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file."""
        path, key = self._place[name]
        return self._files[path].get_tensor(key)

    def key(self, name: str) -> str:
        """The tensor's key as the file has it."""
        return self._place[name][1]

    def drop(self, name: str) -> None:
        """Leave a tensor out, as if the files did not hold it."""
        for table in (self._place, self.shapes, self.dtypes):
            del table[name]

    @property
    def files(self) -> list[Path]:
        return list(self._files)

    @property
    def dtype(self) -> str:
        """The dtype of most tensors."""
        values = list(self.dtypes.values())
        return max(sorted(set(values)), key=values.count, default="float32")


def _weight_files(folder: Path) -> list[Path]:
    """The files the index names, else every safetensors file."""
    index = folder / INDEX
    if index.exists():
        weight_map = Fields(index, read_json(index)).section("weight_map")
        names = sorted({str(name) for name in weight_map.values.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{index}: names files that are not there: {', '.join(missing)}; download them"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder}: no .safetensors file; pickled .bin and .pt weights are never read, "
            "convert them to safetensors first"
        )
    return files


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
    found = [
        f"missing tensor '{disk_key(layout, name)}' {shape}"
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


def import_arrays(
    shards: Shards,
    layout: Layout,
    config: InternVLConfig,
    shapes: Mapping[str, Shape],
    dtype: str,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Our parameters by dotted path, layers stacked, cast to `dtype`.

    Raises one ValueError that lists every tensor that does not fit.
    """
    found = problems(shards, layout, config, shapes)
    if found:
        remedy = "weights and config.json must come from the same checkpoint"
        raise misfit(shards.folder, found, remedy)
    done, total = 0, len(shards.shapes)
    arrays = {name: np.empty(shape, NUMPY_DTYPES[dtype]) for name, shape in shapes.items()}
    for rule in rules(layout, config):
        for key, layer in tensors(rule, shapes):
            parts = rule.codec.to_ours(shards.read(key), config)
            for name, part in zip(rule.ours, parts, strict=True):
                arrays[name][... if layer is None else layer] = cast(part, dtype, key)
            done += 1
            if progress:
                progress(done, total)
    return arrays


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """`array` in another dtype; ValueError when finite values do not fit into float16."""
    array = np.asarray(array)
    with np.errstate(over="ignore"):  # told below, by name
        result = array.astype(NUMPY_DTYPES[dtype], copy=False)
    narrowed = dtype == "float16" and result is not array
    if narrowed and np.any(np.isinf(result) & np.isfinite(array.astype(np.float32))):
        raise ValueError(f"tensor '{name}' has values beyond float16's 65504; choose bfloat16")
    return result


def export_arrays(
    folder: Path,
    layout: Layout,
    config: InternVLConfig,
    arrays: Mapping[str, np.ndarray],
    dtype: str,
    shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Write safetensors shards of at most `shard_bytes` (a larger tensor has its own) and index.

    Raises OSError when a file cannot be written, ValueError when a value does not fit `dtype`.
    """
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    plan: list[tuple[str, int | None, Rule, int]] = []
    for rule in rules(layout, config):
        size = NUMPY_DTYPES[dtype].itemsize * sum(
            int(np.prod(shape)) for shape in our_shapes_of_layer(rule, shapes)
        )
        plan += [(key, layer, rule, size) for key, layer in tensors(rule, shapes)]
    if layout == "internvl" and config.text.tie_embeddings:
        # Upstream's code never ties and would start from a random head, were there none.
        embedding = next(item for item in plan if item[2].ours == ("text.embedding",))
        plan.append((head_key(layout, config), *embedding[1:]))
    shards = _split(plan, shard_bytes)
    done, weight_map = 0, {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for key, layer, rule, _ in shard:
            parts = [arrays[ours] if layer is None else arrays[ours][layer] for ours in rule.ours]
            theirs = cast(rule.codec.to_theirs(parts, config), dtype, key)
            content[disk_key(layout, key)] = np.ascontiguousarray(theirs)
            done += 1
            if progress:
                progress(done, len(plan))
        _save(folder / name, content)
        weight_map |= dict.fromkeys(content, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(i[3] for i in plan)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(plan: list[tuple[str, int | None, Rule, int]], shard_bytes: int):
    """The plan in runs of at most `shard_bytes`."""
    if shard_bytes <= 0:
        raise ValueError(f"shard size is {shard_bytes} bytes; give one above zero, such as 5GB")
    shards: list[list[tuple[str, int | None, Rule, int]]] = [[]]
    filled = 0
    for item in plan:
        if shards[-1] and filled + item[3] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item[3]
    return shards


def _save(path: Path, content: dict[str, np.ndarray]) -> None:
    try:
        save_file(content, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None
    path.chmod(0o644)  # safetensors writes through a private temporary file
