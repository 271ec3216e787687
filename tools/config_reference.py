"""Write docs/config.md, the reference of every field of a run's configuration.

    python tools/config_reference.py

Names, types and defaults come from the dataclasses of mis_jax/config.py, descriptions from the
docstrings under their fields. tests/tools/test_config_reference.py compares the page with them.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import typing
from pathlib import Path
from typing import Any

from mis_jax import config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
_HEAD = """\
# Configuration reference

Every field of the YAML file that `mis-jax train`, `plan` and `data show` take;
[Train](train.md) explains how to use them. Unknown keys raise an error that names them. On the
command line, `--section.field-name` overrides a field:

```console
$ mis-jax train configs/mirage_8b.yaml --train.global-batch 64 --optimizer.learning-rate 1e-5
```

This page is generated from `mis_jax/config.py` by `tools/config_reference.py`.
"""


def reference() -> str:
    """The page's text."""
    sections = {"": config.RunConfig}
    for name, kind in typing.get_type_hints(config.RunConfig).items():
        if dataclasses.is_dataclass(kind):
            sections[name] = typing.cast(Any, kind)
        if name == "data":
            sections["data.sources"] = config.Source
    return "\n".join([_HEAD, *(_section(name, kind) for name, kind in sections.items())])


def _section(name: str, kind: Any) -> str:
    title = f"`{name}`" if name else "Top level"
    intro = f"A list of datasets. {kind.__doc__}" if kind is config.Source else kind.__doc__
    types, words = typing.get_type_hints(kind), _descriptions(kind)
    lines = [f"## {title}", "", intro, "", "| field | type | default | description |"]
    lines.append("| --- | --- | --- | --- |")
    for field in dataclasses.fields(kind):
        described = words.get(field.name, "")
        if dataclasses.is_dataclass(types[field.name]):
            described = f"See [`{field.name}`](#{field.name})."
        elif field.name == "sources":
            described = f"{described} See [`data.sources`](#datasources)."
        shown = _type(types[field.name]).replace("|", "\\|")
        lines.append(f"| `{field.name}` | {shown} | {_default(field)} | {described} |")
    return "\n".join([*lines, ""])


def _descriptions(kind: Any) -> dict[str, str]:
    """Field -> the docstring that follows it."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(kind)).body[0]).body
    found = {}
    for before, after in itertools.pairwise(body):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            text = " ".join(str(after.value.value).split())
            text = re.sub(r"(?<!`)(<\w+>)(?!`)", r"`\1`", text) if "`" not in text else text
            found[before.target.id] = text.replace("|", "\\|")
    return found


def _type(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"list of {_type(typing.get_args(kind)[0])}"
    if options := [option for option in typing.get_args(kind) if option is not type(None)]:
        return " | ".join(_type(option) for option in options)
    if dataclasses.is_dataclass(kind):
        return "mapping"
    return {Path: "path", str: "string"}.get(kind, kind.__name__)


def _default(field: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return ""
    value = field.default
    if value is dataclasses.MISSING:
        return "**required**"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool) or value is None:
        value = {None: "null", True: "true", False: "false"}[value]
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE)
