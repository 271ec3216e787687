"""Tokenizer folders as the family publishes them, with small vocabularies."""

import json
import sys
from pathlib import Path
from typing import Any

import tokenizers

sys.path.append(str(Path(__file__).parent.parent / "data"))
from tokenizer_folders import (
    QWEN_CONFIG,
    added_entry,
    internlm2_folder,
    llama_folder,
    train_qwen_bpe,
    train_sentencepiece,
    write_json,
)

_QWEN = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
#: Text to the model: not declared special in the published files.
_QWEN_PLAIN = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
_QWEN3_PLAIN = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
_INTERNVL = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]
_INTERNVL += ["<ref>", "</ref>", "<box>", "</box>"]

#: The template in the tokenizer_config.json of original Qwen-based folders.
QWEN_TEMPLATE = "{{'<|im_start|>system\nYou are Qwen.<|im_end|>\n'}}"


def qwen_folder(
    folder: Path, pipeline: tokenizers.Tokenizer, generation: str, layout: str, **settings: Any
) -> Path:
    """An InternVL tokenizer on Qwen2.5's ("2.5") or Qwen3's ("3") added tokens.

    `layout` is "json" (tokenizer.json), "vocab" (vocab.json, merges.txt and tokenizer_config.json)
    or "bare" (the same, added tokens in added_tokens.json alone).
    """
    folder.mkdir(parents=True)
    plain = _QWEN_PLAIN + (_QWEN3_PLAIN if generation == "3" else [])
    first = pipeline.get_vocab_size()
    entries = [
        added_entry(first + k, token, token not in plain)
        for k, token in enumerate([*_QWEN, *plain, *_INTERNVL])
    ]
    if layout == "json":
        content = json.loads(pipeline.to_str()) | {"added_tokens": entries}
        write_json(folder / "tokenizer.json", content)
    else:
        pipeline.model.save(str(folder))
        write_json(folder / "added_tokens.json", {e["content"]: e["id"] for e in entries})
    config = QWEN_CONFIG | {"chat_template": QWEN_TEMPLATE, **settings}
    special = [e["content"] for e in entries if e["special"]]
    config["additional_special_tokens"] = special[1:]
    if layout != "bare":
        config["added_tokens_decoder"] = {
            str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries
        }
    write_json(folder / "tokenizer_config.json", config)
    return folder


LAYOUTS = ["internlm2", "llama json", "qwen2.5 json", "qwen2.5 vocab", "qwen3 vocab", "qwen3 bare"]


class Published:
    """Builds the folders of `LAYOUTS`; both vocabularies are trained once."""

    def __init__(self) -> None:
        self.sentencepiece = train_sentencepiece()
        self.qwen = train_qwen_bpe()

    def __call__(self, layout: str, folder: Path) -> Path:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if layout == "internlm2":
            return internlm2_folder(folder, self.sentencepiece)
        if layout == "llama json":
            work = folder.with_name(folder.name + ".work")
            work.mkdir()
            return llama_folder(folder, self.sentencepiece, work)
        generation, form = layout.removeprefix("qwen").split()
        return qwen_folder(folder, self.qwen, generation, form)
