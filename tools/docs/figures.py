"""The figures of the pages of methods, drawn by calling the methods themselves.

Each function draws one figure into the axes that it is given. Classes are those of the generated
data set: 20, of which 480 to 8 of 600 training images hold one. ``python tools/docs/figures.py
FOLDER`` writes all figures into a folder.
"""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import walk
from matplotlib.figure import Figure

from balanced_det import losses, priors
from balanced_det.calibration import normalized_calibration, prior_correction
from balanced_det.cosine import CosineLinear
from balanced_det.data.shapes import class_image_counts
from balanced_det.losses.box.balanced_l1 import balanced_l1_loss
from balanced_det.selection import Quota, Rows

# Okabe and Ito's colours, which colour-blind people tell apart, on a page that may be dark.
BLUE, ORANGE, GREEN, PINK = "#56B4E9", "#D55E00", "#009E73", "#CC79A7"
GREY = "#808890"
NUM_IMAGES = 600
COUNTS = np.asarray(class_image_counts(20, NUM_IMAGES))
CLASSES = np.arange(len(COUNTS))
TAIL = 0.1  # the threshold of the results on this data

_FIGURES = {}


def figure(panels: int = 1, height: float = 2.7):
    """Register a function that draws into that many axes."""

    def register(draw):
        _FIGURES[draw.__name__] = (draw, panels, height)
        return draw

    return register


def names() -> list[str]:
    """Return the names of all figures, that of the walk of one batch too."""
    return [*_FIGURES, "walk"]


def svg(name: str) -> str:
    """Return a figure as SVG."""
    if name == "walk":
        return walk.svg()
    draw, panels, height = _FIGURES[name]
    torch.manual_seed(0)
    style = {
        "font.size": 9,
        "svg.hashsalt": name,  # the same file at each build
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "legend.frameon": False,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY
        ),
    }
    with matplotlib.rc_context(style):
        made = Figure(figsize=(5.6, height), layout="constrained")
        draw(*np.atleast_1d(made.subplots(1, panels)))
        text = io.StringIO()
        made.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def gradient(loss, logits, label, draws=1):
    """Return |dL/dz| of one row (C,), the mean of several draws of a random method."""
    rows = logits.expand(draws, -1).clone().requires_grad_()
    total = sum(loss(row.unsqueeze(0), torch.tensor([label]), 1) for row in rows)
    (found,) = torch.autograd.grad(total, rows)
    return found.mean(dim=0).abs()


def _class_axis(axes):
    axes.set_xlabel("classes, frequent to rare")
    axes.set_xticks([0, len(COUNTS) - 1], [f"{COUNTS[0]} images", f"{COUNTS[-1]} images"])


def _push_by_class(axes, loss, draws=1):
    """Draw how much a class is pushed down on a row of another class and on background."""
    num_classes = len(COUNTS)
    logits = torch.zeros(loss.num_logits)
    of_object = torch.stack([gradient(loss, logits, label, draws) for label in (0, 1)])
    # Classes are pushed on a row of class 0, class 0 itself on one of class 1.
    on_object = torch.where(torch.arange(loss.num_logits) == 0, of_object[1], of_object[0])
    on_background = gradient(loss, logits, num_classes, draws)
    _pushes(axes, on_object[:num_classes], on_background[:num_classes])


def _pushes(axes, on_object, on_background):
    width = 0.4
    axes.bar(CLASSES - width / 2, on_object.numpy(), width, color=ORANGE, label="another class")
    axes.bar(CLASSES + width / 2, on_background.numpy(), width, color=BLUE, label="background")
    axes.set_ylabel("push down at logit 0")
    axes.legend(title="on a row of", loc="center left", bbox_to_anchor=(1, 0.5))
    _class_axis(axes)


def _frequency():
    return torch.tensor(COUNTS / NUM_IMAGES)


