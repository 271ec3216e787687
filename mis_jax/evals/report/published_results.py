"""The figures that the paper printed, as reference rows beside one's own.

Source: arXiv 2501.18533, the rows of InternVL2.5-8B before and after MIRage, as printed. The
judges were GPT-4o (MIS, SIUO, MSSBench, MOSSBench) and Llama-Guard-3-8B (FigStep, MM-SafetyBench,
JailBreakV); `docs/published_numbers.md` lists the cells that no count gives.
"""

from typing import NamedTuple

SOURCE = "arXiv 2501.18533"
MODELS = ("InternVL2.5-8B", "InternVL2.5-8B + MIRage")


class Published(NamedTuple):
    """Two printed percentages and the set's size, with what must be known about them."""

    n: int
    base: float
    tuned: float
    remark: str = ""


PUBLISHED: dict[tuple[str, str], Published] = {
    ("mis_easy", "asr"): Published(1675, 80.12, 0.24),
    ("mis_easy", "rsr"): Published(1675, 14.81, 99.34),
    ("mis_hard", "asr"): Published(510, 84.51, 0.20),
    ("mis_hard", "rsr"): Published(510, 14.12, 99.80),
    ("mis_real", "asr"): Published(100, 76.00, 0.00, "a figure of the paper says 78.00 before"),
    ("mis_real", "rsr"): Published(100, 12.00, 100.00),
    ("figstep", "asr"): Published(500, 38.80, 0.60),
    ("mm_safetybench", "asr"): Published(1680, 15.58, 0.54, "15.58 is no count of 1680"),
    ("jailbreakv", "asr"): Published(280, 18.57, 3.21),
    ("siuo", "safe_rate"): Published(167, 24.85, 71.26, "24.85 is 41 of 165, not of 167"),
    ("mssbench", "safe_accuracy"): Published(300, 99.67, 87.67),
    ("mssbench", "unsafe_accuracy"): Published(300, 3.00, 40.00),
    ("mossbench", "refusal_rate"): Published(300, 5.67, 20.33),
    ("qbench", "exact_match"): Published(1495, 73.11, 73.31),
    ("mmstar", "exact_match"): Published(1500, 62.87, 63.13),
    ("mmmu", "exact_match"): Published(900, 54.33, 55.00),
    ("muirbench", "exact_match"): Published(2600, 51.35, 54.15),
    ("mmt_mi", "exact_match"): Published(3127, 60.70, 60.92),
}
