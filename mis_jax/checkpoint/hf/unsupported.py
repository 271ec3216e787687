"""What people give in the place of a checkpoint's folder, and the command that gets them one."""

import re
from pathlib import Path

from mis_jax.storage.json_files import Fields

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth")


def check_model_folder(folder: Path) -> None:
    """ValueError for a path that can be no checkpoint's folder, with what it is."""
    if folder.suffix == ".gguf" and not folder.is_dir():
        raise ValueError(
            f"{folder}: GGUF files are llama.cpp's; give a folder of safetensors with config.json, "
            "of the model that it was made from"
        )
    if folder.is_file():
        where = f": {folder.parent}" if folder.suffix in _SUFFIXES else ""
        raise ValueError(f"{folder}: a file; give the folder that holds config.json{where}")
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; give the folder that holds config.json{_download(folder)}"
        )
    if (folder / "config.json").exists():
        return
    if hashes := sorted((folder / "snapshots").glob("*/config.json")):
        raise ValueError(
            f"{folder}: a model's folder in the cache of huggingface_hub; give {hashes[0].parent}"
        )
    if any(folder.glob("models--*")):
        raise ValueError(
            f"{folder}: the cache of huggingface_hub; give {folder}/models--OWNER--NAME/snapshots/"
            "HASH of one model"
        )
    if found := sorted(folder.glob("*.gguf")):
        check_model_folder(found[0])


def _download(folder: Path) -> str:
    """How to get a model whose hub id was given; a folder's path is told by its parent."""
    if not _HUB_ID.fullmatch(str(folder)) or folder.parent.is_dir():
        return ""
    place = f"checkpoints/{folder.name}"
    return (
        f". If this is a model's id on Hugging Face: hf download {folder} --local-dir {place}, "
        f"then give {place}"
    )


def check_not_quantized(fields: Fields) -> None:
    """ValueError for weights that AWQ, GPTQ or another quantizer wrote."""
    section = fields.section("quantization_config", {})
    if section.values:
        method = section.get("quant_method", "unknown")
        raise ValueError(
            f"{fields.path}: field '{section.prefix[:-1]}' says that the weights are quantized "
            f"({method!r:.40}), which cannot be read; use the model that they were made from, and "
            "--int8-weights where memory is short"
        )