@figure()
def eql(axes):
    """Weights of the equalization loss."""
    _push_by_class(axes, losses.EqualizationLoss(20, _frequency(), tail_threshold=TAIL))


@figure()
def softmax_eql(axes):
    """The softmax equalization loss, on average over its draws."""
    loss = losses.SoftmaxEqualizationLoss(20, _frequency(), tail_threshold=TAIL)
    _push_by_class(axes, loss, draws=400)


@figure()
def drop_loss(axes):
    """Of a batch in which a fifth of the foreground rows are of tail classes, on average."""
    loss = losses.DropLoss(20, _frequency(), tail_threshold=TAIL)
    tail = int(loss.tail.mask().nonzero()[0])
    pushes = []
    for label in (0, len(COUNTS)):
        labels = torch.tensor([0, 0, 0, 0, tail, label])
        logits = torch.zeros(300, len(labels), 20, requires_grad=True)  # as many draws
        sum(loss(x, labels, 1) for x in logits).backward()
        push = logits.grad[:, -1].mean(dim=0).abs()
        push[label : label + 1] = float("nan")  # its own class is pulled up
        pushes.append(push)
    _pushes(axes, *pushes)


@figure()
def eqlv2(axes):
    """Weights by the ratio of a class's gradients so far."""
    ratio = torch.linspace(0, 2, 200, dtype=torch.float64)
    loss = losses.EqualizationLossV2(len(ratio))
    loss.gradient_ratio.sums.copy_(torch.stack([ratio, torch.ones_like(ratio)]))
    logits = torch.zeros(loss.num_logits)
    loss.eval()  # keeps the sums as they are
    plain = losses.BinaryCrossEntropyLoss(loss.num_logits)
    negative = gradient(loss, logits, len(ratio))[:-1] / gradient(plain, logits, 0)[1]
    rows = torch.arange(len(ratio))
    many = logits.expand(len(ratio), -1).clone().requires_grad_()
    loss(many, rows, 1).backward()
    positive = many.grad[rows, rows].abs() / gradient(plain, logits, 0)[0]
    axes.plot(ratio, positive, color=BLUE, label="of its positives")
    axes.plot(ratio, negative, color=ORANGE, label="of its negatives")
    axes.axvline(loss.mu, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="gradient of positives / of negatives", ylabel="weight of the class", ylim=0)
    axes.legend()


@figure(panels=2)
def seesaw(mitigation, compensation):
    """The two factors of a class j on a row of class i."""
    loss = losses.SeesawLoss(2)
    row = torch.tensor([0])
    ratio = torch.logspace(-3, 1, 100)
    factor = [loss.margins(torch.zeros(1, 2), row, torch.tensor([0.0, x.log()])) for x in ratio]
    mitigation.plot(ratio, torch.cat(factor)[:, 1].exp(), color=BLUE)
    mitigation.set(xlabel="images of j / of i", ylabel="factor", title="mitigation", xscale="log")
    odds = torch.linspace(-4, 4, 100)
    factor = [loss.margins(torch.tensor([[0.0, x]]), row, torch.zeros(2)) for x in odds]
    compensation.plot(odds.exp(), torch.cat(factor)[:, 1].exp(), color=ORANGE)
    compensation.set(xlabel="score of j / of i", title="compensation", xscale="log", yscale="log")
    compensation.set_ylim(bottom=0.5)


@figure(panels=2)
def cosine(linear, normalized):
    """The logit of a class by the angle of its weights, of a linear layer and of cosines."""
    angle = torch.linspace(0, torch.pi, 100)
    features = 4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    for axes, layer in ((linear, torch.nn.Linear(2, 1)), (normalized, CosineLinear(2, 1))):
        torch.nn.init.zeros_(layer.bias)
        # On the right the three curves are one.
        for length, colour, line in ((3, ORANGE, "-"), (1.5, BLUE, "--"), (0.5, GREEN, ":")):
            layer.weight.data = torch.tensor([[length, 0.0]])
            logits = layer(features).detach().squeeze(1)
            axes.plot(angle.rad2deg(), logits, line, color=colour, label=f"{length:g}")
        axes.set(xlabel="angle, degrees", xticks=[0, 90, 180], ylim=(-22, 22))
    linear.set(ylabel="logit", title="linear layer")
    normalized.set(title="cosine classifier")
    normalized.legend(title="length of weights", loc="lower left")


