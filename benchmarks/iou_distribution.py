#!/usr/bin/env python
"""IoU of the background proposals that samplers take: random, IoU-balanced, hardest by loss.

    python benchmarks/iou_distribution.py \
        --run "generated shapes" configs/quickstart_softmax.yaml output/quickstart_softmax \
        --run "blood cells" configs/bccd.yaml output/bccd \
        --num-samples 512 \
        --opts MODEL.RPN.PRE_NMS_TOPK_TRAIN 2000 MODEL.RPN.POST_NMS_TOPK_TRAIN 2000

For each run, a config and the folder or file of its checkpoint, the trained detector's proposals on
the images of DATASETS.TEST are made and labelled as in training, ground-truth boxes among them, and
each sampler takes its rows of every image: the same number of background rows each, counted in
the IoU that the matcher found. The hardest are those of the largest classification loss of the
trained head. Prints a Markdown table, writes JSON and a figure.

Libra R-CNN (arXiv 1904.02701, section 3.1) found that more than 60% of the hard background rows
have an IoU above 0.05, but only 30% of those drawn at random. Its detector takes 512 rows of 2,000
proposals, and so does the call above; of few proposals every sampler takes nearly all.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import matplotlib
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_test_loader
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from balanced_det.build import build_model
from balanced_det.config import load_config
from balanced_det.detectors import BalancedROIHeads
from balanced_det.detectors.matching import Objects
from balanced_det.errors import InputError
from balanced_det.samplers import IoUBalancedSampler, OHEMSampler, RandomSampler
from balanced_det.selection import Quota

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SAMPLERS = {
    "random": RandomSampler(),
    "IoU-balanced": IoUBalancedSampler(num_bins=3),
    "hardest": OHEMSampler(),
}
COLORS = {"random": "#0072b2", "IoU-balanced": "#009e73", "hardest": "#d55e00"}
BIN_WIDTH = 0.05
NUM_BINS = 10  # background ends at the IoU of 0.5


def labelled_images(cfg, dataset):
    """Return a loader of one image at a time, resized as in evaluation, with its objects."""
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    mapper = DatasetMapper(is_train=True, augmentations=[resize], image_format=cfg.INPUT.FORMAT)
    return build_detection_test_loader(DatasetCatalog.get(dataset), mapper=mapper)


@torch.no_grad()
def labelled_proposals(model, image):
    """Return the :class:`Rows` of all proposals that training would choose from, with losses.

    Args:
        model: a ``GeneralizedRCNN`` with ``BalancedROIHeads``, in evaluation mode but for its
            proposal generator, which so gives as many proposals as in training.
        image: one input with ``instances``.
    """
    heads = model.roi_heads
    batch = model.preprocess_image([image])
    targets = [image["instances"].to(model.device)]
    features = model.backbone(batch.tensor)
    (proposals,), _ = model.proposal_generator(batch, features, targets)
    boxes = torch.cat([proposals.proposal_boxes.tensor, targets[0].gt_boxes.tensor])  # (R, 4)
    objects = Objects.of(targets)
    rows = heads.label_boxes(boxes.unsqueeze(0), [len(boxes)], objects, heads.proposal_matcher)
    pooled = heads.box_pooler([features[name] for name in heads.box_in_features], [Boxes(boxes)])
    logits, _ = heads.box_predictor(heads.box_head(pooled))
    row_losses = heads.box_predictor.criterion.classification_loss.row_losses
    return dataclasses.replace(rows, losses=row_losses(logits.unsqueeze(0), rows.labels))


def measure(config, weights, opts, num_samples, draws):
    """Return what a run's samplers take: how many background rows, and how they spread over IoU.

    Args:
        config, weights, opts: of the detector.
        num_samples: rows to take of an image; 0 is the config's.
        draws: how often the samplers that draw do so on each image.
    """
    cfg = load_config(config, opts)
    model = build_model(cfg, count=False).eval()
    DetectionCheckpointer(model).load(checkpoint(weights))
    heads = getattr(model, "roi_heads", None)
    if not isinstance(heads, BalancedROIHeads):
        raise InputError(f"{config} has no BalancedROIHeads, whose proposals could be sampled.")
    model.proposal_generator.train()
    quota = Quota(num_samples or heads.batch_size_per_image, heads.positive_fraction)
    loader = labelled_images(cfg, cfg.DATASETS.TEST[0])

    taken = {name: [] for name in ("all", *SAMPLERS)}  # the IoUs of the rows
    generator = torch.Generator(model.device).manual_seed(0)
    with EventStorage():
        for (image,) in tqdm(loader, desc=Path(config).stem):
            rows = labelled_proposals(model, image)
            taken["all"].append(rows.ious[rows.background])
            for name, sampler in SAMPLERS.items():
                for _ in range(1 if sampler.needs_losses else draws):
                    chosen = sampler(rows, quota, generator)
                    taken[name].append(rows.ious[chosen & rows.background])
    taken = {name: torch.cat(ious).cpu() for name, ious in taken.items()}
    return {
        "config": str(config),
        "images": len(loader),
        "samples_an_image": quota.rows_per_image,
        "background_an_image": len(taken["all"]) / len(loader),
        "background_sampled_an_image": len(taken["hardest"]) / len(loader),
        "share_above_0.05": {
            name: (ious > BIN_WIDTH).double().mean().item() for name, ious in taken.items()
        },
        "histogram": {
            name: (torch.histc(ious, NUM_BINS, 0, NUM_BINS * BIN_WIDTH) / len(ious)).tolist()
            for name, ious in taken.items()
        },
    }


def checkpoint(weights):
    """Return the checkpoint file of a training's output folder, or the file itself."""
    path = Path(weights) / "model_final.pth" if Path(weights).is_dir() else Path(weights)
    if not path.exists():
        raise InputError(f"There is no checkpoint {path}.")
    return str(path)


