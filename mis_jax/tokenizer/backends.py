"""Vocabularies behind `mis_jax.tokenizer.tokenizer.Tokenizer`: plain text to ids and back.

A back end knows nothing of added tokens, templates or BOS; it is the part of a tokenizer that
sentencepiece or the `tokenizers` library does for ordinary text.

Source: `tokenization_internlm2.py` in OpenGVLab/InternVL,
`internvl_chat/internvl/model/internlm2/`; transformers' Qwen2 tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

# Where Qwen's tokenizers cut text before BPE; a constant of the published vocabulary, which is
# written down in tokenizer.json but absent from the vocab.json + merges.txt layout.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"  # how sentencepiece writes a space


class Backend(Protocol):
    """The vocabulary proper: plain text to ids and back, no added tokens."""

    size: int
    unk_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a stretch of text."""
        ...

    def encode_with_text(self, text: str) -> list[tuple[int, str]]:
        """The same ids, each with the text it stands for."""
        ...

    def spell(self, text: str) -> list[int]:
        """Ids of a text taken character by character, nothing merged."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; broken UTF-8 becomes U+FFFD, ids outside the vocabulary nothing."""
        ...

    def find(self, token: str) -> int | None:
        """The id of exactly this vocabulary entry."""
        ...


class SentencePieceBackend:
    """A sentencepiece `.model`, InternLM2's vocabulary."""

    def __init__(self, path: Path) -> None:
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is no readable sentencepiece model ({error})") from error
        self.size: int = self._pieces.get_piece_size()
        self.unk_id: int | None = self._pieces.unk_id()

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text)

    def encode_with_text(self, text: str) -> list[tuple[int, str]]:
        pieces = self._pieces
        return [(i, pieces.id_to_piece(i).replace(_SPACE, " ")) for i in pieces.encode(text)]

    def spell(self, text: str) -> list[int]:
        unk = self._pieces.unk_id()
        ids: list[int] = []
        for character in text.replace(" ", _SPACE):
            found = [self.find(character)]
            if found == [None]:
                found = [self.find(f"<0x{byte:02X}>") for byte in character.encode()]
            ids += [unk if i is None else i for i in found]
        return ids

    def decode(self, ids: list[int]) -> str:
        # Not the library's decode: that one drops the leading space of its first piece, which
        # belongs to the text when the ids continue an open turn.
        out = bytearray()
        for i in ids:
            if not 0 <= i < self.size:
                continue
            piece = self._pieces.id_to_piece(i)
            out += (
                bytes([int(piece[3:5], 16)])
                if self._pieces.is_byte(i)
                else piece.replace(_SPACE, " ").encode()
            )
        return out.decode("utf-8", errors="replace")

    def find(self, token: str) -> int | None:
        i = self._pieces.piece_to_id(token)
        return i if 0 <= i < self.size and self._pieces.id_to_piece(i) == token else None

    def control_pieces(self) -> dict[str, int]:
        """`<s>`, `</s>`, `<unk>` and their like, with their ids."""
        pieces = self._pieces
        return {
            pieces.id_to_piece(i): i
            for i in range(self.size)
            if pieces.is_control(i) or pieces.is_unknown(i)
        }


class BPEBackend:
    """A pipeline of the `tokenizers` library without its added tokens and templates."""

    def __init__(self, pipeline: tokenizers.Tokenizer) -> None:
        self._pipeline = pipeline
        ids = pipeline.get_vocab(with_added_tokens=False).values()
        self.size: int = max(ids, default=-1) + 1
        unk = getattr(pipeline.model, "unk_token", None)
        self.unk_id: int | None = None if unk is None else pipeline.token_to_id(unk)

    @classmethod
    def from_json(cls, description: Mapping[str, Any], name: str) -> BPEBackend:
        """From the parsed content of a tokenizer.json; `name` is what errors call the file."""
        # Added tokens are matched by `Tokenizer`, which knows which of them are text.
        plain = dict(description, added_tokens=[], post_processor=None)
        plain.update(truncation=None, padding=None)
        # "first" gives the very first word of a prompt a space in front. A prompt starts with a
        # control token, so none of its text is ever first.
        plain["pre_tokenizer"] = _without_first_prefix(plain.get("pre_tokenizer"))
        plain["decoder"] = _without_strip(plain.get("decoder"))
        try:
            return cls(tokenizers.Tokenizer.from_str(json.dumps(plain)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{name} is no usable tokenizer description ({error})") from error

    @classmethod
    def from_vocab_and_merges(cls, vocab: Path, merges: Path) -> BPEBackend:
        """Qwen's layout: byte-level BPE over NFC text, cut by Qwen's pattern."""
        try:
            model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{vocab} and {merges.name} make no BPE ({error})") from error
        pipeline = tokenizers.Tokenizer(model)
        pipeline.normalizer = tokenizers.normalizers.NFC()
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN_SPLIT), "isolated")
        to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
        pipeline.decoder = tokenizers.decoders.ByteLevel()
        return cls(pipeline)

    def encode(self, text: str) -> list[int]:
        return self._pipeline.encode(text, add_special_tokens=False).ids

    def encode_with_text(self, text: str) -> list[tuple[int, str]]:
        encoding = self._pipeline.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [(i, text[start:stop]) for i, (start, stop) in spans]

    def spell(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in text:
            # Visible ASCII stands for itself in every vocabulary; looking it up keeps a
            # normaliser from putting a space in front of it.
            found = self.find(character) if "!" <= character <= "~" else None
            ids += self.encode(character) if found is None else [found]
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._pipeline.decode(ids, skip_special_tokens=False)

    def find(self, token: str) -> int | None:
        return self._pipeline.token_to_id(token)


def _without_first_prefix(step: Any) -> Any:
    """A pre-tokenizer description with Metaspace's "first" prefix turned off."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence":
        parts = [_without_first_prefix(part) for part in step.get("pretokenizers", [])]
        return dict(step, pretokenizers=parts)
    if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
        return dict(step, prepend_scheme="never", add_prefix_space=False)
    return step


def _without_strip(step: Any) -> Any:
    """A decoder description that keeps the leading space of a text."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence":
        parts = [part for part in step.get("decoders", []) if part.get("type") != "Strip"]
        return dict(step, decoders=[_without_strip(part) for part in parts])
    if step.get("type") == "Metaspace":
        return dict(step, prepend_scheme="never", add_prefix_space=False)
    return step
