#!/usr/bin/env python
"""Time of inference, ours beside Detectron2's own detector with the same weights, in one run.

    python benchmarks/bench_inference.py [--device cuda|cpu] [--out FILE]
    python benchmarks/bench_inference.py --only retinanet --classes 80 1203 --rounds 2
    python benchmarks/bench_inference.py --only run_lengths

One random image (800 x 1216 on CUDA), 1,203 classes unless others are given. What ``--only`` names
is measured alone; ``run_lengths`` is the step from masks in their boxes to run lengths, which needs
no detector. Each result is printed and written as soon as it is there.

Weights are random; the last layer is scaled so that its logits spread as a trained one's do, around
a probability of 1/3000. Ours and Detectron2's take turns; a time is the median over calls, each
waited for.

Detectron2's region head takes the sigmoid of bfloat16 logits in bfloat16, ours in float32. So that
both rank the same scores, it is given float32 ones here. Detections are compared before they are
timed, in float32 without TF32, with Detectron2's NMS set to suppress one class at a time: its other
way shifts boxes, which rounds them. A difference ends the run with an error, after all else is
measured.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model as build_stock_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from pycocotools import mask as coco_mask
from timing import milliseconds
from torchvision.ops import boxes as box_ops

import balanced_det.detectors  # noqa: F401  (registers them)
from balanced_det.build import build_model
from balanced_det.config import add_balanced_det_config
from balanced_det.detectors.masks import MasksAsRLE, masks_to_rle

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LOGIT_MEAN, LOGIT_STD = -8.0, 1.5
# How far equal detections may lie apart: probabilities and pixels.
SCORE_ROUNDING, BOX_ROUNDING = 1e-5, 1e-2

STOCK_RCNN = [
    *("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
]
STOCK_RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet"]
RCNN_THRESHOLDS = 1e-4, 0.0
RETINANET_THRESHOLDS = 0.05, 1e-4
RUN_LENGTHS = "masks to run lengths"


def detectors(classes):
    """Return {name: (config, our keys, keys that make it Detectron2's own detector)}."""
    rcnn = [
        *("MODEL.MASK_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", classes),
        *("BALANCE.ROI_HEADS.CLASSIFICATION_LOSS", "EqualizationLoss"),
    ]
    found = {}
    for threshold in RCNN_THRESHOLDS:
        keys = [*rcnn, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold]
        name = f"Mask R-CNN R-50 with EQL, {classes} classes, threshold {threshold:g}"
        found[name] = ("Base-RCNN-FPN.yaml", keys, STOCK_RCNN)
    for threshold in RETINANET_THRESHOLDS:
        keys = ["MODEL.RETINANET.NUM_CLASSES", classes]
        keys += ["MODEL.RETINANET.SCORE_THRESH_TEST", threshold]
        name = f"RetinaNet R-50, {classes} classes, threshold {threshold:g}"
        found[name] = ("Base-RetinaNet.yaml", keys, STOCK_RETINANET)
    return found


def build(config, device, opts, stock=None):
    """Return a detector in evaluation mode.

    Args:
        config: path within ``configs``.
        device: "cuda" or "cpu".
        opts: keys and values to set.
        stock: keys and values that make it Detectron2's own; None builds it as this project does.
    """
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    cfg.merge_from_file(str(CONFIGS / config), allow_unsafe=False)
    cfg.MODEL.DEVICE = device
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    cfg.merge_from_list([*opts, *(stock or [])])
    torch.manual_seed(0)
    model = build_model(cfg, count=False) if stock is None else build_stock_model(cfg)
    model.eval()
    for name, module in model.named_modules():
        if name.endswith("conv3.norm"):
            # Untrained, frozen batch normalization lets activations grow from block to block.
            module.weight.fill_(0.1)
    return model


def pair(config, device, own, stock, inputs):
    """Return {"ours": model, "Detectron2": model} with the same weights."""
    ours, theirs = build(config, device, own), build(config, device, own, stock)
    _spread_logits(ours, inputs)
    state = ours.state_dict()
    for name, own_weight in theirs.state_dict().items():
        if own_weight.shape[0:1] != state[name].shape[0:1]:
            # A row for background, which Detectron2 has with sigmoids too, and drops.
            state[name] = torch.cat([state[name], torch.zeros_like(state[name][:1])])
    missing, _ = theirs.load_state_dict(state, strict=False)
    assert not missing, missing
    return {"ours": ours, "Detectron2": theirs}


def _spread_logits(model, inputs):
    """Scale the last classification layer to logits of the mean and spread of a trained one."""
    seen = []
    head = model.roi_heads.box_predictor if hasattr(model, "roi_heads") else model.head
    hook = head.cls_score.register_forward_hook(lambda module, _, output: seen.append(output))
    head.cls_score.bias.data.zero_()
    detections(model, inputs)
    hook.remove()
    logits = torch.cat([x.flatten() for x in seen])
    scale = LOGIT_STD / logits.std()
    head.cls_score.weight.data.mul_(scale)
    head.cls_score.bias.data.fill_(LOGIT_MEAN - scale * logits.mean())


def detections(model, inputs):
    """Return the ``Instances`` of each image, masks as probabilities in their boxes."""
    if hasattr(model, "roi_heads"):
        return model.inference(inputs, do_postprocess=False)
    return [output["instances"] for output in model(inputs)]


def encoded(model, inputs):
    """Return detections with run lengths as Detectron2's evaluators make them."""
    outputs = model(inputs)
    for output in outputs:
        output["rle"] = _encode(output["instances"].pred_masks)
    return outputs


def _encode(masks):
    return [coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in masks.cpu().numpy()]


def difference(ours, theirs):
    """Return a sentence that says where detections differ, None where they do not.

    Ours folds normalizations into convolutions and pools all levels at once, so logits of up to 15
    agree to some 1e-5 (float32 sums of a thousand products) and nearly equal scores may change
    places, also at the end of the list, where one is kept and the other not.
    """
    for a, b in zip(ours, theirs, strict=True):
        if len(a) != len(b):
            return f"{len(a)} detections and {len(b)}"
        if not len(a):
            continue
        scores = (a.scores[:, None] - b.scores).abs()  # (D, D)
        boxes = (a.pred_boxes.tensor[:, None] - b.pred_boxes.tensor).abs().amax(dim=2)
        same = a.pred_classes[:, None] == b.pred_classes
        same &= (scores <= SCORE_ROUNDING) & (boxes <= BOX_ROUNDING)
        last = max(a.scores.min(), b.scores.min()) + SCORE_ROUNDING
        alone = [~same.any(dim=1) & (a.scores > last), ~same.any(dim=0) & (b.scores > last)]
        count = max(int(x.sum()) for x in alone)
        if count:
            return f"{count} of {len(a)} detections have no equal"
    return None


def turns(sides, device, args):
    """Return {side: median milliseconds}; ``sides`` are functions that take turns."""
    times = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, function in sides.items():
            times[side].append(milliseconds(function, device, args.repeats))
    return {side: statistics.median(values) for side, values in times.items()}


def _calls(models, function, inputs, amp, device):
    def call(model):
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            return function(model, inputs)

    return {side: lambda model=model: call(model) for side, model in models.items()}


def measure_detector(name, config, own, stock, inputs, args):
    """Yield one result a kind of arithmetic: detections, and run lengths where there are masks."""
    models = pair(config, args.device, own, stock, inputs)
    # TF32 rounds a folded weight to another value than a weight that is not folded.
    with (
        mock.patch.object(box_ops, "_batched_nms_coordinate_trick", box_ops._batched_nms_vanilla),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        found = {side: detections(model, inputs) for side, model in models.items()}
    same = {"detections": len(found["ours"][0]), "difference": difference(*found.values())}
    for amp in (False, True):
        row = {"what": name, "arithmetic": "bf16 autocast" if amp else "float32", **same}
        calls = _calls(models, detections, inputs, amp, args.device)
        yield {**row, **turns(calls, args.device, args)}
    if hasattr(models["ours"], "roi_heads"):
        ours = _calls({"ours": MasksAsRLE(models["ours"]).eval()}, _call, inputs, True, args.device)
        theirs = _calls({"Detectron2": models["Detectron2"]}, encoded, inputs, True, args.device)
        row["what"] += ", with run lengths"
        yield {**row, **turns({**ours, **theirs}, args.device, args)}


def _call(model, inputs):
    return model(inputs)


def measure_masks(size, args):
    """Return the result of turning 300 masks of an image into run lengths."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    coarse = 6 * torch.randn(args.masks, 1, 6, 6, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear").sigmoid()[:, 0]
    # Sides of 10 pixels to half the image, more of the small ones.
    extent = torch.rand(args.masks, 2, generator=generator) ** 2
    extent = 10 + extent * (torch.tensor([width, height]) / 2 - 10)
    corner = torch.rand(args.masks, 2, generator=generator)
    corner = corner * (torch.tensor([width, height]) - extent)
    masks, boxes = (x.to(args.device) for x in (masks, torch.cat([corner, corner + extent], 1)))
    sides = {
        "ours": lambda: masks_to_rle(masks, boxes, size),
        "Detectron2": lambda: _encode(paste_masks_in_image(masks, boxes, size)),
    }
    same = sides["ours"]() == sides["Detectron2"]()
    return {
        "what": f"{args.masks} {RUN_LENGTHS}",
        "arithmetic": "float32",
        "detections": args.masks,
        "difference": None if same else "other run lengths",
        **turns(sides, args.device, args),
    }


def _float32_scores(self, predictions, proposals):
    return predictions[0].float().sigmoid().split([len(p) for p in proposals])


@torch.no_grad()
def main():
    """Measure, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", default="", help="measure what has this in its name: retinanet, run_lengths, ..."
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[1203])
    parser.add_argument("--repeats", type=int, default=7, help="calls a turn")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each")
    parser.add_argument("--size", type=int, nargs=2, help="height and width of the image")
    parser.add_argument("--masks", type=int, default=300)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    size = tuple(args.size or ((800, 1216) if args.device == "cuda" else (192, 256)))
    image = 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    inputs = [{"image": image.to(args.device), "height": size[0], "width": size[1]}]

    rows = []
    for row in measured(inputs, size, args):
        rows.append(row)
        print(row, flush=True)
        if args.out:
            device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
            content = {"device": device, "image": size, "rows": rows}
            args.out.write_text(json.dumps(content, indent=1))
    print(_table(rows))
    if any(row["difference"] for row in rows):
        sys.exit("Detections differ, see the table.")


def measured(inputs, size, args):
    """Yield the results one after the other, the quick one first."""
    only = args.only.lower().replace("_", " ")
    if only in RUN_LENGTHS:
        yield measure_masks(size, args)
    with mock.patch.object(FastRCNNOutputLayers, "predict_probs", _float32_scores):
        for classes in args.classes:
            for name, keys in detectors(classes).items():
                if only in name.lower():
                    yield from measure_detector(name, *keys, inputs, args)


def _table(rows):
    lines = [
        "| one image | arithmetic | ours | Detectron2 | ratio | same |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, theirs = row["ours"], row["Detectron2"]
        cells = [row["what"], row["arithmetic"], f"{ours:.1f} ms", f"{theirs:.1f} ms"]
        cells += [f"{ours / theirs:.2f}", row["difference"] or f"all {row['detections']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
