"""Put the committed numbers into the documentation: ``python benchmarks/evidence/tables.py``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. It is made of the
rows that ``balanced_det.compare`` or ``by_class.py`` wrote, and of nothing else; a test compares
them. ``--check`` writes nothing and says which file is out of date.
"""

import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = ("README.md", "docs/results.md")
_W = "BALANCE.ROI_HEADS.CLASSIFICATION_WEIGHT=2.0"
_RFS = "rfs+DATALOADER.REPEAT_THRESHOLD=0.05"
_RFS_200 = "rfs+DATALOADER.REPEAT_THRESHOLD=0.0125"
_EQL = "eql+BALANCE.EqualizationLoss.TAIL_THRESHOLD=0.05"
_COSINE = "BALANCE.ROI_HEADS.CLASSIFIER=CosineLinear"
_TAIL = "TAIL_THRESHOLD=0.1"
_SHAPES_BCE = (
    "quickstart_softmax+BALANCE.ROI_HEADS.CLASSIFICATION_LOSS=BinaryCrossEntropyLoss"
    f"+BALANCE.ROI_HEADS.PRIOR_PROB=0.001+{_W}"
)

_GROUPS = (("AP", "APr", "APc", "APf"), ("AP", "APr"))

# {name: (file of rows, metrics as mean and spread, metrics as differences, setups)}. Setups are
# {label: setup}, or the label of the first; the others then follow, called by what they add. A file
# that is not there has not been measured yet, and no page can show its table.
TABLES = {
    "photos": (
        "photos_rcnn_comparison.jsonl",
        ("AP", "APr", "APc", "APf"),
        ("AP", "APr"),
        {
            "softmax cross entropy": "photos_rcnn",
            "+ repeat-factor sampling": f"photos_rcnn+{_RFS}",
            "+ class-aware sampling": "photos_rcnn+class_aware",
            "+ cosine classifier": f"photos_rcnn+{_COSINE}",
            "+ cosine classifier, repeat-factor sampling": f"photos_rcnn+{_RFS}+{_COSINE}",
            "+ class weights, n^-0.5": "photos_rcnn+class_weights",
            "Seesaw, with cosine classifier and repeat-factor sampling": (
                f"photos_rcnn+seesaw+{_W}+DATALOADER.REPEAT_THRESHOLD=0.05"
            ),
            "ECM, with cosine classifier": f"photos_rcnn+ecm+{_W}",
            "softmax EQL": (
                "photos_rcnn+softmax_eql+BALANCE.SoftmaxEqualizationLoss.TAIL_THRESHOLD=0.05"
            ),
            "binary cross entropy: the control of EQL": "photos_rcnn+bce",
            "EQL": f"photos_rcnn+{_EQL}",
            "binary cross entropy, repeat-factor sampling": f"photos_rcnn+bce+{_RFS}",
            "EQL, repeat-factor sampling": f"photos_rcnn+{_EQL}+{_RFS}",
            "federated loss, prior 0.01": f"photos_rcnn+federated+{_W}",
            "EQLv2": f"photos_rcnn+eqlv2+{_W}",
            "Libra R-CNN": (
                "photos_rcnn+libra+BALANCE.PYRAMID.BACKBONE=build_bottom_up_fpn_backbone"
            ),
        },
    ),
    "photos_short": (
        "photos_rcnn_comparison.jsonl",
        (),
        ("AP", "APr", "APf"),
        {
            "repeat-factor sampling: `--with rfs`": f"photos_rcnn+{_RFS}",
            "class-aware sampling: `--with class_aware`": "photos_rcnn+class_aware",
            "cosine classifier: `--with cosine`": (f"photos_rcnn+{_COSINE}"),
            "cosine classifier and repeat-factor sampling": f"photos_rcnn+{_RFS}+{_COSINE}",
            "Seesaw, which has both: `--with seesaw`": (
                f"photos_rcnn+seesaw+{_W}+DATALOADER.REPEAT_THRESHOLD=0.05"
            ),
            "binary cross entropy: `--with bce`": "photos_rcnn+bce",
            "EQL, whose control that is: `--with eql`": f"photos_rcnn+{_EQL}",
        },
    ),
    "photos_longest_short": (
        "photos_longest_comparison.jsonl",
        (),
        ("AP", "APr", "APf"),
        {
            "class-aware sampling": "photos_longest+class_aware",
            "cosine classifier and repeat-factor sampling": f"photos_longest+cosine+{_RFS}",
        },
    ),
    "published": (
        "shapes_published_comparison.jsonl",
        ("AP", "APr", "APc", "APf"),
        ("AP",),
        {
            "focal loss, L1": "retinanet",
            "EFL": "retinanet+efl",
            "GHM-C, smooth L1": "retinanet+ghmc",
            "GHM-C as published": "retinanet+ghmc_published",
            "GHM-C, GHM-R": "retinanet+ghmc_ghmr",
            "GHM-C, GHM-R as published": "retinanet+ghmc_ghmr_published",
            "sampling-free": "retinanet+sampling_free",
            "sampling-free as published": "retinanet+sampling_free_published",
            "Libra RetinaNet as published": "retinanet+libra_published",
        },
    ),
    "remedies": (
        "shapes_remedies_comparison.jsonl",
        ("AP", "APr", "APc", "APf"),
        ("AP", "APr"),
        {
            "softmax cross entropy (weight 1)": "quickstart_softmax",
            "+ repeat-factor sampling": "quickstart_softmax+rfs+DATALOADER.REPEAT_THRESHOLD=0.1",
            "+ IRFS": "quickstart_softmax+irfs+DATALOADER.REPEAT_THRESHOLD=0.1",
            "+ class-aware sampling": "quickstart_softmax+class_aware",
            "+ class weights, n^-0.5": "quickstart_softmax+class_weights",
            "+ NorCal, gamma 0.6": "quickstart_softmax+norcal",
            "softmax EQL": (
                f"quickstart_softmax+softmax_eql+BALANCE.SoftmaxEqualizationLoss.{_TAIL}"
            ),
            "Seesaw, cosine classifier, repeat-factor sampling": (
                "quickstart_softmax+seesaw+DATALOADER.REPEAT_THRESHOLD=0.1"
            ),
            "binary cross entropy, weight 2: the control of EQL": _SHAPES_BCE,
            "EQL, weight 2": "quickstart",
            "DropLoss, weight 2": f"quickstart_softmax+drop_loss+BALANCE.DropLoss.{_TAIL}+{_W}",
            "federated loss, prior 0.001, weight 2": (
                f"quickstart_softmax+federated+BALANCE.ROI_HEADS.PRIOR_PROB=0.001+{_W}"
            ),
            "EQLv2, weight 2": f"quickstart_softmax+eqlv2+{_W}",
            "ECM, cosine classifier, weight 2": f"quickstart_softmax+ecm+{_W}",
        },
    ),
    "shapes_cosine": (
        "shapes_cosine_comparison.jsonl",
        *_GROUPS,
        "softmax cross entropy (weight 1)",
    ),
    "photos_more": ("photos_more_comparison.jsonl", *_GROUPS, "softmax cross entropy"),
    "photos_long": ("photos_long_comparison.jsonl", *_GROUPS, "softmax cross entropy"),
    "photos_longest": ("photos_longest_comparison.jsonl", *_GROUPS, "softmax cross entropy"),
    "photos_after": ("photos_after_comparison.jsonl", *_GROUPS, "softmax cross entropy"),
    "photos_retinanet": ("photos_retinanet_comparison.jsonl", *_GROUPS, "focal loss"),
    "photos_fcos": ("photos_fcos_comparison.jsonl", *_GROUPS, "focal loss"),
    "photos_cascade": ("photos_cascade_comparison.jsonl", *_GROUPS, "softmax cross entropy"),
    "shapes200_short": ("shapes200_short_comparison.jsonl", *_GROUPS, "softmax cross entropy"),
    "shapes200": (
        "shapes200_comparison.jsonl",
        *_GROUPS,
        {
            "softmax cross entropy": "shapes200",
            "+ repeat-factor sampling": f"shapes200+{_RFS_200}",
            "+ class-aware sampling": "shapes200+class_aware",
            "+ cosine classifier": "shapes200+cosine",
            "+ cosine classifier, repeat-factor sampling": f"shapes200+cosine+{_RFS_200}",
            "Seesaw, with cosine classifier and repeat-factor sampling": (
                f"shapes200+seesaw+{_W}+DATALOADER.REPEAT_THRESHOLD=0.0125"
            ),
            "binary cross entropy: the control of EQL": "shapes200+bce",
            "EQL": "shapes200+eql+BALANCE.EqualizationLoss.TAIL_THRESHOLD=0.0013",
        },
    ),
    # Without groups: all three classes are frequent.
    "bccd_rcnn": (
        "bccd_rcnn_comparison.jsonl",
        ("AP", "AP50", "AP75"),
        ("AP",),
        "softmax cross entropy",
    ),
    "bccd_retinanet": (
        "bccd_retinanet_comparison.jsonl",
        ("AP", "AP50", "AP75"),
        ("AP",),
        "focal loss",
    ),
}

