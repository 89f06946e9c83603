"""Random numbers that depend on where one is, never on what was drawn before.

A generator that is seeded by (run, worker, iteration) needs no state in a checkpoint: a run that is
killed at any moment and resumed draws what it would have drawn, whatever an evaluation, a data
loader or a hook drew in between.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derived_seed(*numbers: int) -> int:
    """Return a 64-bit seed that depends on all ``numbers`` (not negative) and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, devices: bool = True) -> None:
    """Seed the generators of Python, numpy and torch.

    Args:
        seed: 0 to 2^64 - 1.
        devices: seed those of CUDA devices as well, where this process uses any.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which looks for every kind of device: half a millisecond a step.
    torch.default_generator.manual_seed(seed)
    if devices and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of the host inside the block, and leave them as they were after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(seed, devices=False)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