@figure()
def federated(axes):
    """How often a class that is no label of the batch takes part."""
    for sampled, colour in ((3, BLUE), (8, ORANGE), (15, GREEN)):
        loss = losses.FederatedLoss(20, COUNTS, num_sampled=sampled)
        background = torch.full((4,), 20)
        share = torch.stack([loss.taking_part(background) for _ in range(1500)]).float().mean(dim=0)
        axes.plot(CLASSES, share, "o-", markersize=3, color=colour, label=f"{sampled} of 20")
    axes.set(ylabel="chance to take part", ylim=(0, 1.05))
    axes.legend(title="NUM_SAMPLED", loc="center left", bbox_to_anchor=(1, 0.5))
    _class_axis(axes)


@figure()
def class_weights(axes):
    """Weights of the generated data's classes."""
    kinds = [("inverse", 0.5), ("inverse", 1.0), ("effective_number", 0.99)]
    for (method, strength), colour in zip(kinds, (BLUE, ORANGE, GREEN), strict=True):
        weights = priors.class_weights(COUNTS, method, strength)
        name = "auto" if method == "inverse" else method
        axes.plot(CLASSES, weights, "o-", markersize=3, color=colour, label=f"{name}, {strength}")
    axes.set(ylabel="weight", ylim=0)
    axes.legend()
    _class_axis(axes)


def _loss_over_probability(axes, loss, **style):
    probability = torch.linspace(0.005, 0.995, 200)
    values = [loss(p.logit().view(1, 1), torch.tensor([0]), 1) for p in probability]
    axes.plot(probability, torch.stack(values), **style)


@figure()
def focal(axes):
    """Loss of an object by the score of its class."""
    for gamma, colour in ((0.0, GREY), (1.0, BLUE), (2.0, ORANGE), (5.0, GREEN)):
        loss = losses.FocalLoss(1, alpha=None, gamma=gamma)
        _loss_over_probability(axes, loss, color=colour, label=f"gamma {gamma:g}")
    axes.set(xlabel="probability of the true answer", ylabel="loss", ylim=(0, 3))
    axes.legend()


@figure()
def efl(axes):
    """Loss of an object of a class that had little of its gradient as positive."""
    for ratio, colour in ((1.0, GREY), (0.75, BLUE), (0.5, ORANGE), (0.0, GREEN)):
        loss = losses.EqualizedFocalLoss(1, alpha=None).eval()
        loss.gradient_ratio.sums.copy_(torch.tensor([[ratio], [1.0]]))
        _loss_over_probability(axes, loss, color=colour, label=f"g = {ratio:g}")
    axes.set(xlabel="probability of the true answer", ylabel="loss", ylim=(0, 8))
    axes.legend()


@figure(panels=2)
def ecm(margin, weight):
    """Shift of the logit and weight of a class."""
    margins = losses.EffectiveClassMarginLoss(20, COUNTS).margins
    margin.plot(CLASSES, margins.shift[:-1], "o-", markersize=3, color=BLUE)
    margin.set(title="shift of the logit, a - b")
    weight.plot(CLASSES, margins.weight[:-1], "o-", markersize=3, color=ORANGE)
    weight.set(title="weight of the loss", ylim=0)
    for axes in (margin, weight):
        _class_axis(axes)
        axes.set_xticks([1, 18], [f"{COUNTS[0]} images", f"{COUNTS[-1]}"])


