"""Plain text to ids and back by the `tokenizers` library, out of each published layout.

A pipeline knows nothing of added tokens, templates or BOS. Added tokens may take over ids of the
vocabulary, which the library has no form for, so `Tokenizer` cuts a text at them itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import tokenizers

from mis_jax.tokenizer.files import TokenizerFiles


class Pipeline:
    """The vocabulary proper of a tokenizer."""

    def __init__(self, plain: tokenizers.Tokenizer, encoded: Sequence[bytes] | None = None) -> None:
        """With `encoded`, the bytes of each id, `decode` is their text and not the library's."""
        self._plain = plain
        self._encoded = encoded
        unknown = getattr(plain.model, "unk_token", None)
        self.unk_id = None if unknown is None else plain.token_to_id(unknown)

    @classmethod
    def of(cls, files: TokenizerFiles) -> Pipeline:
        """The pipeline of a folder; ValueError for files that make none."""
        if files.pieces is None:
            return cls(plain_tokenizer(files))
        # The library makes U+FFFD of every byte around a broken one, in whole characters too, and
        # drops the leading space, which belongs to the text when the ids continue an open turn.
        return cls(plain_tokenizer(files), [piece.encoded for piece in files.pieces.pieces])

    def encode(self, text: str) -> list[int]:
        """Ids of a stretch of text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_with_text(self, text: str) -> list[tuple[int, str]]:
        """The same ids, each with the text it stands for."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [(i, text[start:stop]) for i, (start, stop) in spans]

    def spell(self, text: str) -> list[int]:
        """Ids of a text taken character by character, nothing merged."""
        ids: list[int] = []
        for character in text:
            # Visible ASCII stands for itself in every vocabulary; looking it up keeps a
            # normaliser from putting a space in front of it.
            i = self.find(character) if "!" <= character <= "~" else None
            ids += self.encode(character) if i is None else [i]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids; broken UTF-8 becomes U+FFFD, ids outside the vocabulary nothing."""
        if self._encoded is None:
            return self._plain.decode(ids, skip_special_tokens=False)
        pieces = [self._encoded[i] for i in ids if 0 <= i < len(self._encoded)]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def find(self, token: str) -> int | None:
        """The id of exactly this vocabulary entry."""
        return self._plain.token_to_id(token)


def plain_tokenizer(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """The library's tokenizer of a folder's vocabulary, without added tokens and templates."""
    if files.description is not None:
        return _described(files)
    return _qwen(files) if files.pieces is None else files.pieces.pipeline()


def _described(files: TokenizerFiles) -> tokenizers.Tokenizer:
    plain = dict(files.description or {}, added_tokens=[], post_processor=None)
    plain.update(truncation=None, padding=None)
    # "first" gives the very first word of a prompt a space in front. A prompt starts with a
    # control token, so none of its text is ever first.
    plain["pre_tokenizer"] = _without_first_prefix(plain.get("pre_tokenizer"))
    plain["decoder"] = _without_strip(plain.get("decoder"))
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises bare Exception
        path = files.folder / "tokenizer.json"
        raise ValueError(f"{path} is no usable tokenizer description ({error})") from error


def _qwen(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Qwen's pipeline, as transformers builds it, over the checkpoint's vocabulary."""
    from transformers import Qwen2Tokenizer

    vocab, merges = files.folder / "vocab.json", files.folder / "merges.txt"
    qwen = Qwen2Tokenizer().backend_tokenizer
    try:
        plain = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{merges}: does not go with vocab.json ({error}); download both again"
        ) from error
    plain.normalizer, plain.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    plain.decoder = qwen.decoder
    return plain


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
