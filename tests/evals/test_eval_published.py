"""Published percentages through our own counting, and those that no count can give.

The counts are what the printed percentages stand for, where they stand for anything: whole numbers
of the stated size of each set. The page that lists the others is checked against the same code.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.outcomes import MIS_METRICS, counted
from mis_jax.evals.scoring import count_items
from mis_jax.evals.types import Item

PAGE = Path(__file__).resolve().parents[2] / "docs" / "published_numbers.md"

# benchmark, judged items (asr, rsr, rr, hr), printed percentages in the same order
MIS = [
    ("mis_easy", (1556, 112, 3, 4), (92.9, 6.69, 0.18, 0.24)),  # Mantis-SIGLIP
    ("mis_hard", (456, 53, 0, 1), (89.41, 10.39, 0.0, 0.2)),  # Mantis-SIGLIP
    ("mis_real", (89, 10, 0, 1), (89.0, 10.0, 0.0, 1.0)),  # Mantis-SIGLIP
    ("mis_easy", (1589, 86, 0, 0), (94.87, 5.13, 0.0, 0.0)),  # MiniCPM-V 2.6
    ("mis_hard", (479, 31, 0, 0), (93.92, 6.08, 0.0, 0.0)),  # MiniCPM-V 2.6
    ("mis_real", (86, 13, 0, 1), (86.0, 13.0, 0.0, 1.0)),  # MiniCPM-V 2.6
    ("mis_easy", (439, 220, 579, 437), (26.21, 13.13, 34.57, 26.09)),  # Phi3.5-Vision
    ("mis_hard", (227, 105, 64, 114), (44.51, 20.59, 12.55, 22.35)),  # Phi3.5-Vision
    ("mis_real", (24, 26, 35, 15), (24.0, 26.0, 35.0, 15.0)),  # Phi3.5-Vision
    ("mis_hard", (414, 8, 5, 83), (81.18, 1.57, 0.98, 16.27)),  # Idefics3-8B
    ("mis_real", (88, 0, 1, 11), (88.0, 0.0, 1.0, 11.0)),  # Idefics3-8B
    ("mis_easy", (1475, 190, 9, 1), (88.06, 11.34, 0.54, 0.06)),  # DeepSeek-VL2
    ("mis_hard", (444, 66, 0, 0), (87.06, 12.94, 0.0, 0.0)),  # DeepSeek-VL2
    ("mis_real", (74, 22, 3, 1), (74.0, 22.0, 3.0, 1.0)),  # DeepSeek-VL2
    ("mis_easy", (1547, 125, 3, 0), (92.36, 7.46, 0.18, 0.0)),  # LLaVA-NeXT-Interleave
    ("mis_hard", (461, 49, 0, 0), (90.39, 9.61, 0.0, 0.0)),  # LLaVA-NeXT-Interleave
    ("mis_real", (83, 17, 0, 0), (83.0, 17.0, 0.0, 0.0)),  # LLaVA-NeXT-Interleave
    ("mis_easy", (1361, 298, 10, 6), (81.25, 17.79, 0.6, 0.36)),  # LLaVA-OV-7B
    ("mis_real", (73, 25, 2, 0), (73.0, 25.0, 2.0, 0.0)),  # LLaVA-OV-7B
    ("mis_hard", (461, 47, 2, 0), (90.39, 9.22, 0.39, 0.0)),  # LLaVA-OV-72B-Chat
    ("mis_easy", (1561, 107, 7, 0), (93.19, 6.39, 0.42, 0.0)),  # Qwen2-VL-72B
    ("mis_hard", (471, 38, 1, 0), (92.35, 7.45, 0.2, 0.0)),  # Qwen2-VL-72B
    ("mis_hard", (431, 72, 5, 2), (84.51, 14.12, 0.98, 0.39)),  # InternVL2.5-8B
    ("mis_easy", (1435, 163, 75, 2), (85.67, 9.73, 4.48, 0.12)),  # InternVL2.5-78B
    ("mis_hard", (445, 64, 1, 0), (87.25, 12.55, 0.2, 0.0)),  # InternVL2.5-78B
    ("mis_easy", (774, 226, 671, 4), (46.21, 13.49, 40.06, 0.24)),  # GPT-4o
    ("mis_hard", (333, 121, 56, 0), (65.29, 23.73, 10.98, 0.0)),  # GPT-4o
    ("mis_easy", (625, 978, 71, 1), (37.31, 58.39, 4.24, 0.06)),  # Gemini-1.5-pro
    ("mis_hard", (201, 307, 2, 0), (39.41, 60.2, 0.39, 0.0)),  # Gemini-1.5-pro
    ("mis_real", (21, 74, 5, 0), (21.0, 74.0, 5.0, 0.0)),  # Gemini-1.5-pro
    ("mis_easy", (28, 1635, 12, 0), (1.67, 97.61, 0.72, 0.0)),  # Qwen2-VL-7B + MIRage
    ("mis_hard", (9, 501, 0, 0), (1.76, 98.24, 0.0, 0.0)),  # Qwen2-VL-7B + MIRage
    ("mis_real", (1, 98, 1, 0), (1.0, 98.0, 1.0, 0.0)),  # Qwen2-VL-7B + MIRage
    ("mis_easy", (32, 1623, 20, 0), (1.91, 96.9, 1.19, 0.0)),  # MiniCPM-V 2.6 + MIRage
    ("mis_hard", (8, 502, 0, 0), (1.57, 98.43, 0.0, 0.0)),  # MiniCPM-V 2.6 + MIRage
    ("mis_real", (1, 98, 1, 0), (1.0, 98.0, 1.0, 0.0)),  # MiniCPM-V 2.6 + MIRage
    ("mis_hard", (4, 506, 0, 0), (0.78, 99.22, 0.0, 0.0)),  # LLaVA-OV-7B + MIRage
    ("mis_real", (2, 97, 1, 0), (2.0, 97.0, 1.0, 0.0)),  # LLaVA-OV-7B + MIRage
    ("mis_easy", (4, 1664, 7, 0), (0.24, 99.34, 0.42, 0.0)),  # InternVL2.5-8B + MIRage
    ("mis_hard", (1, 509, 0, 0), (0.2, 99.8, 0.0, 0.0)),  # InternVL2.5-8B + MIRage
    ("mis_real", (0, 100, 0, 0), (0.0, 100.0, 0.0, 0.0)),  # InternVL2.5-8B + MIRage
]

# benchmark, metric, items that count, judged items, printed percentage
CELLS = [
    ("figstep", "asr", 194, 500, 38.8),  # InternVL2.5-8B
    ("figstep", "asr", 153, 500, 30.6),  # InternVL2.5-8B + Textual SFT
    ("figstep", "asr", 0, 500, 0),  # InternVL2.5-8B + VLGuard-P
    ("figstep", "asr", 3, 500, 0.6),  # InternVL2.5-8B + VLGuard-R
    ("figstep", "asr", 3, 500, 0.6),  # InternVL2.5-8B + MIRage
    ("figstep", "asr", 94, 500, 18.8),  # Qwen2-VL-7B + Textual SFT
    ("figstep", "asr", 1, 500, 0.2),  # Qwen2-VL-7B + VLGuard-R
    ("figstep", "asr", 250, 500, 50.0),  # LLaVA-1.5-13B
    ("figstep", "asr", 18, 500, 3.6),  # LLaVA-1.5-13B + Textual SFT
    ("figstep", "asr", 55, 500, 11.0),  # MiMo-VL-7B-RL
    ("figstep", "asr", 43, 500, 8.6),  # MiMo-VL-7B-RL + Textual SFT
    ("figstep", "asr", 27, 500, 5.4),  # MiMo-VL-7B-RL + VLGuard-P
    ("figstep", "asr", 24, 500, 4.8),  # MiMo-VL-7B-RL + VLGuard-R
    ("mm_safetybench", "asr", 9, 1680, 0.54),  # InternVL2.5-8B + MIRage
    ("jailbreakv", "asr", 52, 280, 18.57),  # InternVL2.5-8B
    ("jailbreakv", "asr", 9, 280, 3.21),  # InternVL2.5-8B + MIRage
    ("siuo", "safe_rate", 119, 167, 71.26),  # InternVL2.5-8B + MIRage
    ("siuo", "safe_rate", 114, 167, 68.26),  # InternVL2.5-8B + MIRage, sorry labels
    ("siuo", "safe_rate", 63, 167, 37.72),  # InternVL2.5-8B + MIRage, text only
    ("siuo", "safe_rate", 30, 167, 17.96),  # MiniCPM-V 2.6
    ("siuo", "safe_rate", 83, 167, 49.7),  # MiniCPM-V 2.6 + VLGuard-R
    ("siuo", "safe_rate", 64, 167, 38.32),  # MiniCPM-V 2.6 + MIRage
    ("siuo", "safe_rate", 37, 167, 22.16),  # LLaVA-OV-7B + Textual SFT
    ("siuo", "safe_rate", 75, 167, 44.91),  # LLaVA-OV-7B + VLGuard-R
    ("siuo", "safe_rate", 77, 167, 46.11),  # LLaVA-OV-7B + MIRage
    ("mssbench", "safe_accuracy", 299, 300, 99.67),  # InternVL2.5-8B
    ("mssbench", "safe_accuracy", 298, 300, 99.33),  # InternVL2.5-8B + Textual SFT
    ("mssbench", "safe_accuracy", 190, 300, 63.33),  # InternVL2.5-8B + VLGuard-P
    ("mssbench", "safe_accuracy", 265, 300, 88.33),  # InternVL2.5-8B + VLGuard-R
    ("mssbench", "safe_accuracy", 263, 300, 87.67),  # InternVL2.5-8B + MIRage
    ("mssbench", "safe_accuracy", 131, 300, 43.67),  # InternVL2.5-8B + MIRage, sorry labels
    ("mssbench", "safe_accuracy", 297, 300, 99.0),  # InternVL2.5-8B + MIRage, text only
    ("mssbench", "safe_accuracy", 299, 300, 99.67),  # Qwen2-VL-7B
    ("mssbench", "safe_accuracy", 297, 300, 99.0),  # MiniCPM-V 2.6
    ("mssbench", "safe_accuracy", 291, 300, 97.0),  # MiniCPM-V 2.6 + Textual SFT
    ("mssbench", "safe_accuracy", 286, 300, 95.33),  # MiniCPM-V 2.6 + VLGuard-R
    ("mssbench", "safe_accuracy", 294, 300, 98.0),  # MiniCPM-V 2.6 + MIRage
    ("mssbench", "safe_accuracy", 296, 300, 98.67),  # LLaVA-OV-7B
    ("mssbench", "safe_accuracy", 267, 300, 89.0),  # LLaVA-OV-7B + Textual SFT
    ("mssbench", "safe_accuracy", 274, 300, 91.33),  # LLaVA-OV-7B + VLGuard-R
    ("mssbench", "safe_accuracy", 283, 300, 94.33),  # LLaVA-OV-7B + MIRage
    ("mssbench", "unsafe_accuracy", 9, 300, 3.0),  # InternVL2.5-8B
    ("mssbench", "unsafe_accuracy", 3, 300, 1.0),  # InternVL2.5-8B + Textual SFT
    ("mssbench", "unsafe_accuracy", 181, 300, 60.33),  # InternVL2.5-8B + VLGuard-P
    ("mssbench", "unsafe_accuracy", 120, 300, 40.0),  # InternVL2.5-8B + MIRage
    ("mssbench", "unsafe_accuracy", 218, 300, 72.67),  # InternVL2.5-8B + MIRage, sorry labels
    ("mssbench", "unsafe_accuracy", 44, 300, 14.67),  # InternVL2.5-8B + MIRage, text only
    ("mssbench", "unsafe_accuracy", 8, 300, 2.67),  # Qwen2-VL-7B
    ("mssbench", "unsafe_accuracy", 8, 300, 2.67),  # MiniCPM-V 2.6
    ("mssbench", "unsafe_accuracy", 20, 300, 6.67),  # MiniCPM-V 2.6 + Textual SFT
    ("mssbench", "unsafe_accuracy", 36, 300, 12.0),  # MiniCPM-V 2.6 + VLGuard-R
    ("mssbench", "unsafe_accuracy", 45, 300, 15.0),  # MiniCPM-V 2.6 + MIRage
    ("mssbench", "unsafe_accuracy", 4, 300, 1.33),  # LLaVA-OV-7B
    ("mssbench", "unsafe_accuracy", 17, 300, 5.67),  # LLaVA-OV-7B + Textual SFT
    ("mssbench", "unsafe_accuracy", 51, 300, 17.0),  # LLaVA-OV-7B + VLGuard-R
    ("mssbench", "unsafe_accuracy", 77, 300, 25.67),  # LLaVA-OV-7B + MIRage
    ("mossbench", "refusal_rate", 17, 300, 5.67),  # InternVL2.5-8B
    ("mossbench", "refusal_rate", 80, 300, 26.67),  # InternVL2.5-8B + Textual SFT
    ("mossbench", "refusal_rate", 262, 300, 87.33),  # VLGuard
    ("mossbench", "refusal_rate", 61, 300, 20.33),  # InternVL2.5-8B + MIRage
    ("qbench", "exact_match", 1093, 1495, 73.11),  # InternVL2.5-8B
    ("qbench", "exact_match", 1073, 1495, 71.77),  # InternVL2.5-8B + Textual SFT
    ("qbench", "exact_match", 1069, 1495, 71.51),  # InternVL2.5-8B + Textual SFT, 500 general
    ("qbench", "exact_match", 1083, 1495, 72.44),  # InternVL2.5-8B + VLGuard-R, 500 general
    ("qbench", "exact_match", 1116, 1495, 74.65),  # InternVL2.5-8B + VLGuard-R, 6000 general
    ("qbench", "exact_match", 1090, 1495, 72.91),  # InternVL2.5-8B + MIRage, no general
    ("qbench", "exact_match", 1096, 1495, 73.31),  # InternVL2.5-8B + MIRage
    ("qbench", "exact_match", 1080, 1495, 72.24),  # InternVL2.5-8B + MIRage, sorry labels
    ("qbench", "exact_match", 1080, 1495, 72.24),  # InternVL2.5-8B + MIRage, text only
    ("mmstar", "exact_match", 943, 1500, 62.87),  # InternVL2.5-8B
    ("mmstar", "exact_match", 907, 1500, 60.47),  # InternVL2.5-8B + Textual SFT
    ("mmstar", "exact_match", 930, 1500, 62.0),  # InternVL2.5-8B + Textual SFT, 500 general
    ("mmstar", "exact_match", 930, 1500, 62.0),  # InternVL2.5-8B + VLGuard-R
    ("mmstar", "exact_match", 937, 1500, 62.47),  # InternVL2.5-8B + MIRage, no general
    ("mmstar", "exact_match", 947, 1500, 63.13),  # InternVL2.5-8B + MIRage
    ("mmstar", "exact_match", 936, 1500, 62.4),  # InternVL2.5-8B + MIRage, text only
    ("mmmu", "exact_match", 489, 900, 54.33),  # InternVL2.5-8B
    ("mmmu", "exact_match", 486, 900, 54.0),  # InternVL2.5-8B + Textual SFT
    ("mmmu", "exact_match", 476, 900, 52.89),  # InternVL2.5-8B + VLGuard-R
    ("mmmu", "exact_match", 487, 900, 54.11),  # InternVL2.5-8B + VLGuard-R, 500 general
    ("mmmu", "exact_match", 493, 900, 54.78),  # InternVL2.5-8B + MIRage, no general
    ("mmmu", "exact_match", 495, 900, 55.0),  # InternVL2.5-8B + MIRage
    ("mmmu", "exact_match", 485, 900, 53.89),  # InternVL2.5-8B + MIRage, text only
    ("muirbench", "exact_match", 1335, 2600, 51.35),  # InternVL2.5-8B
    ("muirbench", "exact_match", 1193, 2600, 45.88),  # InternVL2.5-8B + VLGuard-R
    ("muirbench", "exact_match", 1237, 2600, 47.58),  # InternVL2.5-8B + VLGuard-R, 6000 general
    ("muirbench", "exact_match", 1340, 2600, 51.54),  # InternVL2.5-8B + MIRage, no general
    ("muirbench", "exact_match", 1408, 2600, 54.15),  # InternVL2.5-8B + MIRage
    ("muirbench", "exact_match", 1348, 2600, 51.85),  # InternVL2.5-8B + MIRage, sorry labels
    ("mmt_mi", "exact_match", 1898, 3127, 60.7),  # InternVL2.5-8B
    ("mmt_mi", "exact_match", 1866, 3127, 59.67),  # InternVL2.5-8B + VLGuard-R
    ("mmt_mi", "exact_match", 1890, 3127, 60.44),  # InternVL2.5-8B + VLGuard-R, 500 general
    ("mmt_mi", "exact_match", 1861, 3127, 59.51),  # InternVL2.5-8B + VLGuard-R, 6000 general
    ("mmt_mi", "exact_match", 1906, 3127, 60.95),  # InternVL2.5-8B + MIRage, no general
    ("mmt_mi", "exact_match", 1905, 3127, 60.92),  # InternVL2.5-8B + MIRage
    ("mmt_mi", "exact_match", 1904, 3127, 60.89),  # InternVL2.5-8B + MIRage, text only
]

MIS_LABELS = {
    "asr": ("Unsafe", 2), "rsr": ("Safe", 1), "rr": ("Safe", 2), "hr": ("Safe", 3),
}  # fmt: skip

# metric: (labels of an item that counts, labels of one that does not, what the item is)
LABELS: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any], str]] = {
    ("guard", "asr"): ({"unsafe": True}, {"unsafe": False}, "unsafe"),
    ("siuo+siuo_effectiveness", "safe_rate"): ({"safe": True}, {"safe": False}, "unsafe"),
    ("mssbench", "safe_accuracy"): ({"behaviour": "comply"}, {"behaviour": "aware"}, "safe"),
    ("mssbench", "unsafe_accuracy"): ({"behaviour": "aware"}, {"behaviour": "comply"}, "unsafe"),
    ("mossbench+refusal", "refusal_rate"): ({"declines": True}, {"declines": False}, "safe"),
    ("correct", "exact_match"): (
        {"correct": True, "rule": "letter"},
        {"correct": False, "rule": "letter"},
        "safe",
    ),
}


def percentage(name: str, metric: str, k: int, n: int) -> float:
    """The rate of k items among n judged ones as results.json has it, in percent."""
    benchmark = BENCHMARKS[name]
    yes, no, kind = LABELS[benchmark.judging, metric]
    items = [
        Item(
            str(place),
            "hash",
            "ok",
            outcomes=counted(benchmark, yes if place < k else no, {"expected": kind}),
        )
        for place in range(n)
    ]
    cell = count_items(name, benchmark.protocol, items)["metrics"][metric]
    assert (cell["k"], cell["n"]) == (k, n)
    assert cell["low"] <= cell["value"] <= cell["high"]
    return 100 * cell["value"]


def rounds_to(value: float, printed: float) -> bool:
    """Whether the value is printed so with two digits; a value on the edge may go either way."""
    return abs(value - printed) <= 0.005 + 1e-9


def mis_percentages(name: str, counts: tuple[int, ...]) -> list[float]:
    """What the MIS metrics give for so many answers of each label, in percent."""
    labels = [
        {"label_str": MIS_LABELS[metric][0], "label_perception": MIS_LABELS[metric][1]}
        for metric, times in zip(MIS_METRICS, counts, strict=True)
        for _ in range(times)
    ]
    assert len(labels) == BENCHMARKS[name].published_size
    items = [
        Item(str(place), "hash", "ok", outcomes=counted(BENCHMARKS[name], label, {}))
        for place, label in enumerate(labels)
    ]
    metrics = count_items(name, "p", items)["metrics"]
    return [100 * metrics[metric]["value"] for metric in MIS_METRICS]


def test_every_printed_row_of_mis() -> None:
    wrong = []
    for name, counts, printed in MIS:
        values = mis_percentages(name, counts)
        if sum(values) != pytest.approx(100) or not all(
            rounds_to(*pair) for pair in zip(values, printed, strict=True)
        ):
            wrong.append((name, counts, printed, values))
    assert wrong == []


def test_every_printed_cell() -> None:
    wrong = [cell for cell in CELLS if not rounds_to(percentage(*cell[:4]), cell[4])]
    assert wrong == []


def test_the_issue_s_target_cells_are_among_them() -> None:
    """The counts that facts about the paper state for InternVL2.5-8B with MIRage."""
    cells = {(name, metric): set() for name, metric, *_ in CELLS}
    for name, metric, k, n, _ in CELLS:
        cells[name, metric].add((k, n))
    for name, metric, k, n in (
        ("figstep", "asr", 3, 500), ("mm_safetybench", "asr", 9, 1680),
        ("jailbreakv", "asr", 9, 280), ("siuo", "safe_rate", 119, 167),
        ("mssbench", "safe_accuracy", 263, 300), ("mssbench", "unsafe_accuracy", 120, 300),
        ("mossbench", "refusal_rate", 61, 300), ("qbench", "exact_match", 1096, 1495),
        ("mmstar", "exact_match", 947, 1500), ("mmmu", "exact_match", 495, 900),
        ("muirbench", "exact_match", 1408, 2600), ("mmt_mi", "exact_match", 1905, 3127),
    ):  # fmt: skip
        assert (k, n) in cells[name, metric]
    mis = {(name, counts[0]) for name, counts, _ in MIS}
    assert {("mis_easy", 4), ("mis_hard", 1), ("mis_real", 0)} <= mis


# The page of cells that do not fit


def table(heading: str) -> Iterator[list[str]]:
    """The cells of the rows of the first table under a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert rows
    for row in rows:
        yield [cell.strip().strip("`") for cell in row.strip("|").split("|")]


