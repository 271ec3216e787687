import secrets

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh values every run; the seed is printed when a test fails."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return np.random.default_rng(seed)
