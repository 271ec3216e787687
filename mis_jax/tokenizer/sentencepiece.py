"""A sentencepiece `.model` file, read without the library, as a pipeline of `tokenizers`.

The library tells neither which pieces are user-defined nor how text is normalised, and the protobuf
module it ships refuses a protobuf older than the newest, which other packages of an installation
may hold back. So the few fields that count are described here.

Source: sentencepiece `src/sentencepiece_model.proto`, field numbers and defaults; transformers'
`convert_slow_tokenizer.py` for the pipeline.
"""

import dataclasses
import enum
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mis_jax.storage.files import read_bytes, refuse_lfs_pointer

_SPACE = "\u2581"  # how sentencepiece writes a space
_LONGEST_PIECE = 1000  # characters; the library's trainer makes up to 16


class Kind(enum.IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its id is its place."""

    text: str
    score: float  # of two pieces that could be made next, BPE makes the one with the higher
    kind: Kind

    @property
    def plain(self) -> str:
        """The text it stands for, of all but bytes."""
        return self.text.replace(_SPACE, " ")

    @property
    def encoded(self) -> bytes:
        """The UTF-8 of that text, or one byte of it."""
        if self.kind == Kind.BYTE:
            return bytes([int(self.text[3:5], 16)])
        return self.plain.encode()


@dataclasses.dataclass(frozen=True)
class SentencePieceFile:
    """A BPE model that leaves text as it is but for writing spaces as U+2581.

    Ids are exactly the library's where scores differ, as trainers make them, and no piece is of
    kind UNUSED that text could be merged to: the library merges those, and cuts them up again.
    """

    pieces: list[Piece]
    add_dummy_prefix: bool  # a space in front of every text

    def pipeline(self) -> Any:
        """A `tokenizers.Tokenizer` that gives the ids this model gives."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

        pieces = self.pieces
        unknown = next(piece.text for piece in pieces if piece.kind == Kind.UNKNOWN)
        result = Tokenizer(
            models.BPE(
                {piece.text: i for i, piece in enumerate(pieces)},
                _merges({piece.text: piece.score for piece in pieces if piece.kind == Kind.NORMAL}),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=any(piece.kind == Kind.BYTE for piece in pieces),
            )
        )
        spaces = normalizers.Replace(" ", _SPACE)
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.add_dummy_prefix:
            spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
            steps.append(decoders.Strip(" ", 1, 0))
        result.normalizer = spaces
        result.decoder = decoders.Sequence(steps)
        # "normalized": a typed U+2581 is a space here too.
        whole = [piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED]
        result.add_tokens([AddedToken(text, normalized=True) for text in whole])
        return result


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best piece first, as sentencepiece has it."""
    merges: list[tuple[str, str]] = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        ways = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        merges += [(left, right) for left, right in ways if left in scores and right in scores]
    return merges


_BPE = 2
#: What is read of sentencepiece_model.proto, under numbers, types and defaults of its own.
_FIELDS = {
    "Piece": [("piece", 1, "BYTES", ""), ("score", 2, "FLOAT", "0"), ("type", 3, "INT32", "1")],
    "Trainer": [
        ("model_type", 3, "INT32", "1"), ("treat_whitespace_as_suffix", 24, "BOOL", "false"),
    ],
    "Normalizer": [
        ("precompiled_charsmap", 2, "BYTES", ""), ("add_dummy_prefix", 3, "BOOL", "true"),
        ("remove_extra_whitespaces", 4, "BOOL", "true"), ("escape_whitespaces", 5, "BOOL", "true"),
    ],
    "Model": [
        ("pieces", 1, "Piece", ""), ("trainer_spec", 2, "Trainer", ""),
        ("normalizer_spec", 3, "Normalizer", ""),
    ],
}  # fmt: skip


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Read a `.model` file.

    Raises:
        ValueError: a damaged file, or one that is no BPE or changes text by rules of its own.
    """
    from google.protobuf.message import DecodeError

    try:
        model = _model_class().FromString(read_bytes(path))
        pieces = [_piece(entry) for entry in model.pieces]
        if [piece.kind for piece in pieces].count(Kind.UNKNOWN) != 1:
            raise ValueError("it has not one piece for what is unknown")
        if len({piece.text for piece in pieces}) < len(pieces):
            raise ValueError("a piece stands in it twice")
    except (DecodeError, OSError, ValueError) as error:
        refuse_lfs_pointer(path)
        raise ValueError(f"{path} is no readable sentencepiece model ({error})") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    rules = [
        ("trainer_spec.model_type", trainer.model_type, _BPE),
        ("trainer_spec.treat_whitespace_as_suffix", int(trainer.treat_whitespace_as_suffix), 0),
        ("normalizer_spec.precompiled_charsmap", len(normalizer.precompiled_charsmap), 0),
        ("normalizer_spec.remove_extra_whitespaces", int(normalizer.remove_extra_whitespaces), 0),
        ("normalizer_spec.escape_whitespaces", int(normalizer.escape_whitespaces), 1),
    ]
    if any(piece.kind == Kind.USER_DEFINED for piece in pieces):
        # A tokenizer.json has the prefix after each of them, the library once in a text.
        rules.append(("normalizer_spec.add_dummy_prefix", int(normalizer.add_dummy_prefix), 0))
    for name, value, supported in rules:
        if value != supported:
            raise ValueError(
                f"{path}: {name} is {value}, supported: {supported}; put the tokenizer.json of "
                "the published Hugging Face checkpoint beside it"
            )
    return SentencePieceFile(pieces, normalizer.add_dummy_prefix)


def _piece(entry: Any) -> Piece:
    piece = Piece(entry.piece.decode(), entry.score, Kind(entry.type))
    if len(piece.text) > _LONGEST_PIECE:  # it is cut in two at every place
        raise ValueError(f"a piece has {len(piece.text)} characters")
    if piece.kind == Kind.BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", piece.text):
        raise ValueError(f"{piece.text!r:.40} stands for no byte")
    return piece


@functools.cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="sentencepiece", syntax="proto2")
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, number, kind, default in fields:
            described.field.add(
                name=name,
                number=number,
                label=3 if name == "pieces" else 1,  # repeated, optional
                type=f"TYPE_{'MESSAGE' if kind in _FIELDS else kind}",
                type_name=f".{kind}" if kind in _FIELDS else None,
                default_value=default or None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))
