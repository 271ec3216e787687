"""Under what a run's answers were made, where that is not as its benchmarks' protocols have it.

A run has all its answers under the same conditions. They stand in its manifest and behind the id
of every protocol, so in results and tables too. They are no part of a sample's hash: a run under a
condition can be compared in pairs with one without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

INT8_WEIGHTS = "int8-weights"
INT8_CACHE = "int8-cache"
ENDPOINT_SETTINGS = "endpoint-settings"

_OPTIONS = {
    INT8_WEIGHTS: "--int8-weights",
    INT8_CACHE: "--int8-cache",
    ENDPOINT_SETTINGS: "--internvl-fields",
}
_WORDS = {
    INT8_WEIGHTS: "with the decoder's kernels in 8 bits",
    INT8_CACHE: "with keys and values in 8 bits",
    ENDPOINT_SETTINGS: (
        "by an endpoint that was not told the protocols' tiles and default system turns: "
        "its own settings held"
    ),
}


def int8_conditions(*, weights: bool, cache: bool) -> tuple[str, ...]:
    """The conditions of a checkpoint that answers in 8 bits."""
    return (INT8_WEIGHTS,) * weights + (INT8_CACHE,) * cache


def conditions_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The conditions that a run's manifest names; none in one from before they were kept."""
    return tuple(manifest["model"].get("conditions", ()))


def with_conditions(protocol: str, conditions: Sequence[str]) -> str:
    """A protocol's id with what was not as it says."""
    return "+".join([protocol, *conditions])


def condition_notes(label: str, manifest: Mapping[str, Any]) -> list[str]:
    """What a reader of a run's figures must know, a sentence for each condition."""
    return [f"{label} was answered {_WORDS.get(name, name)}." for name in conditions_of(manifest)]


def same_conditions(known: Sequence[str], now: Sequence[str], here: str, there: str) -> None:
    """ValueError that names the options in which two places differ."""
    if set(known) == set(now):
        return
    differing = sorted(set(known) ^ set(now))
    options = ", ".join(_OPTIONS.get(name, name) for name in differing)
    raise ValueError(
        f"{here} has answers made {_shown(known)}, {there} {_shown(now)}; they do not mix: "
        f"evaluate alike ({options}), or choose another output folder"
    )


def _shown(conditions: Sequence[str]) -> str:
    return f"under {' and '.join(conditions)}" if conditions else "as the protocols say"
