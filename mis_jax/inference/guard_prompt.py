"""What a guard model reads: an exchange inside the checkpoint's own chat template.

User, model and policy texts come from outside. The template is rendered with marks in their places
and cut at its control tokens, and only then do the texts take the places of the marks. So a typed
`<|eot_id|>` stays ten characters, while words merge with what stands around them into the tokens
that the guard was trained on.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mis_jax.storage.files import read_text
from mis_jax.storage.json_files import Fields, read_json
from mis_jax.tokenizer.files import STANDARD_TOKENS, content
from mis_jax.tokenizer.tokenizer import Tokenizer

_TURN = "<|end_header_id|>"  # in Llama 3's format the guard's words follow this and an empty line
_EDGE = "\v"  # white space that no template writes: where it is gone, the template trims a text

Exchange = tuple[str, str]  # what the user said, what the model answered


@dataclass(frozen=True)
class GuardPrompts:
    """The chat template of one checkpoint."""

    path: Path  # of the file that holds it
    template: jinja2.Template
    variables: Mapping[str, str]  # bos_token and its like
    tokenizer: Tokenizer

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> "GuardPrompts":
        """ValueError when the folder holds no template, or one that cannot be read."""
        settings = Fields(folder / "tokenizer_config.json", {})
        if settings.path.is_file():
            settings = Fields(settings.path, read_json(settings.path))
        path, source = _find_template(folder, settings)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise _unusable(path, str(error)) from None
        named = {name: content(settings.values.get(name)) for name in STANDARD_TOKENS}
        variables = {name: token for name, token in named.items() if token is not None}
        return cls(path, template, variables, tokenizer)

    def encode(
        self, exchanges: Sequence[Exchange], categories: Mapping[str, str] | None = None
    ) -> list[list[int]]:
        """Ids of every prompt, up to the place of the guard's first word.

        `categories` (name: text) replace those of the template. ValueError for a template that
        does not take them, that leaves a text out, or that does not end with the guard's turn.
        """
        said = [_mark(), _mark()]
        policy = {name: _mark() for name in categories or {}}
        rendered = self._render(said, policy)
        if policy and not all(mark.strip() in rendered for mark in policy.values()):
            raise ValueError(
                f"{self.path}: the chat template does not show `categories`; leave the argument "
                "out, or use a checkpoint whose template takes it"
            )
        head, turn, rest = rendered.rpartition(_TURN)
        if not turn or rest.strip("\n"):
            raise _unusable(self.path, f"it does not end with {_TURN}")
        pieces = self._pieces(head + turn + "\n\n")
        texts = {mark: (categories or {})[name] for name, mark in policy.items()}
        return [
            self._fill(pieces, texts | dict(zip(said, exchange, strict=True)))
            for exchange in exchanges
        ]

    def _render(self, said: Sequence[str], policy: Mapping[str, str]) -> str:
        """The template with the marks in it; some want texts as they are, others as parts."""
        options: dict[str, Any] = {"categories": dict(policy)} if policy else {}
        for as_parts in (False, True):
            messages = [
                {"role": role, "content": [{"type": "text", "text": mark}] if as_parts else mark}
                for role, mark in zip(("user", "assistant"), said, strict=True)
            ]
            try:
                rendered = self.template.render(
                    messages=messages, add_generation_prompt=True, **self.variables, **options
                )
            except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
                problem = " ".join(str(error).split())
                continue
            if all(rendered.count(mark.strip()) == 1 for mark in said):
                return rendered
            problem = "it does not show user and assistant once each"
        raise _unusable(self.path, problem)

    def _pieces(self, rendered: str) -> list[int | str]:
        """Ids of control tokens, and the text between them."""
        control = sorted(self.tokenizer.special, key=len, reverse=True)
        pattern = "|".join(map(re.escape, control))
        parts = re.split(f"({pattern})", rendered)
        return [
            self.tokenizer.added[part] if place % 2 else part for place, part in enumerate(parts)
        ]

    def _fill(self, pieces: Sequence[int | str], texts: Mapping[str, str]) -> list[int]:
        ways = {mark.strip(): text.strip() for mark, text in texts.items()} | dict(texts)
        pattern = re.compile("|".join(map(re.escape, sorted(ways, key=len, reverse=True))))
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                text = pattern.sub(lambda m: ways[m[0]], piece)
                # Half of a surrogate pair, which no tokenizer takes, must not stop a run.
                ids += self.tokenizer.encode_text(text.encode("utf-8", "replace").decode("utf-8"))
        return ids


def _find_template(folder: Path, settings: Fields) -> tuple[Path, str]:
    """transformers' order: a file of its own, else a field of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path, read_text(path)
    found = settings.get("chat_template", None)
    if isinstance(found, list):  # several by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"{settings.path}: field 'chat_template' is missing, and {path.name} too; copy the "
            "tokenizer files of the published guard checkpoint"
        )
    return settings.path, found


def _mark() -> str:
    """A text that occurs nowhere else."""
    return f"{_EDGE}{secrets.token_hex(16)}{_EDGE}"


def _refuse(message: str) -> NoReturn:
    """What templates call as `raise_exception`."""
    raise jinja2.TemplateError(message)


def _unusable(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path}: the chat template is not usable ({reason[:300]}); copy the tokenizer files of a "
        "published Llama-Guard-3 checkpoint"
    )
