"""Matrix products that are accumulated in float32, and whose gradients are products of their kind.

JAX would multiply the float32 gradient of a bfloat16 product by its bfloat16 operands: a mixed
product, which a compiler may widen to float32, at a fraction of the rate (XLA does so on a CPU;
other devices were not measured). Here the gradient is rounded to the operands' dtype first. Where
the result was rounded to that dtype anyway its gradient is such a number already, and nothing
changes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul_fp32_accum(
    x: Float[Array, "... in_size"], kernel: Float[Array, "in_size out_size"]
) -> Float[Array, "... out_size"]:
    """`x @ kernel` of two arrays of one dtype, in float32."""
    assert x.dtype == kernel.dtype, (x.dtype, kernel.dtype)
    if x.dtype == jnp.float32:
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    return _narrow(x, kernel)


@jax.custom_vjp
def _narrow(x, kernel):
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _forward(x, kernel):
    return _narrow(x, kernel), (x, kernel)


def _backward(operands, gradient):
    x, kernel = operands
    gradient = gradient.astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    of_x = _dot(gradient, kernel, ((x.ndim - 1,), (1,)))
    of_kernel = _dot(x, gradient, (leading, leading))
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


def _dot(left, right, contracted):
    return jax.lax.dot_general(left, right, (contracted, ((), ())), None, jnp.float32)


_narrow.defvjp(_forward, _backward)