# What part of the gradient each group of classes had: {name: {runs of: (label of the first setup,
# setups)}}, the others called by what they add to the first.
GRADIENT_SHARES = {
    "photos_shares": {
        "photos_more": (
            "Faster R-CNN, softmax cross entropy",
            [
                "photos_rcnn",
                "photos_rcnn+bce",
                "photos_rcnn+eql+BALANCE.EqualizationLoss.TAIL_THRESHOLD=0.005",
                "photos_rcnn+drop_loss+BALANCE.DropLoss.TAIL_THRESHOLD=0.005",
                f"photos_rcnn+federated+{_W}+BALANCE.ROI_HEADS.PRIOR_PROB=0.001",
                f"photos_rcnn+seesaw+{_W}+BALANCE.ROI_HEADS.CLASSIFIER=None"
                "+DATALOADER.SAMPLER_TRAIN=TrainingSampler",
                "photos_rcnn+sampling_free_published",
                "photos_rcnn+class_aware+cosine",
            ],
        ),
        "photos_long": (
            "the same for twice as long, softmax cross entropy",
            ["photos_long", f"photos_long+cosine+{_RFS}", "photos_long+class_aware"],
        ),
        "photos_retinanet": (
            "RetinaNet, focal loss",
            [
                "photos_retinanet",
                "photos_retinanet+efl+BALANCE.DENSE.PRIOR_PROB=0.01"
                "+SOLVER.CLIP_GRADIENTS.CLIP_VALUE=3.0",
                "photos_retinanet+ghmc_published",
                f"photos_retinanet+{_RFS}",
                "photos_retinanet+class_aware",
            ],
        ),
    },
}