def table(results):
    """Return the runs as a Markdown table, a row for each run and sampler."""
    edges = [index * BIN_WIDTH for index in range(NUM_BINS + 1)]
    header = ["background rows", "an image", "IoU above 0.05"]
    header += [f"{lower:.2f}-{upper:.2f}" for lower, upper in zip(edges, edges[1:])]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for run, result in results.items():
        for name in ("all", *SAMPLERS):
            count = result[f"background_{'' if name == 'all' else 'sampled_'}an_image"]
            shares = [result["share_above_0.05"][name], *result["histogram"][name]]
            cells = [f"{run}, {name}", f"{count:.0f}", *(f"{100 * share:.1f}%" for share in shares)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results, path):
    """Write a figure with one histogram a run."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(5.6 * len(results), 3.9), sharey=True, squeeze=False
    )
    width = BIN_WIDTH / (len(COLORS) + 1)
    for axis, (run, result) in zip(axes[0], results.items()):
        for place, (name, color) in enumerate(COLORS.items()):
            share = 100 * result["share_above_0.05"][name]
            lefts = [index * BIN_WIDTH + (place + 1) * width for index in range(NUM_BINS)]
            heights = [100 * height for height in result["histogram"][name]]
            label = f"{name}: {share:.0f}% above 0.05"
            axis.bar(lefts, heights, width, color=color, label=label)
        axis.set_title(
            f"{run}: {result['background_sampled_an_image']:.0f} of "
            f"{result['background_an_image']:.0f} background proposals an image",
            fontsize=10,
        )
        axis.set_xticks([index * BIN_WIDTH for index in range(0, NUM_BINS + 1, 2)])
        axis.set_xlim(0, NUM_BINS * BIN_WIDTH)
        axis.set_xlabel("largest IoU with any object")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(framealpha=1, edgecolor="none")
    axes[0, 0].set_ylabel("share of background rows [%]")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    """Measure, print a Markdown table, write JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "CONFIG", "WEIGHTS"),
        help="a name for the table, a config, and a checkpoint or a training's folder",
    )
    parser.add_argument("--num-samples", type=int, default=0, help="an image; 0: the config's")
    parser.add_argument(
        "--draws", type=int, default=10, help="of each sampler that draws, an image"
    )
    parser.add_argument("--out", type=Path, default=Path("output/iou_distribution"))
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    args = parser.parse_args()

    try:
        results = {
            name: measure(config, weights, args.opts, args.num_samples, args.draws)
            for name, config, weights in args.run
        }
    except InputError as error:
        parser.error(str(error))
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "iou_distribution.json").write_text(json.dumps(results, indent=1))
    draw(results, args.out / "iou_distribution.png")
    print(f"\nWritten to {args.out}")


if __name__ == "__main__":
    main()
