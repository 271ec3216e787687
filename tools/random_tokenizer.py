"""Tokenizer files in the form each language model of the family is published with.

The vocabulary proper is small and trained here on a few benign lines; what lies between it and the
special tokens is unused, so that these have their published ids (facts: OpenGVLab/InternVL's added
tokens; Qwen2.5's and Qwen3's own; InternLM2's tokenizer_config.json).
"""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

_CORPUS = [
    "Describe the two pictures and say what they have in common.\n",
    "The first image shows a garden; the second one a kettle on a table.\n\n",
    "system user assistant Image-1: Image-2: Which of them is larger, and why?\n",
    "图中有什么？请用一句话描述这两张图片。\n",
    "def area(width, height):\n    return width * height  # square metres 🙂\n",
] * 20
_INTERNVL = [
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
]  # fmt: skip
_QWEN = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
#: Qwen's that are text to the model: not declared special.
_QWEN_PLAIN = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
_QWEN3_PLAIN = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
#: They take over the last six pieces of InternLM2's model.
_INTERNLM = [
    "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>",
    "<|im_start|>",
]  # fmt: skip
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TRAINED = 700  # pieces or merges, where the vocabulary has room for them
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def write_qwen(folder: Path, base: int, *, qwen3: bool) -> None:
    """vocab.json, merges.txt and their companions; special tokens start at id `base`."""
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(_TRAINED, base),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(_CORPUS, trainer)
    pipeline.model.save(str(folder))
    plain = _QWEN_PLAIN + (_QWEN3_PLAIN if qwen3 else [])
    names = [*_QWEN, *plain, *_INTERNVL]
    table = {
        base + i: _FLAGS | {"content": n, "special": n not in plain} for i, n in enumerate(names)
    }
    _write(folder / "added_tokens.json", {entry["content"]: i for i, entry in table.items()})
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 12288,
        "added_tokens_decoder": {str(i): entry for i, entry in table.items()},
        "additional_special_tokens": [n for n in names[1:] if n not in plain],
    }
    _write(folder / "tokenizer_config.json", settings)


def write_internlm(folder: Path, pieces: int) -> None:
    """tokenizer.model of `pieces` pieces and its companions; InternVL's tokens come after them."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS),
        model_writer=written,
        vocab_size=min(_TRAINED, pieces - len(_INTERNLM)),
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(written.getvalue())
    for k in range(pieces - len(proto.pieces)):
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{k}]", score=-1e4, type=1)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    first = pieces - len(_INTERNLM)
    table = dict(enumerate(["<unk>", "<s>", "</s>"]))
    table |= {first + i: name for i, name in enumerate([*_INTERNLM, *_INTERNVL])}
    later = {name: i for i, name in table.items() if i >= first}
    _write(folder / "added_tokens.json", later)
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
        "added_tokens_decoder": {
            str(i): _FLAGS | {"content": name, "special": True} for i, name in table.items()
        },
        "additional_special_tokens": list(later),
    }
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
