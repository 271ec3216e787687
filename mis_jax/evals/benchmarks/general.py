"""The five general benchmarks of the paper: what a model must not lose while it becomes safer.

Each is read from VLMEvalKit's TSV, `DATA_ROOT/<id>/<name>.tsv`, or from the Parquet files of its
authors in the same folder, and asked with InternVL's prompts there. Q-Bench has no Parquet here.

`exact_match` is what VLMEvalKit's `exact_matching` and the paper print: an answer whose option no
rule finds is wrong. `accuracy` leaves such an answer out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mis_jax.evals.judges.reference_answers import OPTIONS
from mis_jax.evals.outcomes import option_outcomes
from mis_jax.evals.types import Benchmark, Sample
from mis_jax.evals.vlmevalkit import parquet, questions
from mis_jax.evals.vlmevalkit.questions import Question
from mis_jax.evals.vlmevalkit.tsv import file_md5, read_tsv


@dataclass(frozen=True)
class _Parquet:
    pattern: str
    columns: Sequence[str]
    make: parquet.Maker


@dataclass(frozen=True)
class _Set:
    """A published set. `size` and `md5` are the publisher's: reported, never enforced."""

    tsv: str
    md5: str
    size: int
    split: str | None = None
    limit: int = 6
    places: bool = False
    pairs: bool = False
    first_image_scale: int = 1
    parquet: _Parquet | None = None


SETS = {
    "qbench": _Set("Q-Bench1_VAL.tsv", "837bdb6cd2da571713543462815187b7", 1495),
    "mmstar": _Set(
        "MMStar.tsv",
        "e1ecd2140806c1b1bbf54b43372efb9e",
        1500,
        parquet=_Parquet("*.parquet", ("index", "question", "image", "answer"), parquet.mmstar),
    ),
    "mmmu": _Set(
        "MMMU_DEV_VAL.tsv",
        "585e8ad75e73f75dcad265dfd0417d64",
        900,
        split="validation",
        limit=12,
        first_image_scale=2,
        parquet=_Parquet(
            "validation-*.parquet", ("id", "question", "options", "image_1", "answer"), parquet.mmmu
        ),
    ),
    "muirbench": _Set(
        "MUIRBench.tsv",
        "2e5e6fd7699761b08a7cb3ab8c0c2ec8",
        2600,
        places=True,
        pairs=True,
        parquet=_Parquet(
            "*.parquet", ("idx", "question", "options", "answer", "image_list"), parquet.muirbench
        ),
    ),
    "mmt_mi": _Set(
        "MMT-Bench_VAL_MI.tsv",
        "c7d7b998eb5cd9aa36c7d4f721472462",
        3127,
        parquet=_Parquet(
            "*.parquet", ("index", "question", "answer", "A", "B", "image"), parquet.mmt
        ),
    ),
}


def _questions(name: str, data_root: Path) -> list[Question]:
    published, folder = SETS[name], data_root / name
    file = folder / published.tsv
    if file.is_file():
        return read_tsv(file, split=published.split)
    other = published.parquet
    if other and any(folder.rglob(other.pattern)):
        return parquet.read_parquet(folder, other.pattern, other.columns, other.make)
    also = f" and {folder} holds no {other.pattern}" if other else ""
    raise ValueError(
        f"{name}: {file} does not exist{also}; put VLMEvalKit's {published.tsv} there and give "
        f"the folder that holds {name}/ as --data-root"
    )


def load_general(name: str, data_root: Path) -> list[Sample]:
    """The samples of one set; the first call writes the images in the table out as files."""
    published = SETS[name]
    return [
        questions.sample_of(
            question,
            limit=published.limit,
            places=published.places,
            first_image_scale=published.first_image_scale,
        )
        for question in _questions(name, data_root)
    ]


def md5_note(name: str, data_root: Path) -> str | None:
    """A sentence for a TSV whose MD5 is not the published one: reported, never refused."""
    if name not in SETS or not (file := data_root / name / SETS[name].tsv).is_file():
        return None
    md5 = file_md5(file)
    if md5 == SETS[name].md5:
        return None
    return f"{file} has MD5 {md5}; the published file has {SETS[name].md5}."


BENCHMARKS = tuple(
    Benchmark(
        name=name,
        protocol=questions.PROTOCOL,
        load=partial(load_general, name),
        metrics=("exact_match", "accuracy"),
        outcomes=option_outcomes,
        unparsed_is_wrong={"exact_match": OPTIONS.id},
        differences={
            "exact_match": (
                "VLMEvalKit counts a request that failed as wrong; here it is asked again, and "
                "left out until it is answered."
            ),
            "accuracy": (
                "VLMEvalKit has no such figure: answers whose option no rule finds are left out."
            ),
        },
        default_judge="options",
        max_new_tokens=questions.MAX_NEW_TOKENS,
        max_tiles_per_image=published.limit,
        published_size=published.size,
        over_pairs={"pair_accuracy": "accuracy"} if published.pairs else {},
    )
    for name, published in SETS.items()
)
