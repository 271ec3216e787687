"""docs/config.md against the dataclasses that it is generated from."""

import dataclasses
import sys
import typing
from pathlib import Path

import pytest

from mis_jax import config

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import config_reference

SECTIONS = [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)]


def test_the_page_is_up_to_date() -> None:
    shown = config_reference.PAGE.read_text(encoding="utf-8")
    assert shown == config_reference.reference(), "run python tools/config_reference.py"


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_field_is_described(kind: typing.Any) -> None:
    described = config_reference._descriptions(kind)
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        assert described.get(field.name) or dataclasses.is_dataclass(types[field.name]), field.name
        assert f"| `{field.name}` |" in config_reference.reference()
