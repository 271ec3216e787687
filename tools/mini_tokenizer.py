"""The tiny model's tokenizer: a sentencepiece model and added tokens laid out as InternLM2's."""

import json
from pathlib import Path

import sentencepiece as spm

from mis_jax.data.chat_template import DEFAULT_SYSTEM
from mis_jax.mini.world import corpus

VOCAB_SIZE = 1024
_SYSTEM_REPEATS = 40  # so that the long default system text becomes a few pieces
_ADDED = (
    "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>",
    "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>",
    "<box>", "</box>",
)  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.model`, `tokenizer_config.json`, `special_tokens_map.json` and
    `added_tokens.json`."""
    text = [*corpus(), *[DEFAULT_SYSTEM] * _SYSTEM_REPEATS]
    sentences = [f"{role}\n{line}" for line in text for role in ("user", "assistant")]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        max_sentencepiece_length=32,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    base = {str(i): {"content": t, **flags} for i, t in enumerate(("<unk>", "<s>", "</s>"))}
    added = {str(VOCAB_SIZE + i): {"content": t, **flags} for i, t in enumerate(_ADDED)}
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "InternLM2Tokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": base | added,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    })  # fmt: skip
    _write(folder / "special_tokens_map.json", {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
        "additional_special_tokens": list(_ADDED),
    })  # fmt: skip
    _write(folder / "added_tokens.json", {t: VOCAB_SIZE + i for i, t in enumerate(_ADDED)})


def total_vocab() -> int:
    """Rows of the embedding table."""
    return VOCAB_SIZE + len(_ADDED)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