def fitting(printed: float, n: int) -> list[int]:
    """The counts of n items that are printed so."""
    near = round(printed * n / 100)
    return [k for k in range(max(near - 2, 0), near + 3) if rounds_to(100 * k / n, printed)]


def test_no_count_gives_the_listed_cells_and_the_stated_reason_does() -> None:
    rows = list(table("Single cells"))
    assert len(rows) > 30
    for name, metric, _, shown, size, reason in rows:
        printed, n = float(shown), int(size)
        assert not fitting(printed, n), (name, shown)
        k, of, cut = re.fullmatch(r"(\d+)/(\d+)(, cut)?", reason).groups()  # type: ignore[union-attr]
        found = percentage(name, metric, int(k), int(of))
        if cut:
            assert int(of) == n and int(100 * found + 1e-6) == round(100 * printed)
        else:
            assert int(of) < n and rounds_to(found, printed)


def test_no_counts_give_the_listed_mis_rows() -> None:
    rows = list(table("MIS rows"))
    assert len(rows) > 10
    for name, _, *shown in rows:
        size = BENCHMARKS[name].published_size
        assert size is not None
        counts = [fitting(float(value), size) for value in shown[:4]]
        assert not (all(counts) and sum(found[0] for found in counts) == size), (name, shown)
        assert float(shown[4]) == pytest.approx(sum(map(float, shown[:4])), abs=0.001)


def test_a_cell_is_listed_once() -> None:
    printed = {(name, metric, value) for name, metric, _, _, value in CELLS}
    for name, metric, _, shown, *_ in table("Single cells"):
        assert (name, metric, float(shown)) not in printed


def test_the_page_of_benchmarks_knows_them_all() -> None:
    page = (PAGE.parent / "benchmarks.md").read_text(encoding="utf-8")
    for name, benchmark in BENCHMARKS.items():
        if benchmark.published_size is not None:
            assert f"`{name}`" in page
            assert f"{benchmark.published_size:,}" in page
            assert set(re.findall(r"`(\w+)`", page)) >= set(benchmark.metrics)