# What the parts of a setup are called in a label; of a key, its last name, with its value.
_ADDED = {
    "balanced_l1": "balanced L1",
    "balanced_pyramid": "balanced feature pyramid",
    "bce": "binary cross entropy",
    "class_aware": "class-aware sampling",
    "class_weights": "class weights, n^-0.5",
    "cosine": "cosine classifier",
    "drop_loss": "DropLoss",
    "ecm": "ECM, with cosine classifier",
    "efl": "EFL",
    "eql": "EQL",
    "eqlv2": "EQLv2",
    "federated": "federated loss",
    "ghmc": "GHM-C",
    "ghmc_ghmr": "GHM-C, GHM-R",
    "ghmc_ghmr_published": "GHM-C, GHM-R as published",
    "ghmc_published": "GHM-C as published",
    "guided": "guided loss alone",
    "iou_balanced_sampling": "IoU-balanced sampling",
    "irfs": "IRFS",
    "libra": "Libra, all parts",
    "libra_published": "Libra as published",
    "norcal": "NorCal",
    "ohem": "OHEM",
    "optimal_prior": "optimal bias alone",
    "prior_correction": "prior correction",
    "rfs": "repeat-factor sampling",
    "sampling_free": "sampling-free",
    "sampling_free_published": "sampling-free as published",
    "seesaw": "Seesaw",
    "softmax_eql": "softmax EQL",
    "CLASSIFIER=CosineLinear": "cosine classifier",
    "CLASSIFIER=None": "linear classifier",
    "CLIP_VALUE": "clipping at {}",
    "CLS_AGNOSTIC_BBOX_REG=False": "boxes of each class",
    "FLOOR": "floor {}",
    "GUIDED_FACTOR": "factor {}",
    "PRIOR_PROB": "prior {}",
    "SAMPLER_TRAIN=TrainingSampler": "images as they come",
    "SCORE_THRESHOLD=ClassAdaptiveThreshold": "class-adaptive thresholds",
    "TAIL_THRESHOLD": "tail below {}",
    # Its keys are those of its schedule, which the text tells.
    "decoupled": "decoupled: the classifier trained again",
    # The same in all rows of a table, which its text tells.
    "BACKBONE": "",
    "CLASSIFICATION_WEIGHT": "",
    "REPEAT_THRESHOLD": "",
}
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def table(name: str) -> str:
    """Return the Markdown of a table."""
    if name in GRADIENT_SHARES:
        return _table_of_shares(GRADIENT_SHARES[name])
    file, means, differences, setups = TABLES[name]
    lines = (HERE / file).read_text().splitlines()
    rows = {(row["setup"], row["metric"]): row for row in map(json.loads, lines)}
    if isinstance(setups, str):
        setups = labels(setups, list(dict.fromkeys(setup for setup, _ in rows)))
    header = ["method", *means, *(f"{metric}, difference" for metric in differences)]
    body = [
        [
            label,
            *(_mean(rows[setup, metric]) for metric in means),
            *(_difference(rows[setup, metric]) for metric in differences),
        ]
        for label, setup in setups.items()
    ]
    return _markdown(header, body)


