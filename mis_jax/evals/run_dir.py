"""The folder of a run: its manifest, the samples that it owes, the hashes that tie logs to them.

A run has all its answers under the same conditions: what was not as its benchmarks' protocols have
it, such as weights in 8 bits. They stand in its manifest and behind the id of every protocol, so in
results and tables too. They are no part of a sample's hash: a run under a condition can be compared
in pairs with one without it.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mis_jax.evals.types import Benchmark, Sample
from mis_jax.storage.hashing import digest, file_digest
from mis_jax.storage.json_files import read_document, replace_json
from mis_jax.storage.paths import local_path

FACTS = ("category", "sub_category", "group", "expected", "subset")
"""What a run keeps of a sample's `meta`: enough to count it and to sort it into tables, and
nothing that was asked or shown."""

INT8_WEIGHTS = "int8-weights"
INT8_CACHE = "int8-cache"
ENDPOINT_SETTINGS = "endpoint-settings"
REASONING = "reasoning"

_OPTIONS = {
    INT8_WEIGHTS: "--int8-weights",
    INT8_CACHE: "--int8-cache",
    ENDPOINT_SETTINGS: "--internvl-fields",
    REASONING: "--include-reasoning",
}
_WORDS = {
    INT8_WEIGHTS: "with the decoder's kernels in 8 bits",
    INT8_CACHE: "with keys and values in 8 bits",
    ENDPOINT_SETTINGS: (
        "by an endpoint that was not told the protocols' tiles and default system turns: "
        "its own settings held"
    ),
    REASONING: "with the model's reasoning as the beginning of every answer",
}

NO_RUN = "run `mis-jax eval` with this folder as --out first"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """The versions that decide what a run computes."""
    return {
        "mis_jax": _version("mis-jax"),
        "jax": _version("jax"),
        "python": platform.python_version(),
    }


def manifest_path(run_dir: Path) -> Path:
    """Where a run keeps its manifest."""
    return run_dir / "manifest.json"


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of an existing run."""
    manifest = read_document(manifest_path(run_dir), NO_RUN)
    if not isinstance(manifest, dict) or not {"model", "benchmarks"} <= manifest.keys():
        raise ValueError(
            f"{manifest_path(run_dir)} lacks 'model' or 'benchmarks': it is not the manifest of "
            "an evaluation run; point to the folder given to `mis-jax eval --out`"
        )
    return manifest


def open_run(
    run_dir: Path,
    *,
    model: str,
    fingerprint: str,
    data_root: Path | None = None,
    conditions: Sequence[str] = (),
) -> dict[str, Any]:
    """Begin a run or resume it; a run belongs to one model and refuses another.

    So it does with `conditions`, which are part of what the model is. `data_root` is remembered so
    that the judge stage finds the same files. `model` is a name for readers, `fingerprint` the
    identity (see `storage.hashing.folder_fingerprint`). The first session's date and versions stay;
    later sessions with other versions are listed beside them, since they answered part of the
    questions.
    """
    path = manifest_path(local_path(run_dir, "run folder"))
    now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    if not path.exists():
        manifest = {
            "model": {"name": model, "fingerprint": fingerprint, "conditions": list(conditions)},
            **now,
            "resumed": [],
            "benchmarks": {},
            "data_root": str(data_root.absolute()) if data_root else None,
        }
        replace_json(path, manifest)
        return manifest
    manifest = read_manifest(run_dir)
    same_conditions(conditions_of(manifest), conditions, str(run_dir), "this call would have")
    known = manifest["model"].get("fingerprint")
    if known != fingerprint:
        raise ValueError(
            f"{path}: model.fingerprint is {str(known)[:12]}, but this model's is "
            f"{fingerprint[:12]}; answers of two models do not mix: choose a new output folder, "
            f"or delete {run_dir} to start over"
        )
    sessions = [manifest, *manifest.setdefault("resumed", [])]
    if all(session.get("versions") != now["versions"] for session in sessions):
        manifest["resumed"].append(now)
        replace_json(path, manifest)
    return manifest


def data_root_of(run_dir: Path) -> Path:
    """The data root that the answers of a run were asked from."""
    stored = read_manifest(run_dir).get("data_root")
    if not stored:
        raise ValueError(f"{manifest_path(run_dir)} names no data root; pass --data-root DIR")
    return Path(stored)


