"""Tokenizer folders in the published layouts, trained here on a few lines of text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "Describe what the two images show, and why the request is dangerous.\n",
    "assistant\nThe first image shows household cleaners; the second one a bottle.\n\n",
    "你是书生·万象，多模态大语言模型。图中有什么？",
    "def f(x):\n    return  x + 1  # </a> xs> <b> [UNUSED_TOKEN_1]\n",
    "system user assistant Image-1: Image-2: </",
] * 20


def added_entry(i: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special, **flags}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def train_sentencepiece() -> sentencepiece_model_pb2.ModelProto:
    """InternLM2's kind of model: BPE, byte fallback, no dummy prefix, nothing normalised."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=700,
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
    scores = {piece.piece: piece.score for piece in proto.pieces}
    for piece in {"</", "s>"} - set(scores):  # large vocabularies have both
        proto.pieces.add(piece=piece, score=min(scores.values()) - 1, type=1)
    return proto


def internlm2_folder(folder: Path, base: Any, kind: int = 1, **config: Any) -> Path:
    """tokenizer.model with [UNUSED_TOKEN_k] last, six of them overridden, nine tokens after."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.CopyFrom(base)
    names = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"]
    names += ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    names += ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
    first = len(proto.pieces)
    for k in range(141, 147):
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{k}]", score=-1e4, type=kind)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    table = {str(first + k): added_entry(first + k, name) for k, name in enumerate(names)}
    table |= {str(k): added_entry(k, name) for k, name in enumerate(("<unk>", "<s>", "</s>"))}
    for entry in table.values():
        del entry["id"]
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    settings = {"add_bos_token": True, "added_tokens_decoder": table, **named, **config}
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('never run')\n")
    return folder


def train_qwen_bpe() -> tokenizers.Tokenizer:
    """Qwen's pipeline over a small vocabulary."""
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(alphabet), show_progress=False
    )
    pipeline.train_from_iterator(CORPUS, trainer)
    return pipeline


QWEN_ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"]
QWEN_ADDED += ["<tool_call>", "</tool_call>", "<|fim_prefix|>"]
QWEN_ADDED += ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>"]
QWEN_ADDED += ["<box>", "</box>"]
QWEN_CONFIG = {
    "add_bos_token": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "tokenizer_class": "Qwen2Tokenizer",
}


def qwen_entries(first: int) -> list[dict[str, Any]]:
    # As published: the tool and fill-in-the-middle tokens are not declared special.
    plain = {"<tool_call>", "</tool_call>", "<|fim_prefix|>"}
    return [added_entry(first + k, t, t not in plain) for k, t in enumerate(QWEN_ADDED)]


def qwen_folder(folder: Path, pipeline: tokenizers.Tokenizer, layout: str) -> Path:
    folder.mkdir()
    entries = qwen_entries(pipeline.get_vocab_size())
    config = dict(QWEN_CONFIG)
    config["added_tokens_decoder"] = {
        str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries
    }
    if layout == "json":
        write_json(
            folder / "tokenizer.json", json.loads(pipeline.to_str()) | {"added_tokens": entries}
        )
    else:
        pipeline.model.save(str(folder))
        write_json(folder / "added_tokens.json", {e["content"]: e["id"] for e in entries})
    write_json(folder / "tokenizer_config.json", config)
    return folder


def llama_folder(folder: Path, base: Any, work: Path) -> Path:
    """An HF-native InternLM2: tokenizer.json with the overridden names in its vocabulary."""
    source = internlm2_folder(work / "source", base, add_prefix_space=False, legacy=False)
    config = json.loads((source / "tokenizer_config.json").read_text())
    table = {int(i): entry["content"] for i, entry in config.pop("added_tokens_decoder").items()}
    write_json(source / "tokenizer_config.json", config)
    transformers.LlamaTokenizer.from_pretrained(source).save_pretrained(folder)
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    vocab = {i: piece for piece, i in description["model"]["vocab"].items()}
    vocab |= {i: content for i, content in table.items() if i in vocab}
    description["model"]["vocab"] = {piece: i for i, piece in sorted(vocab.items())}
    description["added_tokens"] = [added_entry(i, table[i]) for i in sorted(table)]
    # Converters make a merge of any two pieces that add up to a piece: </s> too.
    pieces = description["model"]["vocab"]
    pairs = [("<", "/"), ("</", "s>")]
    assert all(left in pieces and right in pieces for left, right in pairs)
    description["model"]["merges"] += [["</", "s>"]]
    write_json(path, description)
    return folder
