"""The walk of one batch, drawn as SVG: what happens, which file does it, and what may be chosen."""

from html import escape

# (what it is, who does it, the shape of what comes out, the slot that chooses it)
STEPS = [
    ("a batch of images", "data/loader.py", "N images", "DATALOADER.SAMPLER_TRAIN"),
    (
        "backbone and pyramid",
        "Detectron2, pyramid.py",
        "levels (N, C, H, W)",
        "MODEL.BACKBONE.NAME",
    ),
    ("head", "Detectron2", "logits (N, R, num_logits)", "CLASSIFIER"),
    ("label the rows", "detectors/matching.py", "Rows: labels (N, R)", None),
    ("choose the rows", "selection.py, samplers/", "Rows, the others -1", "SAMPLER"),
    ("divide by", "selection.py", "normalizer", None),
    ("classification loss", "losses/, ops/", "loss_cls", "CLASSIFICATION_LOSS, CLASS_WEIGHTS"),
    ("box losses", "losses/box/", "loss_box_reg", "BOX_LOSS"),
    ("scale and weigh", "criterion.py", "the losses of the part", "GUIDED_LOSS, ..._WEIGHT"),
    ("step", "engine/step.py", "new weights and statistics", None),
]
WIDTH, STEP, BOX = 380, 62, 46


def svg() -> str:
    """Return the figure; text takes the colour of the page where it is part of one."""
    height = STEP * len(STEPS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11" role="img">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#808890"/></marker></defs>',
    ]
    for index, (title, file, result, slot) in enumerate(STEPS):
        top = index * STEP + 4
        parts.append(
            f'<rect x="2" y="{top}" width="{WIDTH - 4}" height="{BOX}" rx="6" fill="#56B4E9" '
            f'fill-opacity="{0.25 if slot else 0.08}" stroke="#808890" stroke-opacity="0.6"/>'
        )
        parts += [
            _text(12, top + 19, title, 'font-weight="bold" font-size="13"'),
            _text(WIDTH - 12, top + 19, result, 'text-anchor="end"'),
            _text(12, top + 37, file),
        ]
        if slot:
            parts.append(_text(WIDTH - 12, top + 37, slot, 'text-anchor="end" fill="#D55E00"'))
        if index + 1 < len(STEPS):
            parts.append(
                f'<path d="M{WIDTH / 2} {top + BOX}V{top + STEP - 1}" stroke="#808890" '
                'marker-end="url(#tip)"/>'
            )
    return "\n".join([*parts, "</svg>", ""])


def _text(x, y, text, style=""):
    fill = "" if "fill=" in style else 'fill="currentColor"'
    return f'<text x="{x}" y="{y}" {fill} {style}>{escape(text)}</text>'
