"""What the tokenizer files of a checkpoint say about its tokens, and what is wrong with them.

Understood are the published layouts: `tokenizer.json`; InternLM2's `tokenizer.model`; Qwen's
`vocab.json` and `merges.txt`; each with whatever of `tokenizer_config.json`,
`special_tokens_map.json` and `added_tokens.json` goes with it.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mis_jax.model.config import InternVLConfig
from mis_jax.storage.json_files import MOST, Fields, read_json, token_number
from mis_jax.tokenizer.sentencepiece import Kind, SentencePieceFile, read_sentencepiece

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
#: Tokens every prompt is built of.
CONTROL_TOKENS = (IM_START, IM_END, IMG_START, IMG_END, IMG_CONTEXT)
#: Fields of tokenizer_config.json that name a token in every tokenizer.
STANDARD_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
#: What InternLM2's own class has where tokenizer_config.json is silent.
_INTERNLM2: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The tokens of one folder.

    Attributes:
        folder: where the files are.
        settings: tokenizer_config.json, completed from special_tokens_map.json.
        vocab: the vocabulary proper by piece, overridden pieces included.
        added: added tokens by content, each as tokenizer.json lists it; they take over ids.
        description: tokenizer.json, where there is one.
        pieces: tokenizer.model, where it is the vocabulary.
    """

    folder: Path
    settings: dict[str, Any]
    vocab: dict[str, int]
    added: dict[str, dict[str, Any]]
    description: dict[str, Any] | None = None
    pieces: SentencePieceFile | None = None

    @functools.cached_property
    def taken(self) -> frozenset[int]:
        """Ids of added tokens."""
        return frozenset(entry["id"] for entry in self.added.values())

    @property
    def size(self) -> int:
        """Highest id + 1: the rows an embedding table needs."""
        return max([*self.vocab.values(), *self.taken], default=-1) + 1

    def find(self, token: str | None) -> int | None:
        """The id of a token; None when there is no such token, or its id is another's now."""
        if token in self.added:
            return self.added[token]["id"]
        i = self.vocab.get(token) if token is not None else None
        return None if i in self.taken else i

    def named(self, name: str) -> str | None:
        """The token that goes by a name such as `eos_token`."""
        return content(self.settings.get(name))

    @property
    def bos(self) -> str | None:
        """The token in front of every prompt, if any.

        A tokenizer.json's template decides, as in transformers 5, then the field `add_bos_token`.
        """
        template = single_template((self.description or {}).get("post_processor"))
        if template is not None:
            return template[0].get("SpecialToken", {}).get("id") if template else None
        adds = self.settings.get("add_bos_token")
        adds = self.pieces is not None if adds is None else adds  # InternLM2's default
        return self.named("bos_token") if adds else None


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """The tokenizer of a checkpoint folder, None when it holds none.

    Raises:
        ValueError: a damaged file, or files that disagree on a token.
    """
    settings = _optional(folder / "special_tokens_map.json")
    settings |= _optional(folder / "tokenizer_config.json")
    listed: list[tuple[str, dict[str, Any]]] = []  # by file
    description = pieces = None
    if (folder / "tokenizer.json").is_file():
        description = read_json(folder / "tokenizer.json")
        vocab = _described_vocab(folder / "tokenizer.json", description)
        listed += [("tokenizer.json", entry) for entry in description.get("added_tokens") or []]
    elif (folder / "tokenizer.model").is_file():
        settings = _INTERNLM2 | settings
        pieces = read_sentencepiece(folder / "tokenizer.model")
        vocab = {piece.text: i for i, piece in enumerate(pieces.pieces)}
        apart = (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)  # never made by merging
        for i, piece in enumerate(pieces.pieces):
            if piece.kind in apart:
                text = piece.text.replace("\u2581", " ")
                special = piece.kind != Kind.USER_DEFINED
                listed.append(("tokenizer.model", {"id": i, "content": text, "special": special}))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _checked_vocab(folder / "vocab.json", read_json(folder / "vocab.json"))
    else:
        return None
    config = Fields(folder / "tokenizer_config.json", settings)
    for i, entry in config.section("added_tokens_decoder", {}).values.items():
        entry = entry if isinstance(entry, dict) else {"content": entry}
        listed.append(
            (config.path.name, entry | {"id": i if (n := token_number(i)) is None else n})
        )
    added_tokens = _optional(folder / "added_tokens.json")
    listed += [("added_tokens.json", dict(id=i, content=t)) for t, i in added_tokens.items()]
    added = _merged(folder, listed)
    taken = {entry["id"] for entry in added.values()}
    for token in (*CONTROL_TOKENS, *declared_special(settings)):
        if len(token) == 1:  # such as "!" named as the padding: still text
            continue
        if token not in added and token in vocab and vocab[token] not in taken:
            added[token] = {"id": vocab[token], "content": token, **_FLAGS}
        if token in added:
            added[token]["special"] = True
    return TokenizerFiles(folder, settings, vocab, added, description, pieces)


