"""What happens to the values of one array on its way: dtype, order in memory, a look for NaN."""

from typing import Any

import ml_dtypes
import numpy as np

NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_TILE = 16, 1024  # rows and columns transposed at once; of the shapes tried, numpy's fastest
# By item size: unsigned and signed integers, and the bits of infinity, beyond which NaN lies.
_BITS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


def check_dtype(dtype: str) -> None:
    """ValueError when a dtype is none of those that parameters may have."""
    if dtype not in NUMPY_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose from {', '.join(NUMPY_DTYPES)}")


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """`array` in another dtype; ValueError when finite values do not fit into float16."""
    array = np.asarray(array)
    with np.errstate(over="ignore", invalid="ignore"):  # the first told below by name, NaN kept
        result = array.astype(NUMPY_DTYPES[dtype], copy=False)
    narrowed = dtype == "float16" and result is not array
    if narrowed and np.any(np.isinf(result) & np.isfinite(array.astype(np.float32))):
        raise ValueError(f"tensor '{name}' has values beyond float16's 65504; choose bfloat16")
    return result


def packed(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """`array`, often a transposed view, in `dtype` and in C order; ValueError as `cast`."""
    if array.ndim != 2 or array.flags.c_contiguous or array.strides[0] > array.strides[1]:
        return np.ascontiguousarray(cast(array, dtype, name))
    return _transposed(cast(array.T, dtype, name))


def _transposed(array: np.ndarray) -> np.ndarray:
    """A transposed copy, about five times as fast as numpy's own of a large matrix."""
    bits = array.view(f"u{array.dtype.itemsize}")  # numpy moves its own dtypes faster
    rows, columns = bits.shape
    result = np.empty((columns, rows), bits.dtype)
    height, width = _TILE
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            result[j : j + width, i : i + height] = bits[i : i + height, j : j + width].T
    return result.view(array.dtype)


def all_finite(array: np.ndarray) -> bool:
    """Whether no value of a C-ordered array is NaN or infinite, without temporary arrays."""
    infinity = _BITS[array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    if not bits.size:
        return True
    sign = 1 << (8 * bits.itemsize - 1)
    # As signed integers the positive values are the largest ones, as unsigned the negative ones.
    return int(bits.view(f"i{bits.itemsize}").max()) < infinity and (
        int(bits.max()) < (sign | infinity)
    )
