"""Time and memory of the classification losses beside the usual torch formulations.

    python benchmarks/bench_losses.py [--device cuda|cpu] [--dtype float32|bfloat16] [--json FILE]

Each row of the table runs forward and backward from the logits, ours and theirs in one process, and
is compared with its floor: the time to read each logit and write each gradient once (GHM-C reads
twice) at the copy bandwidth that this run measured. A CUDA time is the median distance of events
between steps that are queued back to back, without waiting, as training queues them; so a step that
the host cannot launch quickly enough counts as what it costs the host. Ours never waits for the
device, so a CUDA graph can replay it: "on device" is the time without the host. Inputs exceed the
L2 cache, except those of EQL, EQLv2 and Seesaw, whose logits a region head has just written.
Memory is the peak beyond what stood before the step, in units of the logits. Two rows are compared
with our own focal loss instead: what the gradient sums of each class, and EFL, add to it.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import synchronize

from balanced_det.losses import (
    BinaryCrossEntropyLoss,
    EqualizationLoss,
    EqualizationLossV2,
    EqualizedFocalLoss,
    FocalLoss,
    GHMClassificationLoss,
    SeesawLoss,
)
from balanced_det.ops import sigmoid_loss

# The formulations that tests compare the losses with.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from formulations import (
    DenseEQLv2,
    LoopedGHM,
    LoopedSeesaw,
    MaskedEQL,
    dense_bce,
    one_hot_focal,
)

ALPHA, GAMMA, BINS, MOMENTUM, TAIL_SHARE = 0.25, 2.0, 30, 0.75, 0.3


@dataclasses.dataclass
class Row:
    """One line of the table.

    Attributes:
        name: what is computed.
        shape: (rows, classes), or (N, A, K, H, W) for logits as a convolution leaves them.
        ours: the loss module.
        theirs: the usual formulation, (logits, labels) -> scalar.
        passes: reads and writes of the logits that the method cannot do without.
        foreground: share of rows labelled with a class.
        extra_logits: logits of a row that are of no object class.
    """

    name: str
    shape: tuple
    ours: Callable
    theirs: Callable
    passes: int = 2
    foreground: float = 0.005
    extra_logits: int = 0

    @property
    def num_classes(self):
        """K."""
        logits = self.shape[-3] if len(self.shape) == 5 else self.shape[-1]
        return logits - self.extra_logits


def loss_rows(device):
    """Return the table's rows for a device: full sizes on CUDA, smaller ones elsewhere."""
    large, long_tailed = (403_200, 403_200) if device == "cuda" else (20_000, 2_000)
    head = (8, 9, 80, 80, 70) if device == "cuda" else (1, 9, 80, 40, 56)
    frequency = torch.logspace(-4.5, -0.5, 1203)
    return [
        Row("focal", (large, 80), FocalLoss(80, ALPHA, GAMMA), one_hot_focal),
        Row("focal, convolution's layout", head, FocalLoss(80, ALPHA, GAMMA), permuted_focal),
        Row(
            "GHM-C",
            (large, 80),
            GHMClassificationLoss(80, BINS, MOMENTUM),
            LoopedGHM(BINS, MOMENTUM),
            3,
        ),
        Row("focal", (long_tailed, 1203), FocalLoss(1203, ALPHA, GAMMA), one_hot_focal),
        Row("BCE", (long_tailed, 1203), BinaryCrossEntropyLoss(1203), dense_bce),
        Row("focal, with sums", (long_tailed, 1203), FocalWithSums(), OursFocal(1203)),
        Row("focal, with sums", (large, 80), FocalWithSums(), OursFocal(80)),
        Row("focal, with sums, convolution's layout", head, FocalWithSums(), OursFocal(head[2])),
        Row("EFL", (long_tailed, 1203), EqualizedFocalLoss(1203), OursFocal(1203)),
        Row(
            "EQL",
            (1_024, 1203),
            EqualizationLoss(1203, frequency, tail_share=TAIL_SHARE),
            MaskedEQL(frequency, TAIL_SHARE),
            foreground=0.25,
        ),
        Row(
            "EQLv2",
            (1_024, 1204),
            EqualizationLossV2(1203),
            DenseEQLv2(1203),
            foreground=0.25,
            extra_logits=1,
        ),
        Row(
            "Seesaw",
            (1_024, 1205),
            SeesawLoss(1203),
            LoopedSeesaw(1203),
            foreground=0.25,
            extra_logits=2,
        ),
    ]