def tokenizer_problems(folder: Path, config: InternVLConfig) -> list[str]:
    """What keeps a folder's tokenizer from serving its model, one line each; empty when sound."""
    try:
        files = read_tokenizer_files(folder)
    except ValueError as error:
        return [str(error)]
    if files is None:
        return [
            "no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt); "
            "copy the tokenizer files of the published checkpoint"
        ]
    rows = config.text.vocab_size
    lines = [] if files.size <= rows else [f"tokenizer has {files.size} ids, embedding {rows} rows"]
    return lines + control_token_problems(files, config)


def control_token_problems(files: TokenizerFiles, config: InternVLConfig) -> list[str]:
    """Tokens of every prompt that are missing, out of the embedding table or not the model's."""
    lines = []
    rows = config.text.vocab_size
    for token in CONTROL_TOKENS:
        i = files.find(token)
        if i is None:
            lines.append(f"tokenizer has no token {token}")
        elif i >= rows:
            lines.append(f"token {token} has id {i}, embedding {rows} rows")
    found = files.find(IMG_CONTEXT)
    if found is not None and found != config.image_token_id:
        lines.append(
            f"{IMG_CONTEXT} has id {found} in the tokenizer and {config.image_token_id} in "
            "config.json"
        )
    return lines


def content(token: Any) -> str | None:
    """A token's text from either form files use: a string or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def declared_special(settings: dict[str, Any]) -> Iterator[str]:
    """Tokens that tokenizer_config.json calls special, by any of its fields."""
    values = [settings.get(name) for name in STANDARD_TOKENS]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(field) or []
        values += listed.values() if isinstance(listed, dict) else listed
    yield from filter(None, map(content, values))


def single_template(step: Any) -> list[dict[str, Any]] | None:
    """The items a tokenizer.json puts around one text; None when it has no template."""
    if not isinstance(step, dict):
        return None
    if step.get("type") == "Sequence":
        found = map(single_template, step.get("processors", []))
        return next((template for template in found if template is not None), None)
    return step.get("single") if step.get("type") == "TemplateProcessing" else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _described_vocab(path: Path, description: dict[str, Any]) -> dict[str, int]:
    vocab = (description.get("model") or {}).get("vocab")
    if isinstance(vocab, list):  # Unigram: pieces with their scores, in order of ids
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    if not isinstance(vocab, dict):
        raise ValueError(f"{path}: field 'model.vocab' is missing; download the file again")
    return _checked_vocab(path, vocab)


def _checked_vocab(path: Path, vocab: dict[str, Any]) -> dict[str, int]:
    for piece, i in vocab.items():
        if type(i) is not int or not 0 <= i <= MOST:
            raise ValueError(
                f"{path}: the id of {piece!r:.80} is {i!r:.40}, no whole number up to {MOST}; "
                "download the file again"
            )
    return vocab


def _merged(folder: Path, listed: list[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Added tokens by content, in order of ids; a later file takes over ids."""
    by_id: dict[int, dict[str, Any]] = {}
    ids: dict[str, int] = {}
    for file, entry in listed:
        token, i = content(entry), entry.get("id") if isinstance(entry, dict) else None
        if token is None or type(i) is not int or not 0 <= i <= MOST:
            raise ValueError(
                f"{folder / file}: an added token is {entry!r:.100}, not a text with a whole "
                f"number up to {MOST} as its id; download the file again"
            )
        if ids.setdefault(token, i) != i:
            raise ValueError(
                f"{folder / file}: {token!r} has id {i}, and {ids[token]} in another file; "
                "restore the published files"
            )
        before = by_id.get(i, {})
        if before and before["content"] != token:
            del ids[before["content"]]
            before = {}
        flags = {"special": False, **_FLAGS} | before | entry
        by_id[i] = flags | {"special": flags["special"] or before.get("special", False)}
    return {by_id[i]["content"]: by_id[i] for i in sorted(by_id)}
