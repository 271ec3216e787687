"""A `tokenizer.json` from a checkpoint's own tokenizer files, whatever their layout.

Built are InternLM2's sentencepiece model and Qwen's vocab.json + merges.txt; a tokenizer.json that
is there already is completed with what only the files beside it say. The ids of text and of added
tokens are those of the source. One thing differs: a piece that an added token took the id of, such
as InternLM2's `[UNUSED_TOKEN_145]`, is text like any other.

Source: `tokenization_internlm2.py` in OpenGVLab/InternVL,
`internvl_chat/internvl/model/internlm2/`; transformers' `convert_slow_tokenizer.py` for the
pipeline.
"""

import json
from collections.abc import Mapping
from typing import Any

from mis_jax.tokenizer.files import TokenizerFiles, single_template
from mis_jax.tokenizer.sentencepiece import Kind, SentencePieceFile

_SPACE = "\u2581"  # how sentencepiece writes a space


def tokenizer_json(files: TokenizerFiles, rows: int) -> str | None:
    """Content of a tokenizer.json; None when the folder's own needs no change.

    Args:
        files: the tokenizer.
        rows: of the embedding table. Added tokens beyond it are left out: the model cannot take
            them (transformers' `<video>`, which stands for nothing but a place in a template).

    Raises:
        ValueError: files that make no tokenizer.
    """
    import tokenizers

    added = [entry for entry in files.added.values() if entry["id"] < rows]
    bos, bos_id = files.bos, files.find(files.bos)
    if bos is not None and bos_id is None:
        raise ValueError(
            f"{files.folder}: tokenizer_config.json puts {bos!r} in front of every prompt, but "
            "there is no such token; add it to added_tokens.json or set add_bos_token to false"
        )
    if files.description is not None:
        present = sorted(files.description.get("added_tokens") or [], key=lambda e: e["id"])
        templated = single_template(files.description.get("post_processor")) is not None
        if present == added and (templated or bos is None):
            return None
        description = dict(files.description)
    else:
        templated = False
        plain = _sentencepiece(files.pieces) if files.pieces else _qwen(files)
        description = json.loads(plain.to_str())
        # "normalized" would have the tokens' own text go through the normaliser before the match.
        added = [entry | {"normalized": False} for entry in added]
    model = description["model"]
    if isinstance(model.get("merges"), list):  # a BPE; other vocabularies are left as they are
        description["model"] = model | _with_added(model["vocab"], model["merges"], added)
    description["added_tokens"] = added
    try:
        result = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{files.folder}: the tokenizer files make no tokenizer ({error})"
        ) from error
    if bos is not None and bos_id is not None and not templated:
        result.post_processor = _with_bos(result.post_processor, bos, bos_id)
    wrong = [e["content"] for e in added if result.token_to_id(str(e["content"])) != e["id"]]
    if wrong:
        raise ValueError(
            f"{files.folder}: tokens {wrong} cannot have their ids in a tokenizer.json; put that "
            "of the published Hugging Face checkpoint beside the tokenizer files"
        )
    return result.to_str(pretty=True)


def _sentencepiece(model: SentencePieceFile) -> Any:
    """A pipeline that gives the ids of a sentencepiece BPE."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = model.pieces
    byte_fallback = any(piece.kind == Kind.BYTE for piece in pieces)
    unknown = next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None)
    result = Tokenizer(
        models.BPE(
            {piece.text: i for i, piece in enumerate(pieces)},
            _merges({piece.text: piece.score for piece in pieces if piece.kind == Kind.NORMAL}),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    result.normalizer = spaces
    result.decoder = decoders.Sequence(steps)
    return result


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best piece first, as sentencepiece has it."""
    merges: list[tuple[str, str]] = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        ways = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        merges += [(left, right) for left, right in ways if left in scores and right in scores]
    return merges


def _qwen(files: TokenizerFiles) -> Any:
    """Qwen's pipeline, as transformers builds it, over the checkpoint's vocabulary."""
    from tokenizers import models
    from transformers import Qwen2Tokenizer

    vocab, merges = files.folder / "vocab.json", files.folder / "merges.txt"
    result = Qwen2Tokenizer().backend_tokenizer
    try:
        result.model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{merges}: does not go with vocab.json ({error}); download both again"
        ) from error
    result.post_processor = None
    return result


def _with_added(
    vocab: dict[str, int], merges: list[Any], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """Vocabulary and merges in which every added token can have its id.

    An added token in the vocabulary has its id there; one that is not gets the next free one.
    """
    ids = {entry["content"]: entry["id"] for entry in added}
    taken = set(ids.values())
    kept = {
        piece: i
        for piece, i in vocab.items()
        if ids.get(piece) == i or (i not in taken and piece not in ids)
    }
    outside = sorted(i for token, i in ids.items() if token not in kept)
    if len(kept) < len(vocab) or outside != [*range(len(kept), len(kept) + len(outside))]:
        kept |= ids
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    pairs = [pair for pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    return {"vocab": kept, "merges": pairs}


def _with_bos(step: Any, bos: str, i: int) -> Any:
    """A post-processor that puts BOS in front, after what the tokenizer did already."""
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, i)]
    )
    return template if step is None else processors.Sequence([step, template])
