"""Tokenizers of InternVL checkpoints, read from local files without any remote code.

Three published layouts are understood:

* `tokenizer.json` (everything HF-native, and most Qwen-based checkpoints);
* `tokenizer.model` without it: InternLM2's sentencepiece layout;
* `vocab.json` + `merges.txt`: Qwen's byte-level BPE.

Text and control tokens never mix here. `Tokenizer.encode_text` takes ordinary text, in which a
typed `<|im_end|>` is ten plain characters; control tokens enter a prompt only by id, through
`Tokenizer.token_id` and the `*_id` properties (`data.chat_template.render` puts them in).

Source of the layouts: `internvl_chat/internvl/model/internlm2/` in OpenGVLab/InternVL for
InternLM2's, transformers for Qwen's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mis_jax.storage.json_files import MOST, read_json, token_number
from mis_jax.tokenizer.backends import Backend, BPEBackend, SentencePieceBackend

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"

#: Tokens that structure a prompt; they are never made out of typed text.
CONTROL_TOKENS = (IM_START, IM_END, IMG_START, IMG_END, IMG_CONTEXT)
#: Tokens that belong to the text itself: a typed `<box>` is the token `<box>`.
GROUNDING_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")


def whole_text(text: str) -> str:
    """Text that every encoder takes: half of a surrogate pair becomes U+FFFD, two halves one.

    JSON may hold `"\\ud83d"` alone; neither a tokenizer nor UTF-8 has a form for it.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer; made by `load_tokenizer`.

    Attributes:
        folder: where its files are; `save` copies them from there.
        backend: the vocabulary proper.
        added: every added token and its id. They override vocabulary entries of the same id.
        special: the added tokens `decode` leaves out on request.
        bos_id: the token every prompt starts with; None when this tokenizer adds none.
        eos_id: the tokenizer's own end token, if it names one.
        pad_id: what fills up batches; it is masked, so its value has no meaning.
        vocab_size: highest id + 1: the rows an embedding table needs.
    """

    folder: Path
    backend: Backend
    added: Mapping[str, int]
    special: frozenset[str]
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    vocab_size: int = field(init=False)
    _in_text: re.Pattern[str] | None = field(init=False, repr=False)
    _forbidden: frozenset[int] = field(init=False, repr=False)
    _added_by_id: Mapping[int, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        in_text = [token for token in self.added if self._is_text(token)]
        in_text.sort(key=len, reverse=True)  # longest first, as one may be the start of another
        pattern = "|".join(re.escape(token) for token in in_text)
        # Text must not come out as any id of the table by way of the vocabulary either: as
        # sentencepiece's [UNUSED_TOKEN_146], whose id InternLM2 gave to <|im_start|>, or as a
        # BPE merge of "</" and "s>". The unknown token is the one it may need.
        forbidden = set(self.added.values()) - {self.backend.unk_id}
        derived = {
            "vocab_size": max(self.backend.size, max(self.added.values(), default=-1) + 1),
            "_in_text": re.compile(f"({pattern})") if pattern else None,
            "_forbidden": frozenset(forbidden),
            "_added_by_id": {i: token for token, i in self.added.items()},
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _is_text(self, token: str) -> bool:
        """Whether an added token may come out of typed text (`<box>`, `<think>`, ...)."""
        if token in GROUNDING_TOKENS or len(token) == 1:
            return True
        # Some files leave the special flag off role tokens; their shape gives them away.
        role_like = token.startswith("<|") and token.endswith("|>")
        return not (token in CONTROL_TOKENS or token in self.special or role_like)

    def encode_text(self, text: str) -> list[int]:
        """Ids of ordinary text; no BOS.

        Control and other special tokens typed in it come out as plain characters. Grounding
        tokens, and added tokens the tokenizer does not declare special, keep their ids.
        """
        text = whole_text(text)
        if self._in_text is None:
            return self._encode_plain(text)
        ids: list[int] = []
        for index, part in enumerate(self._in_text.split(text)):
            if index % 2:
                ids.append(self.added[part])
            elif part:
                ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids = self.backend.encode(text) if text else []
        if self._forbidden.isdisjoint(ids):
            return ids
        safe: list[int] = []
        for i, piece in self.backend.encode_with_text(text):
            safe += self.backend.spell(piece) if i in self._forbidden else [i]
        return safe

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, leading spaces kept; ids without a token give nothing."""
        parts: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            token = self._added_by_id.get(i)
            if token is None:
                run.append(i)
            elif not (skip_special_tokens and (token in self.special or token in CONTROL_TOKENS)):
                parts += [self.backend.decode(run), token]
                run = []
        return "".join([*parts, self.backend.decode(run)])

    def token_id(self, token: str) -> int:
        """The id of one token.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        i = self.added.get(token)
        if i is None:
            i = self.backend.find(token)
            if i is None or i in self._added_by_id:
                raise ValueError(
                    f"the tokenizer in {self.folder} has no token {token!r}; use the tokenizer "
                    "files of an InternVL checkpoint, added_tokens.json included"
                )
        return i

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`, which opens a turn."""
        return self.token_id(IM_START)

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`, which closes a turn."""
        return self.token_id(IM_END)

    @property
    def img_start_id(self) -> int:
        """Id of `<img>`."""
        return self.token_id(IMG_START)

    @property
    def img_end_id(self) -> int:
        """Id of `</img>`."""
        return self.token_id(IMG_END)

    @property
    def img_context_id(self) -> int:
        """Id of `<IMG_CONTEXT>`, the places image features are written to."""
        return self.token_id(IMG_CONTEXT)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: `<|im_end|>`, the tokenizer's own end and `<|endoftext|>`."""
        found = {self.im_end_id, self.eos_id, self.added.get("<|endoftext|>")}
        return tuple(sorted(i for i in found if i is not None))

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's own files, byte for byte, into a folder (made if needed)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() == self.folder.resolve():
            return
        sources = [self.folder / name for name in _FILES]
        # InternLM2's own class, never run here, is part of what the original layout needs.
        sources += sorted(self.folder.glob("tokenization_*.py"))
        present = [source for source in sources if source.is_file()]
        if not present:
            raise ValueError(f"the tokenizer files have gone from {self.folder}; restore them")
        for source in present:
            shutil.copyfile(source, folder / source.name)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder; no network, no code from the folder.

    Args:
        folder: holds `tokenizer.json`, or `tokenizer.model`, or `vocab.json` and `merges.txt`,
            with whatever of `tokenizer_config.json`, `added_tokens.json` and
            `special_tokens_map.json` was published with it.

    Raises:
        ValueError: no tokenizer there, a damaged file, or files that contradict each other.
    """
    folder = Path(folder)
    config: dict[str, Any] = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    table = _AddedTokens(folder)
    if (folder / "tokenizer.json").is_file():
        description = _read_json(folder / "tokenizer.json")
        backend: Backend = BPEBackend.from_json(description, str(folder / "tokenizer.json"))
        listed = description.get("added_tokens") or []
        for entry in _listed(folder / "tokenizer.json", listed, list):
            flags = entry if isinstance(entry, dict) else {}
            table.add(flags.get("content"), flags.get("id"), flags, "tokenizer.json")
        template = _single_template(description.get("post_processor"))
        first = None if not template else template[0].get("SpecialToken", {}).get("id")
        bos = first if template is not None else _bos_of(config, default=False)
    elif (folder / "tokenizer.model").is_file():
        pieces = SentencePieceBackend(folder / "tokenizer.model")
        backend = pieces
        for token, i in pieces.control_pieces().items():
            table.add(token, i, {"special": True}, "tokenizer.model")
        for name, default in (("bos_token", "<s>"), ("eos_token", "</s>")):
            config.setdefault(name, default)
        bos = _bos_of(config, default=True)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = BPEBackend.from_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")
        bos = _bos_of(config, default=False)
    else:
        raise ValueError(
            f"{folder} holds no tokenizer; it needs tokenizer.json, tokenizer.model, or "
            "vocab.json with merges.txt"
        )
    listed = config.get("added_tokens_decoder") or {}
    for i, entry in _listed(folder / "tokenizer_config.json", listed, dict).items():
        flags = entry if isinstance(entry, dict) else {"content": entry}
        table.add(flags.get("content"), token_number(i), flags, "tokenizer_config.json")
    for token, i in _read_json(folder / "added_tokens.json").items():
        table.add(token, i, {}, "added_tokens.json")

    named = {name: _content(config.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
    extra = []
    for field_name in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(field_name) or []
        listed = listed.values() if isinstance(listed, dict) else listed
        extra += [_content(token) for token in listed]
    table.declare_special(filter(None, [bos, *named.values(), *extra]), backend)

    ids = {name: table.ids.get(token) for name, token in named.items() if token}
    if bos is not None and bos not in table.ids:
        raise ValueError(
            f"the tokenizer in {folder} puts {bos!r} in front of every prompt but has no such "
            "token; add it to added_tokens.json or set add_bos_token to false"
        )
    candidates = (ids.get("pad"), ids.get("eos"), table.ids.get(IM_END), 0)
    return Tokenizer(
        folder=folder,
        backend=backend,
        added=table.ids,
        special=frozenset(table.special),
        bos_id=None if bos is None else table.ids[bos],
        eos_id=ids.get("eos"),
        pad_id=next(i for i in candidates if i is not None),
    )


class _AddedTokens:
    """The added tokens of a folder, gathered from the files that list them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: dict[str, int] = {}
        self._by_id: dict[int, str] = {}  # the same, the other way round
        self.special: set[str] = set()

    def add(self, token: Any, i: Any, flags: Mapping[str, Any], source: str) -> None:
        """Enter one token; a later source takes over ids, never changes a token's own id."""
        if not (isinstance(token, str) and token and type(i) is int and 0 <= i <= MOST):
            raise ValueError(
                f"{self.folder / source}: an added token is {token!r:.60} with id {i!r:.40}, not a "
                f"text with a whole number up to {MOST}; restore the published file"
            )
        if self.ids.get(token, i) != i:
            raise ValueError(
                f"the tokenizer files in {self.folder} disagree on {token!r}: {source} gives it "
                f"id {i}, another file {self.ids[token]}; restore the published files"
            )
        if token in CONTROL_TOKENS + GROUNDING_TOKENS:
            for flag in ("lstrip", "rstrip", "single_word"):
                if flags.get(flag):
                    raise ValueError(
                        f"{source} in {self.folder} sets {flag} for {token!r}; InternVL prompts "
                        "keep the text around tokens as it is: set it to false"
                    )
        other = self._by_id.get(i, token)
        if other != token:
            del self.ids[other]
            self.special.discard(other)
        self.ids[token], self._by_id[i] = i, token
        if flags.get("special"):
            self.declare_special([token], None)

    def declare_special(self, names: Iterable[str], backend: Backend | None) -> None:
        """Mark tokens special, entering those so far known to the vocabulary alone."""
        for token in names:
            # A file may name an ordinary character, such as "!", as its padding: still text.
            if len(token) == 1:
                continue
            i = self.ids.get(token, None if backend is None else backend.find(token))
            if i is not None and (token in self.ids or i not in self._by_id):
                self.ids[token], self._by_id[i] = i, token
                self.special.add(token)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file."""
    return read_json(path) if path.is_file() else {}


def _listed(source: Path, value: Any, kind: type) -> Any:
    """A list or mapping of added tokens."""
    if not isinstance(value, kind):
        raise ValueError(
            f"{source}: its added tokens are {value!r:.60}, no "
            f"{'list' if kind is list else 'object'}; restore the published file"
        )
    return value


def _content(token: Any) -> str | None:
    """A token's text from either form files use: a string or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _bos_of(config: Mapping[str, Any], *, default: bool) -> str | None:
    """The BOS token, if the configuration says that one is added."""
    adds = config.get("add_bos_token")
    adds = default if adds is None else adds
    return _content(config.get("bos_token")) if adds else None


def _single_template(step: Any) -> list[dict[str, Any]] | None:
    """The items a tokenizer.json puts around one text; None when it has no template."""
    if not isinstance(step, dict):
        return None
    if step.get("type") == "Sequence":
        found = map(_single_template, step.get("processors", []))
        return next((template for template in found if template is not None), None)
    return step.get("single") if step.get("type") == "TemplateProcessing" else None
