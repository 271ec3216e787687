"""A `tokenizer.json` from a checkpoint's own tokenizer files, whatever their layout.

Built are InternLM2's sentencepiece model and Qwen's vocab.json + merges.txt; a tokenizer.json that
is there already is completed with what only the files beside it say. The ids of text and of added
tokens are those of the source. One thing differs: a piece that an added token took the id of, such
as InternLM2's `[UNUSED_TOKEN_145]`, is text like any other.

Source: `tokenization_internlm2.py` in OpenGVLab/InternVL,
`internvl_chat/internvl/model/internlm2/`.
"""

import json
from typing import Any

import tokenizers

from mis_jax.tokenizer.files import TokenizerFiles, single_template
from mis_jax.tokenizer.pipeline import plain_tokenizer


def tokenizer_json(files: TokenizerFiles, rows: int) -> str | None:
    """Content of a tokenizer.json; None when the folder's own needs no change.

    Args:
        files: the tokenizer.
        rows: of the embedding table. Added tokens beyond it are left out: the model cannot take
            them (transformers' `<video>`, which stands for nothing but a place in a template).

    Raises:
        ValueError: files that make no tokenizer.
    """
    added = [entry for entry in files.added.values() if entry["id"] < rows]
    bos, bos_id = files.bos, files.find(files.bos)
    if files.description is not None:
        present = sorted(files.description.get("added_tokens") or [], key=lambda e: e["id"])
        templated = single_template(files.description.get("post_processor")) is not None
        if present == added and (templated or bos is None):
            return None
        description = dict(files.description)
    else:
        templated = False
        description = json.loads(plain_tokenizer(files).to_str())
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


def _with_added(
    vocab: dict[str, int], merges: list[Any], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """Vocabulary and merges in which every added token can have its id.

    An added token in the vocabulary has its id there; one that is not gets the next free one.
    """
    ids = {entry["content"]: entry["id"] for entry in added}
    added_ids = set(ids.values())
    pieces = {
        piece: i
        for piece, i in vocab.items()
        if ids.get(piece) == i or (i not in added_ids and piece not in ids)
    }
    outside = sorted(i for token, i in ids.items() if token not in pieces)
    if len(pieces) < len(vocab) or outside != [*range(len(pieces), len(pieces) + len(outside))]:
        pieces |= ids
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    pairs = [pair for pair in pairs if {*pair, "".join(pair)} <= pieces.keys()]
    return {"vocab": pieces, "merges": pairs}


def _with_bos(step: Any, bos: str, i: int) -> Any:
    """A post-processor that puts BOS in front, after what the tokenizer did already."""
    template = tokenizers.processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, i)]
    )
    return template if step is None else tokenizers.processors.Sequence([step, template])
