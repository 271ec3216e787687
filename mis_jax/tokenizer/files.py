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
#: Tokens that structure a prompt; they are never made out of typed text.
CONTROL_TOKENS = (IM_START, IM_END, IMG_START, IMG_END, IMG_CONTEXT)
#: Fields of tokenizer_config.json that name a token in every tokenizer.
STANDARD_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
#: What InternLM2's own class has where tokenizer_config.json is silent.
_INTERNLM2: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

_Listed = list[tuple[str, Any]]  # added tokens as files list them, each with the file's name


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
    def added_ids(self) -> frozenset[int]:
        """Ids of added tokens."""
        return frozenset(entry["id"] for entry in self.added.values())

    @property
    def size(self) -> int:
        """Highest id + 1: the rows an embedding table needs."""
        return max([*self.vocab.values(), *self.added_ids], default=-1) + 1

    def find(self, token: str | None) -> int | None:
        """The id of a token; None when there is no such token, or its id is another's now."""
        if token in self.added:
            return self.added[token]["id"]
        i = self.vocab.get(token) if token is not None else None
        return None if i in self.added_ids else i

    def is_user_defined(self, token: str) -> bool:
        """Whether an added token is a piece of tokenizer.model that text is cut at."""
        i, pieces = self.added[token]["id"], self.pieces.pieces if self.pieces else []
        return i < len(pieces) and (pieces[i].kind, pieces[i].plain) == (Kind.USER_DEFINED, token)

    def named(self, name: str) -> str | None:
        """The token that goes by a name such as `eos_token`."""
        return content(self.settings.get(name))

    @property
    def bos(self) -> str | None:
        """The token in front of every prompt, if any.

        A tokenizer.json's template decides, as in transformers 5, then the field `add_bos_token`.

        Raises:
            ValueError: there is no such token.
        """
        template = single_template((self.description or {}).get("post_processor"))
        if template is not None:
            bos = template[0].get("SpecialToken", {}).get("id") if template else None
        else:
            adds = self.settings.get("add_bos_token")
            adds = self.pieces is not None if adds is None else adds  # InternLM2's default
            bos = self.named("bos_token") if adds else None
        if bos is not None and self.find(bos) is None:
            raise ValueError(
                f"{self.folder}: tokenizer_config.json puts {bos!r} in front of every prompt, but "
                "there is no such token; add it to added_tokens.json or set add_bos_token to false"
            )
        return bos


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """The tokenizer of a checkpoint folder, None when it holds none.

    Raises:
        ValueError: a damaged file, or files that disagree on a token.
    """
    settings = _optional(folder / "special_tokens_map.json")
    settings |= _optional(folder / "tokenizer_config.json")
    listed: _Listed = []
    description = pieces = None
    if (path := folder / "tokenizer.json").is_file():
        description = read_json(path)
        vocab = _described_vocab(path, description)
        entries = description.get("added_tokens") or []
        if not isinstance(entries, list):
            raise ValueError(
                f"{path}: field 'added_tokens' is {entries!r:.60}, no list; download the file again"
            )
        listed += [(path.name, entry) for entry in entries]
    elif (path := folder / "tokenizer.model").is_file():
        settings = _INTERNLM2 | settings
        pieces = read_sentencepiece(path)
        vocab = {piece.text: i for i, piece in enumerate(pieces.pieces)}
        never_merged = (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
        for i, piece in enumerate(pieces.pieces):
            if piece.kind in never_merged:
                special = piece.kind != Kind.USER_DEFINED
                listed.append((path.name, {"id": i, "content": piece.plain, "special": special}))
    elif (path := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _checked_vocab(path, read_json(path))
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
    files = TokenizerFiles(folder, settings, vocab, _merged(folder, listed), description, pieces)
    return dataclasses.replace(files, added=_declared(files))


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
    image_token = files.find(IMG_CONTEXT)
    if image_token is not None and image_token != config.image_token_id:
        lines.append(
            f"{IMG_CONTEXT} has id {image_token} in the tokenizer and {config.image_token_id} in "
            "config.json"
        )
    return lines


def content(token: Any) -> str | None:
    """A token's text from either form files use: a string or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def single_template(step: Any) -> list[dict[str, Any]] | None:
    """The items a tokenizer.json puts around one text; None when it has no template."""
    if not isinstance(step, dict):
        return None
    if step.get("type") == "Sequence":
        templates = map(single_template, step.get("processors", []))
        return next((template for template in templates if template is not None), None)
    return step.get("single") if step.get("type") == "TemplateProcessing" else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _described_vocab(path: Path, description: dict[str, Any]) -> dict[str, int]:
    model = description.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list) and all(isinstance(e, list) and e for e in vocab):
        return {str(piece): i for i, (piece, *_) in enumerate(vocab)}  # Unigram, in order of ids
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


def _merged(folder: Path, listed: _Listed) -> dict[str, dict[str, Any]]:
    """Added tokens by content, in order of ids; a later file takes over ids."""
    by_id: dict[int, dict[str, Any]] = {}
    ids: dict[str, int] = {}
    for file, entry in listed:
        token, i = content(entry), entry.get("id") if isinstance(entry, dict) else None
        if not token or type(i) is not int or not 0 <= i <= MOST:
            raise ValueError(
                f"{folder / file}: an added token is {entry!r:.100}, not a text with a whole "
                f"number up to {MOST} as its id; download the file again"
            )
        if ids.setdefault(token, i) != i:
            raise ValueError(
                f"the tokenizer files disagree on {token!r}: {folder / file}: {token!r} has id "
                f"{i}, and {ids[token]} in another file; restore the published files"
            )
        before = by_id.get(i, {})
        if before and before["content"] != token:
            del ids[before["content"]]
            before = {}
        flags = {"special": False, **_FLAGS} | before | entry
        by_id[i] = flags | {"special": bool(flags["special"] or before.get("special"))}
    return {by_id[i]["content"]: by_id[i] for i in sorted(by_id)}


def _declared(files: TokenizerFiles) -> dict[str, dict[str, Any]]:
    """The added tokens, with those the settings or the vocabulary alone know of as special."""
    added = dict(files.added)
    for token in (*CONTROL_TOKENS, *filter(None, [files.bos]), *_special_names(files)):
        if len(token) == 1:  # such as "!" named as the padding: still text
            continue
        if token not in added and (i := files.find(token)) is not None:
            added[token] = {"id": i, "content": token, **_FLAGS}
        if token in added:
            added[token] = added[token] | {"special": True}
    return added


def _special_names(files: TokenizerFiles) -> Iterator[str]:
    """Tokens that tokenizer_config.json calls special, by any of its fields."""
    config = Fields(files.folder / "tokenizer_config.json", files.settings)
    values = [config.get(name, None) for name in STANDARD_TOKENS]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(field, [])
        if not isinstance(listed, list | dict):
            config.refuse(field, "a list of tokens, or an object of them")
        values += listed.values() if isinstance(listed, dict) else listed
    yield from filter(None, map(content, values))
