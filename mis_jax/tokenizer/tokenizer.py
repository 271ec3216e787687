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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mis_jax.storage.files import copy_file, make_folder
from mis_jax.tokenizer.files import (
    CONTROL_TOKENS,
    IM_END,
    IM_START,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    read_tokenizer_files,
)
from mis_jax.tokenizer.pipeline import Pipeline

#: Tokens that belong to the text itself: a typed `<box>` is the token `<box>`.
GROUNDING_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def whole_text(text: str) -> str:
    """Text that every encoder takes: half of a surrogate pair becomes U+FFFD, two halves one.

    JSON may hold `"\\ud83d"` alone; neither a tokenizer nor UTF-8 has a form for it.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer; made by `load_tokenizer`.

    Attributes:
        folder: where its files are; `save` copies them from there.
        pipeline: the vocabulary proper.
        added: every added token and its id. They override vocabulary entries of the same id.
        special: the added tokens `decode` leaves out on request.
        bos_id: the token every prompt starts with; None when this tokenizer adds none.
        eos_id: the tokenizer's own end token, if it names one.
        pad_id: what fills up batches; it is masked, so its value has no meaning.
        vocab_size: highest id + 1: the rows an embedding table needs.
    """

    folder: Path
    pipeline: Pipeline
    added: Mapping[str, int]
    special: frozenset[str]
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    vocab_size: int
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
        forbidden = set(self.added.values()) - {self.pipeline.unk_id}
        derived = {
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
        ids = self.pipeline.encode(text) if text else []
        if self._forbidden.isdisjoint(ids):
            return ids
        safe: list[int] = []
        for i, piece in self.pipeline.encode_with_text(text):
            safe += self.pipeline.spell(piece) if i in self._forbidden else [i]
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
                parts += [self.pipeline.decode(run), token]
                run = []
        return "".join([*parts, self.pipeline.decode(run)])

    def token_id(self, token: str) -> int:
        """The id of one token.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        i = self.added.get(token)
        if i is None:
            i = self.pipeline.find(token)
            if i is None or i in self._added_by_id:
                raise ValueError(
                    f"the tokenizer in {self.folder} has no token {token!r}; use the tokenizer "
                    "files of an InternVL checkpoint, added_tokens.json included"
                )
        return i

    def check_fits(self, rows: int) -> None:
        """Raise ValueError for ids beyond an embedding table of so many rows.

        They would be looked up as NaN or as another token, without a word.
        """
        if self.vocab_size <= rows:
            return
        beyond = [f"{i} ({token})" for i, token in sorted(self._added_by_id.items()) if i >= rows]
        shown = beyond or [f"{rows} to {self.vocab_size - 1}"]
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        raise ValueError(
            f"the tokenizer in {self.folder} has ids beyond the {rows} embeddings of the model "
            f"('vocab_size' in config.json): {', '.join(shown[:8])}{more}; restore the tokenizer "
            "files that were published with the checkpoint, or resize its embeddings"
        )

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
        make_folder(folder)
        if folder.resolve() == self.folder.resolve():
            return
        sources = [self.folder / name for name in _FILES]
        # InternLM2's own class, never run here, is part of what the original layout needs.
        sources += sorted(self.folder.glob("tokenization_*.py"))
        present = [source for source in sources if source.is_file()]
        if not present:
            raise ValueError(f"the tokenizer files have gone from {self.folder}; restore them")
        for source in present:
            copy_file(source, folder / source.name)


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
    files = read_tokenizer_files(folder)
    if files is None:
        raise ValueError(
            f"{folder} holds no tokenizer; it needs tokenizer.json, tokenizer.model, or "
            "vocab.json with merges.txt"
        )
    pipeline = Pipeline.of(files)
    for token, entry in files.added.items():
        for flag in ("lstrip", "rstrip", "single_word"):
            if entry[flag] and token in CONTROL_TOKENS + GROUNDING_TOKENS:
                raise ValueError(
                    f"the tokenizer in {folder} sets {flag} for {token!r}; InternVL prompts keep "
                    "the text around tokens as it is: set it to false"
                )
    added = {
        token: entry["id"]
        for token, entry in files.added.items()
        if entry["special"] or not files.is_user_defined(token)  # which are the pipeline's own
    }
    eos_id, pad_id = (added.get(files.named(f"{name}_token") or "") for name in ("eos", "pad"))
    candidates = (pad_id, eos_id, added.get(IM_END), 0)
    return Tokenizer(
        folder=folder,
        pipeline=pipeline,
        added=added,
        # A file may declare an ordinary character special, such as "!": still text.
        special=frozenset(t for t, entry in files.added.items() if entry["special"] and len(t) > 1),
        bos_id=files.find(files.bos),
        eos_id=eos_id,
        pad_id=next(i for i in candidates if i is not None),
        vocab_size=files.size,
    )