def _harmonized(loss, mean, spread, objects):
    """Return the gradient totals before and after, and the edges, of a batch that a loss has seen.

    Half a million pairs, nearly all of them background, as a dense detector has them.
    """
    generator = torch.Generator().manual_seed(0)
    logits = mean + spread * torch.randn(25_000, loss.num_logits, generator=generator)
    labels = torch.full((25_000,), loss.num_classes)
    labels[:objects] = torch.arange(objects) % loss.num_classes
    loss(logits, labels, 1)
    before, after = loss.gradient_density.gradient_totals()
    return before, after, np.linspace(0, 1, loss.gradient_density.bins + 1)


def _totals(axes, before, after, edges):
    axes.stairs(before, edges, fill=True, color=BLUE, label="before")
    axes.stairs(after, edges, color=ORANGE, linewidth=1.5, baseline=None, label="after")
    axes.set(xlabel="gradient length g", ylabel="gradient of a bin", xlim=(0, 1), yscale="log")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


@figure()
def ghm_c(axes):
    """What each bin of gradient lengths contributes, before and after harmonizing."""
    _totals(axes, *_harmonized(losses.GHMClassificationLoss(20), -5.0, 1.5, 300))


@figure()
def softmax_ghm(axes):
    """The same, of the gradient lengths of rows."""
    _totals(axes, *_harmonized(losses.SoftmaxGHMLoss(20), 0.0, 1.5, 3000))


def _box_curve(axes_value, axes_slope, loss, errors, **style):
    x = errors.clone().requires_grad_()
    values = torch.stack([loss(e.view(1), torch.zeros(1)) for e in x])
    (slope,) = torch.autograd.grad(values.sum(), x)
    axes_value.plot(errors, values.detach(), **style)
    axes_slope.plot(errors, slope, **style)


@figure(panels=2)
def balanced_l1(value, slope):
    """The curve and its slope beside smooth L1's."""
    errors = torch.linspace(0, 1.6, 161)
    smooth = losses.SmoothL1Loss(beta=1.0)
    _box_curve(value, slope, smooth.loss_sum, errors, color=GREY, label="smooth L1")
    for alpha, colour in ((0.5, BLUE), (1.0, ORANGE)):
        _box_curve(
            value,
            slope,
            lambda p, t, alpha=alpha: balanced_l1_loss(p, t, alpha=alpha),
            errors,
            color=colour,
            label=f"alpha {alpha:g}",
        )
    value.set(title="loss", xlabel="error", ylim=0)
    slope.set(title="slope", xlabel="error", ylim=0)
    value.legend()


@figure(panels=2)
def ghm_r(weight, share):
    """Weight of a number of a box by its error, and what each bin has."""
    loss = losses.GHMRegressionLoss()
    generator = torch.Generator().manual_seed(0)
    error = 0.05 * torch.randn(4000, generator=generator)
    error = torch.cat([error, 0.6 * torch.randn(400, generator=generator)]).abs().sort().values
    pred = error.view(-1, 4).clone().requires_grad_()
    loss(pred, torch.zeros_like(pred), 1).backward()
    slope = pred.grad.flatten() * len(error)
    weight.plot(error, slope, color=ORANGE, label="GHM-R")
    asl1 = error / (error**2 + loss.mu**2).sqrt()
    weight.plot(error, asl1, color=GREY, label="ASL1 alone")
    weight.set(xlabel="error", title="slope", xscale="log", xlim=(1e-3, 1), yscale="log")
    weight.legend()
    before, after = loss.gradient_density.gradient_totals()
    edges = np.linspace(0, 1, loss.gradient_density.bins + 1)
    share.stairs(before, edges, fill=True, color=BLUE, label="before")
    share.stairs(after, edges, color=ORANGE, linewidth=1.5, baseline=None, label="after")
    share.set(xlabel="gradient length g", title="gradient of a bin", yscale="log")
    share.legend()