def _markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _table_of_shares(files):
    """Of each setup the groups' shares of the gradient and AP, means over its runs."""
    keys = ("gradient_share_r", "gradient_share_c", "gradient_share_f", "AP")
    rows = []
    for file, (first, setups) in files.items():
        lines = (HERE / f"{file}_runs.jsonl").read_text().splitlines()
        runs = list(map(json.loads, lines))
        for label, setup in labels(first, setups).items():
            of_setup = [run for run in runs if run["setup"] == setup]
            *shares, ap = (statistics.fmean(run[key] for run in of_setup) for key in keys)
            rows.append([label, *(f"{share:.0f}%" for share in shares), f"{ap:.1f}"])
    return _markdown(["method", "rare", "common", "frequent", "AP"], rows)


def labels(first: str, setups: list[str]) -> dict[str, str]:
    """Return {label: setup} of setups that add to the first, which has the given label."""
    base, *others = setups
    named = {first: base}
    for setup in others:
        parts = setup.removeprefix(f"{base}+").split("+")
        parts = parts[:1] if parts[0] == "decoupled" else parts
        named[", ".join(label for label in map(_part_label, parts) if label)] = setup
    return named


def _part_label(part):
    key, _, value = part.partition("=")
    name = key.rpartition(".")[2]
    label = _ADDED.get(f"{name}={value}", _ADDED.get(name))
    return f"`{part}`" if label is None else label.format(value)


def _mean(row):
    if row["runs"] == 1:
        return f"{row['mean']:.1f}"
    return f"{row['mean']:.1f} ± {row['standard_deviation']:.1f}"


def _difference(row):
    if row["difference"] is None:
        return "-"
    value, low, high = (row[f"difference{end}"] for end in ("", "_low", "_high"))
    cell = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{cell}**" if row["shown"] else cell


def filled(text: str) -> str:
    """Return a document with its tables as the committed numbers make them."""
    return _MARKED.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", text)


def main(arguments: list[str]) -> int:
    """Write the tables into the files, or with ``--check`` say which are out of date."""
    outdated = 0
    for path in (ROOT / name for name in FILES):
        text = path.read_text()
        new = filled(text)
        if new != text and "--check" in arguments:
            print(f"{path.relative_to(ROOT)} has a table that its numbers do not make.")
            outdated = 1
        elif new != text:
            path.write_text(new)
    return outdated


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