class OursFocal:
    """Our focal loss in the place of the usual formulation, called as that is."""

    def __init__(self, num_classes):
        self.loss = FocalLoss(num_classes, ALPHA, GAMMA)

    def __call__(self, logits, labels):
        """Return the sum over rows and classes."""
        return self.loss(logits, labels, 1.0)


class FocalWithSums(torch.nn.Module):
    """Our focal loss, with the gradient sums of each class from the same pass."""

    def forward(self, logits, labels, normalizer):
        """Return the sum over rows and classes; the sums stay in an attribute."""
        loss, self.sums = sigmoid_loss(logits, labels, alpha=ALPHA, gamma=GAMMA, gradient_sums=True)
        return loss


def permuted_focal(logits, labels):
    """The same from (N, H, W, A, K) views of (N, A * K, H, W), which it copies to rows."""
    return one_hot_focal(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def make_inputs(row, device, dtype):
    """Return logits as a detector leaves them early in training, and labels, 1% of them ignored."""
    torch.manual_seed(0)
    if len(row.shape) == 5:
        conv = torch.randn(row.shape, device=device).mul_(1.5).sub_(4).to(dtype)
        logits = conv.permute(0, 3, 4, 1, 2)
    else:
        logits = torch.randn(row.shape, device=device).mul_(1.5).sub_(4).to(dtype)
    lead = logits.shape[:-1]
    labels = torch.randint(0, row.num_classes, lead, device=device)
    chance = torch.rand(lead, device=device)
    labels[chance > row.foreground] = row.num_classes
    labels[chance > 0.99] = -1
    return logits.requires_grad_(), labels


def median_ms(step, device, seconds=1.0):
    """Return the median duration of ``step()`` in ms, over about ``seconds`` after a warm-up."""
    for _ in range(3):
        step()
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    repeats = int(min(max(seconds / (time.perf_counter() - start), 5), 300))
    if device != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:]))


def graph(step):
    """Return a function that replays ``step()``, which must not wait for the device, on CUDA."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def extra_bytes(step, device):
    """Return the peak memory of ``step()`` beyond what is allocated before it."""
    step()  # What is allocated once is not the step's.
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def copy_bandwidth(device):
    """Return bytes a second, read plus written, of a copy much larger than any cache."""
    size = 1 << (31 if device == "cuda" else 27)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * median_ms(lambda: target.copy_(source), device, seconds=0.3))


def measure(row, device, dtype, bandwidth):
    """Return the measurements of a row as a dictionary, "ours" and "theirs"."""
    logits, labels = make_inputs(row, device, dtype)
    size = logits.numel() * logits.element_size()
    floor = 1e3 * row.passes * size / bandwidth
    ours = row.ours.to(device)
    result = dict(name=row.name, shape=list(row.shape), dtype=str(dtype), floor_ms=floor)
    for who, loss in (("theirs", row.theirs), ("ours", lambda x, y: ours(x, y, 1.0))):

        def step(loss=loss):
            loss(logits, labels).backward()
            logits.grad = None

        ms = median_ms(step, device)
        memory = extra_bytes(step, device) / size
        result[who] = dict(ms=ms, extra_memory=memory)
    on_device = median_ms(graph(step), device) if device == "cuda" else ms  # Ours, the last.
    result["ours"].update(on_device_ms=on_device, of_floor=on_device / floor)
    return result


def markdown(results):
    """Return the measurements as a Markdown table."""
    lines = [
        "| loss | logits | theirs, ms | ours, ms | times faster | on device, ms | of floor "
        "| theirs, memory | ours, memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        theirs, ours = row["theirs"], row["ours"]
        lines.append(
            f"| {row['name']} | {' x '.join(f'{n:,}' for n in row['shape'])} "
            f"| {theirs['ms']:.3f} | {ours['ms']:.3f} | {theirs['ms'] / ours['ms']:.1f} "
            f"| {ours['on_device_ms']:.3f} | {ours['of_floor']:.2f} "
            f"| {theirs['extra_memory']:.2f} | {ours['extra_memory']:.2f} |"
        )
    return "\n".join(lines)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", help="write the measurements to this file")
    options = parser.parse_args()

    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    bandwidth = copy_bandwidth(options.device)
    print(f"{name}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e12:.3f} TB/s")
    dtype = getattr(torch, options.dtype)
    results = [measure(row, options.device, dtype, bandwidth) for row in loss_rows(options.device)]
    print(markdown(results))
    if options.json:
        report = dict(device=name, torch=torch.__version__, copy_bandwidth=bandwidth, rows=results)
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