@figure(panels=2)
def plain(value, slope):
    """Smooth L1 and its slope."""
    errors = torch.linspace(0, 1.6, 161)
    for beta, colour in ((0.0, GREY), (0.11, BLUE), (1.0, ORANGE)):
        loss = losses.SmoothL1Loss(beta).loss_sum
        _box_curve(value, slope, loss, errors, color=colour, label=f"BETA {beta:g}")
    value.set(title="loss", xlabel="error", ylim=0)
    slope.set(title="slope", xlabel="error", ylim=0)
    value.legend()


@figure(panels=2)
def sampling_free(prior, threshold):
    """The first loss by the prior, and thresholds by class."""
    num_foreground, num_rows = 30, 20_000  # as an image of a dense detector has them
    probability = np.logspace(-6, -0.3, 200)
    elements = num_rows * len(COUNTS)
    first = -num_foreground * np.log(probability) - (elements - num_foreground) * np.log1p(
        -probability
    )
    prior.plot(probability, first, color=BLUE)
    best = priors.optimal_prior(num_foreground, num_rows, len(COUNTS))
    prior.axvline(best, color=ORANGE)
    prior.set(xlabel="probability at the start", xscale="log", yscale="log")
    prior.set_title(f"first loss; p* = {best:.1e}")
    counted = priors.class_adaptive_thresholds(num_foreground, num_rows, COUNTS)
    threshold.plot(CLASSES, counted, "o-", markersize=3, color=GREEN)
    threshold.set(title="score threshold", yscale="log")
    threshold.set_xlabel("classes, frequent to rare")
    threshold.set_xticks([1, 18], [f"{COUNTS[0]}", f"{COUNTS[-1]}"])


def _example_rows(**more):
    """One image: 10 foreground rows, 2,000 of background, most of them far from objects."""
    generator = torch.Generator().manual_seed(1)
    ious = 0.5 * torch.rand(1, 2010, generator=generator) ** 4
    labels = torch.ones(1, 2010, dtype=torch.long)
    labels[0, :10] = 0
    return Rows(labels, 1, ious=ious, matched=torch.zeros_like(labels), **more)


@figure()
def iou_balanced_sampling(axes):
    """IoUs of the background rows that each sampler takes."""
    from balanced_det.samplers import SAMPLERS

    rows = _example_rows()
    bins = np.linspace(0, 0.5, 11)
    for name, colour in (("RandomSampler", BLUE), ("IoUBalancedSampler", ORANGE)):
        taken = torch.stack(
            [SAMPLERS.get(name)()(rows, Quota(256, 0.25)) & rows.background for _ in range(20)]
        )
        ious = rows.ious.expand_as(taken[0]).repeat(20, 1)[taken[:, 0]]
        weights = np.full(len(ious), 1 / 20)
        axes.hist(ious.numpy(), bins, weights=weights, alpha=0.5, color=colour,
                  label=name)  # fmt: skip
    axes.set(xlabel="IoU of a background row with its nearest object", ylabel="rows an image")
    axes.legend()


@figure()
def ohem(axes):
    """Losses of all background rows and of those that are taken."""
    from balanced_det.samplers import SAMPLERS

    generator = torch.Generator().manual_seed(2)
    hardness = torch.randn(1, 2010, 1, generator=generator) * 1.5 - 4
    rows = _example_rows()
    row_losses = losses.BinaryCrossEntropyLoss(1).row_losses(hardness, rows.labels)
    rows = _example_rows(losses=row_losses)
    bins = np.logspace(-3, 0.8, 30)
    axes.hist(
        row_losses[rows.background].numpy(), bins, color=GREY, alpha=0.5, label="all background"
    )
    for name, colour in (("RandomSampler", BLUE), ("OHEMSampler", ORANGE)):
        taken = SAMPLERS.get(name)()(rows, Quota(256, 0.25)) & rows.background
        axes.hist(
            row_losses[taken].numpy(),
            bins,
            histtype="step",
            linewidth=1.5,
            color=colour,
            label=name,
        )
    axes.set(xlabel="loss of the row", ylabel="rows", xscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.02))