def update_benchmark(run_dir: Path, name: str, **fields: Any) -> None:
    """Set fields of one benchmark's entry in the manifest."""
    manifest = read_manifest(run_dir)
    manifest["benchmarks"].setdefault(name, {}).update(fields)
    replace_json(manifest_path(run_dir), manifest)


def expect(run_dir: Path, benchmark: Benchmark, samples: Sequence[Sample]) -> dict[str, str]:
    """Write down which samples the run owes an answer to; returns `{id: hash}`.

    Without this list a sample that was never answered would be invisible to the summary.
    """
    hashes = {sample.id: sample_hash(benchmark, sample) for sample in samples}
    if len(hashes) != len(samples):
        raise ValueError(f"{benchmark.name}: sample ids repeat; ids must be unique in a benchmark")
    replace_json(run_dir / benchmark.name / "expected.json", hashes)
    write_facts(run_dir, benchmark.name, samples)
    update_benchmark(
        run_dir,
        benchmark.name,
        protocol=with_conditions(benchmark.protocol, conditions_of(read_manifest(run_dir))),
        system=benchmark.system,
        max_new_tokens=benchmark.max_new_tokens,
        max_tiles_per_image=benchmark.max_tiles_per_image,
        n=len(samples),
        published_size=benchmark.published_size,
        groups=len({sample.meta.get("group", sample.id) for sample in samples}),
    )
    return hashes


def keep_samples(
    run_dir: Path, name: str, samples: Sequence[Sample], part: Mapping[str, Any] | None
) -> None:
    """ValueError where a part of a benchmark would take the place of more of it.

    Without a part, samples that are no longer in the benchmark's files are dropped.
    """
    if part is None or not (run_dir / name / "expected.json").exists():
        return
    lost = expected(run_dir, name).keys() - {sample.id for sample in samples}
    if lost:
        raise ValueError(
            f"{run_dir} owes answers to {len(expected(run_dir, name))} samples of {name}, and this "
            f"call asks for {len(samples)}: {len(lost)} would be lost; leave out --limit and "
            "--shard, or choose another --out"
        )


def expected(run_dir: Path, name: str) -> dict[str, str]:
    """`{sample id: content hash}` of the samples that the run owes."""
    return read_document(run_dir / name / "expected.json", NO_RUN)


def facts_of(sample: Sample) -> dict[str, Any]:
    """What is known of a sample before any answer, as far as a run keeps it."""
    return {key: sample.meta[key] for key in FACTS if sample.meta.get(key) is not None}


def write_facts(run_dir: Path, name: str, samples: Iterable[Sample]) -> None:
    """Keep the samples' facts, so that a run can be counted without its data root."""
    facts = {sample.id: facts_of(sample) for sample in samples}
    replace_json(run_dir / name / "facts.json", facts)


def known_facts(run_dir: Path, name: str) -> Mapping[str, dict[str, Any]]:
    """`{sample id: facts}` of a run; empty for one that was made before facts were kept."""
    path = run_dir / name / "facts.json"
    return read_document(path, NO_RUN) if path.exists() else {}


def sample_hash(benchmark: Benchmark, sample: Sample) -> str:
    """Everything that decides what the model is asked: prompt, images and protocol.

    The generation settings are included beside the protocol's name, so that a changed setting
    cannot reuse old answers by keeping the name.
    """
    content = {
        "conversation": sample.conversation,
        "images": [file_digest(path) for path in sample.images],
        "protocol": benchmark.protocol,
        "system": benchmark.system,
        "max_new_tokens": benchmark.max_new_tokens,
        "max_tiles_per_image": benchmark.tiles_for(sample),
    }
    if sample.first_image_scale != 1:  # left out otherwise: hashes of earlier runs stay valid
        content["first_image_scale"] = sample.first_image_scale
    return digest(content)


def answer_hash(sample_digest: str, text: str) -> str:
    """An answer in its context: the same words to another question are another answer."""
    return digest([sample_digest, text])


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


def same_conditions(earlier: Sequence[str], now: Sequence[str], here: str, there: str) -> None:
    """ValueError that names the options in which two places differ."""
    if set(earlier) == set(now):
        return
    differing = sorted(set(earlier) ^ set(now))
    options = ", ".join(_OPTIONS.get(name, name) for name in differing)
    raise ValueError(
        f"{here} has answers made {_as_words(earlier)}, {there} {_as_words(now)}; they do not mix: "
        f"evaluate alike ({options}), or choose another output folder"
    )


def _as_words(conditions: Sequence[str]) -> str:
    return f"under {' and '.join(conditions)}" if conditions else "as the protocols say"
