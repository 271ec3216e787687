"""Arrays in files, as the tile cache keeps them."""

import io

import numpy as np
import pytest

from mis_jax.storage.files import read_array, write_array


def test_an_array_comes_back_and_a_damaged_one_is_told(tmp_path):
    for array in (np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.zeros((0, 5), np.float32)):
        write_array(tmp_path / "a.npy", array)
        back = read_array(tmp_path / "a.npy")
        assert back.dtype == array.dtype and np.array_equal(back, array)
        assert np.array_equal(back, np.load(tmp_path / "a.npy"))
    write_array(tmp_path / "a.npy", np.arange(24))
    whole = (tmp_path / "a.npy").read_bytes()
    objects = io.BytesIO()
    np.save(objects, np.array([{}]), allow_pickle=True)
    for damaged in (b"", whole[:3], whole[:20], whole[:-1], objects.getvalue()):
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises((ValueError, EOFError)):
            read_array(tmp_path / "a.npy")
