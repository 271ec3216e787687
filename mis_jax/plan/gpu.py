"""GPUs that are not here, by the CUDA plugin's compiler.

It assigns buffers and partitions for the named card; kernels are neither timed nor checked.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from jax.experimental import topologies

# What the compiler asks of a card. Sizes of the SXM modules from NVIDIA's H100 and H200 data sheets
# and its tuning guide for Hopper; both cards have the same processors.
_HOPPER = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 48 << 10,
    "shared_memory_per_core": 228 << 10, "threads_per_core_limit": 2048, "core_count": 132,
    "fpus_per_core": 128, "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535, "l2_cache_size": 50 << 20, "clock_rate_ghz": 1.98,
    "shared_memory_per_block_optin": 227 << 10, "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}  # fmt: skip
_CARDS = {
    "h100": _HOPPER | {"memory_bandwidth": 3350 * 10**9, "device_memory_size": 80 * 10**9},
    "h200": _HOPPER | {"memory_bandwidth": 4800 * 10**9, "device_memory_size": 141 * 10**9},
}
_UNTIMED = "--xla_gpu_autotune_level"


def open_gpus(card: str, number: int) -> list[Any]:
    """Devices to compile for; ValueError in one line when the plugin is missing or refuses."""
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (13, 12)):
        raise ValueError(
            f"topology '{card}:{number}' needs JAX's CUDA plugin: pip install 'mis-jax[cuda]' "
            "(no GPU is needed)"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if _UNTIMED not in flags:  # there is no card to time kernels on
        os.environ["XLA_FLAGS"] = f"{flags} {_UNTIMED}=0".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # what the compiler tries is not for users
    try:
        topology = topologies.get_topology_desc(
            card, platform="cuda", target_config=_target(card), topology=f"1x1x{number}"
        )
    except Exception as error:  # whatever the plugin has to say
        reason = " ".join(str(error).split())
        raise ValueError(f"topology '{card}:{number}' cannot be opened ({reason:.160})") from None
    return list(topology.devices)


@contextmanager
def as_if_present() -> Iterator[None]:
    """cuDNN's attention may be lowered: JAX asks this machine's cuDNN and first GPU whether it can.

    The compiler reserves no workspace for it, which on Hopper is small.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    answers = {
        "check_cudnn_version": lambda: 91000,
        "check_compute_capability": lambda least: float(least) <= 9.0,
        "is_cuda_compute_capability_equal": lambda this: this == "9.0",
    }
    with mock.patch.multiple(fused, **answers):
        yield


def _target(card: str) -> str:
    """Description of the card in protobuf's text format."""
    sizes = "\n".join(f"  {name}: {value}" for name, value in _CARDS[card].items())
    return (
        f"gpu_device_info {{\n{sizes}\n  cuda_compute_capability {{ major: 9 }}\n}}\n"
        'platform_name: "CUDA"\n'
        "runtime_version { major: 13 }\n"
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "NVIDIA {card.upper()}"\n'
    )