@figure(panels=2)
def score_calibration(norcal, correction):
    """Scores after, by scores before."""
    score = torch.linspace(0, 1, 101)
    for count, colour in ((480, BLUE), (60, GREY), (8, ORANGE)):
        counts = torch.tensor([float(count), 60.0])
        # The rest of the softmax is background's.
        scores = torch.stack([score, torch.zeros_like(score)], dim=1)
        after = normalized_calibration(scores, counts, gamma=0.6)[:, 0]
        norcal.plot(score, after, color=colour, label=f"{count} images")
        counts = torch.tensor([480.0, 60.0, 7.5, float(count)])
        after = prior_correction(score.unsqueeze(1).expand(-1, 4), counts, tau=1.0)[:, 3]
        correction.plot(score, after, color=colour)
    norcal.set(title="NorCal, gamma 0.6", xlabel="score before", ylabel="score after")
    correction.set(title="PriorCorrection, tau 1", xlabel="score before")
    norcal.legend()


@figure()
def resampling(axes):
    """How often an image that holds one class alone is drawn, beside plain sampling."""
    from detectron2.data.samplers import RepeatFactorTrainingSampler

    from balanced_det.data.training_samplers import (
        ClassAwareTrainingSampler,
        instance_aware_repeat_factors,
    )

    # Frequent classes with several objects an image, rare ones with one.
    objects = np.where(COUNTS > 100, 4, 1)
    dicts = [
        {"annotations": [{"category_id": c, "iscrowd": 0}] * int(objects[c])}
        for c in CLASSES
        for _ in range(COUNTS[c])
    ]
    first = np.cumsum(COUNTS) - COUNTS  # an image of each class
    repeat = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, TAIL)
    aware = instance_aware_repeat_factors(dicts, TAIL)
    stream = iter(ClassAwareTrainingSampler(dicts, seed=0))
    drawn = np.bincount([next(stream) for _ in range(60_000)], minlength=len(dicts))
    by_class = np.array([drawn[f : f + n].mean() for f, n in zip(first, COUNTS)])
    factors = {
        "repeat factors": repeat[first] / repeat.mean(),
        "IRFS": aware[first] / aware.mean(),
        "class-aware": by_class / drawn.mean(),
    }
    for (name, factor), colour in zip(factors.items(), (BLUE, ORANGE, GREEN), strict=True):
        axes.plot(CLASSES, factor, "o-", markersize=3, color=colour, label=name)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(ylabel="times as often as plainly", yscale="log")
    axes.legend()
    _class_axis(axes)


@figure()
def balanced_pyramid(axes):
    """What each level gets from each, with the identity that a new pyramid refines by."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import Backbone

    from balanced_det.pyramid import BalancedFeaturePyramid

    levels = {f"p{i}": ShapeSpec(channels=1, stride=2**i) for i in range(2, 7)}

    class OneLevel(Backbone):
        """Ones on one level, zeros on the others."""

        def forward(self, lit):
            return {
                name: torch.full((1, 1, 128 // spec.stride, 128 // spec.stride), float(name == lit))
                for name, spec in levels.items()
            }

        def output_shape(self):
            return levels

    pyramid = BalancedFeaturePyramid(OneLevel(), refine_type="none")
    table = np.array([[float(x.mean()) for x in pyramid(lit).values()] for lit in levels])
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1.6)
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        axes.text(column, row, f"{value:.1f}", ha="center", va="center",
                  color="white" if value > 0.8 else "#333")  # fmt: skip
    axes.set_xticks(range(5), levels)
    axes.set_yticks(range(5), levels)
    axes.set(xlabel="level after", ylabel="level before")
    axes.spines[:].set_visible(False)


def main(folder: str) -> None:
    """Write all figures into a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names():
        Path(folder, f"{name}.svg").write_text(svg(name), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
