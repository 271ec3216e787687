"""What a checkpoint folder holds, told from its headers, and whether its files are as written."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.hf.config import detect_format, read_config
from mis_jax.checkpoint.load import find_problems, open_checkpoint
from mis_jax.checkpoint.native import DIGESTS, PARAMS, native_digests, stored_shapes
from mis_jax.checkpoint.safetensors_reader import Shards
from mis_jax.checkpoint.train_state import inspect_run_checkpoint, is_run_checkpoint, open_trained
from mis_jax.checkpoint.trained_model import refuse_part_of_run, run_of
from mis_jax.storage.hashing import changed_files
from mis_jax.tokenizer.files import tokenizer_problems

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def inspect_checkpoint(folder: Path, *, check_digests: bool = True) -> dict[str, Any]:
    """Format, sizes, parameter counts by part, dtypes, tokenizer, image settings, problems.

    Plain data, ready for JSON. Bytes are those on disk; parameters are those config.json asks for,
    dtypes those of the stored values. Raises ValueError where there is no config.json to go by;
    trouble with the weights is listed under "problems". With `check_digests` every file that has a
    digest is read and compared with it; without, no weight is read.
    """
    folder = Path(folder)
    if is_run_checkpoint(folder):
        return _inspect_of_run(folder, check_digests)
    refuse_part_of_run(folder)
    kind = detect_format(folder)
    config, _ = read_config(folder)
    counts = nnx_state.count(config)
    dtypes, weight_files = _stored(folder, kind)
    digests = native_digests(folder) if kind == "native" else {}
    return {
        "path": str(folder),
        "format": kind,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "weight_bytes": sum(path.stat().st_size for path in weight_files),
        "weight_files": len(weight_files),
        "dtype": max(dtypes, key=dtypes.__getitem__, default=None),
        "dtypes": dtypes,
        "parameters": counts | {"total": sum(counts.values())},
        "vision": dataclasses.asdict(config.vision),
        "text": dataclasses.asdict(config.text),
        "image_token_id": config.image_token_id,
        "tokens_per_tile": config.tokens_per_tile,
        "min_tiles": config.min_tiles,
        "max_tiles": config.max_tiles,
        "use_thumbnail": config.use_thumbnail,
        "dynamic_tiles": config.dynamic_tiles,
        "template": config.template,
        "system_message": config.system_message,
        "tokenizer_files": [name for name in TOKENIZER_FILES if (folder / name).is_file()],
        "digests": str(folder / DIGESTS) if digests else "none",
        "problems": find_problems(folder)
        + tokenizer_problems(folder, config)
        + (changed_files(folder, digests) if check_digests else []),
    }


def _inspect_of_run(folder: Path, check_digests: bool) -> dict[str, Any]:
    found = inspect_run_checkpoint(folder, check_digests=check_digests)
    try:
        opened = open_checkpoint(folder, check_digests=False)
        trained = sum(math.prod(array.shape) for array in open_trained(folder).values())
        total = sum(nnx_state.count(opened.config).values())
        found |= {
            "base": str(run_of(folder).model),
            "dtype": opened.dtype,
            "parameters": {"trained": trained, "total": total},
        }
    except ValueError as error:
        found["problems"].append(str(error))
    return found


def _stored(folder: Path, kind: str) -> tuple[dict[str, int], list[Path]]:
    """Stored values by dtype, and the files that hold them; nothing when they cannot be read."""
    sizes: collections.Counter[str] = collections.Counter()
    try:
        if kind == "native":
            for array in stored_shapes(folder).values():
                sizes[str(array.dtype)] += math.prod(array.shape)
            return dict(sizes), [p for p in (folder / PARAMS).rglob("*") if p.is_file()]
        shards = Shards(folder, "hf" if kind == "hf" else "internvl")
    except ValueError:  # find_problems tells it
        return {}, []
    for name, shape in shards.shapes.items():
        sizes[shards.dtypes[name]] += math.prod(shape)
    return dict(sizes), shards.files
