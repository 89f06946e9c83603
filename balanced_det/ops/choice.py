"""Which implementation serves a call: plain torch or Triton kernels.

The environment variable ``BALANCED_DET_OPS`` or :func:`implementation` chooses: ``auto`` (Triton
for float32, bfloat16 and float16 on CUDA where Triton is installed, the reference otherwise),
``reference`` or ``triton``.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch

from ..errors import InputError

_CHOICES = ("auto", "reference", "triton")

_choice = os.environ.get("BALANCED_DET_OPS", "auto")


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Within this context use ``"reference"``, ``"triton"`` or ``"auto"`` (see the module)."""
    global _choice
    if name not in _CHOICES:
        raise InputError(f"Unknown implementation '{name}'; known are: {', '.join(_CHOICES)}.")
    previous, _choice = _choice, name
    try:
        yield
    finally:
        _choice = previous


def uses_triton(tensor: torch.Tensor) -> bool:
    """Say whether the kernels serve an operation on ``tensor``, which is floating point.

    Raises:
        InputError: when the kernels were chosen by name and cannot serve it.
    """
    if _choice not in _CHOICES:
        raise InputError(
            f"BALANCED_DET_OPS is '{_choice}'; it must be one of: {', '.join(_CHOICES)}."
        )
    if _choice == "reference":
        return False
    if _choice == "auto":
        return tensor.is_cuda and tensor.dtype != torch.float64 and _triton_is_installed()
    if tensor.dtype == torch.float64:
        raise InputError("The Triton implementation of balanced_det.ops has no float64.")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"The Triton implementation of balanced_det.ops cannot run on {tensor.device}."
        )
    if not _triton_is_installed():
        raise InputError("The Triton implementation was chosen, but triton is not installed.")
    return True


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
