"""How the benchmarks take a time: from call to result."""

import statistics
import time

import torch


def synchronize(device):
    """Wait for a CUDA device; on others calls return when they are done."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(function, device, repeats):
    """Return the median time of a call, with the device idle before and waited for after."""
    # The first calls load kernels and allocate, and a processor takes a while to speed up.
    warm = time.perf_counter() + 0.5
    times = []
    while len(times) < repeats:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        if start > warm:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
