import secrets
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # two threads wait for each other on a busy machine of two cores


@pytest.fixture
def seed(record_property) -> int:
    """A fresh seed every run, printed when a test fails."""
    value = secrets.randbelow(2**31)
    record_property("seed", value)
    print(f"seed {value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
