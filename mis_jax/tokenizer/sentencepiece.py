"""What a sentencepiece `.model` file says: its pieces, and whether it is of the kind we convert.

The library tells neither which pieces are user-defined nor how text is normalised, and the protobuf
module it ships refuses a protobuf older than the newest, which other packages of an installation
may hold back. So the file is read by its wire format.

Source: sentencepiece `src/sentencepiece_model.proto`, field numbers and defaults; wire format:
protobuf.dev/programming-guides/encoding.
"""

import dataclasses
import enum
import struct
from collections import defaultdict
from pathlib import Path


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


@dataclasses.dataclass(frozen=True)
class SentencePieceFile:
    """A BPE model that leaves text as it is but for writing spaces as U+2581."""

    pieces: list[Piece]
    add_dummy_prefix: bool  # a space in front of every text


_BPE = 2
_Message = dict[int, list[int | bytes]]


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Read a `.model` file.

    Raises:
        ValueError: a damaged file, or one that is no BPE or changes text by rules of its own.
    """
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no readable sentencepiece model ({error})") from error
    model = _message(path.read_bytes())
    trainer, normalizer = (_message(_bytes(model[number])) for number in (2, 3))
    unsupported = [
        ("trainer_spec.model_type", _int(trainer[3], default=1), _BPE),
        ("trainer_spec.treat_whitespace_as_suffix", _int(trainer[24], default=0), 0),
        ("normalizer_spec.precompiled_charsmap", len(_bytes(normalizer[2])), 0),
        ("normalizer_spec.remove_extra_whitespaces", _int(normalizer[4], default=1), 0),
        ("normalizer_spec.escape_whitespaces", _int(normalizer[5], default=1), 1),
    ]
    for name, value, supported in unsupported:
        if value != supported:
            raise ValueError(
                f"{path}: {name} is {value}, supported: {supported}; put the tokenizer.json of "
                "the published Hugging Face checkpoint beside it"
            )
    pieces = [_piece(_message(_bytes([entry]))) for entry in model[1]]
    return SentencePieceFile(pieces, bool(_int(normalizer[3], default=1)))


def _piece(fields: _Message) -> Piece:
    score = struct.unpack("<f", _bytes(fields[2]) or bytes(4))[0]
    return Piece(_bytes(fields[1]).decode(), score, Kind(_int(fields[3], default=Kind.NORMAL)))


def _bytes(values: list[int | bytes]) -> bytes:
    """A field that holds bytes; as in protobuf the last of several counts."""
    value = values[-1] if values else b""
    assert isinstance(value, bytes)
    return value


def _int(values: list[int | bytes], default: int) -> int:
    value = values[-1] if values else default
    assert isinstance(value, int)
    return value


def _message(data: bytes) -> _Message:
    """The fields of one protobuf message by number, each with all its values."""
    fields: _Message = defaultdict(list)
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            fields[number].append(varint())
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            size = varint()
        fields[number].append(data[position : position + size])
        position += size
    return fields
