"""`python -m benchmarks NAME ...`: one benchmark; `--help` after the name tells its options."""

import importlib
import sys

NAMES = (
    "all",
    "attention",
    "compare",
    "convert",
    "cross_entropy",
    "data_pipeline",
    "evaluation",
    "generate",
    "gpu",
    "int8",
    "preprocessing",
    "roofline",
    "scaling",
    "server",
    "startup",
    "table",
    "train_step",
    "vision_tower",
    "words",
)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        sys.exit(f"usage: python -m benchmarks {{{','.join(NAMES)}}} [--help]")
    sys.argv[:2] = [f"python -m benchmarks {name}"]
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
