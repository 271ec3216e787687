import secrets

import numpy as np
import pytest
from small_model import random_model, tiny_config

from mis_jax.model.internvl import InternVL


@pytest.fixture(scope="session")
def model_seed() -> int:
    return secrets.randbelow(2**31)


@pytest.fixture(scope="session")
def model(model_seed: int) -> InternVL:
    """One for all tests, so that each shape is compiled once."""
    return random_model(tiny_config(), model_seed)


@pytest.fixture
def seed(model_seed: int) -> int:
    """A fresh seed every run, printed when a test fails."""
    value = secrets.randbelow(2**31)
    print(f"seed {value}, model seed {model_seed}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
