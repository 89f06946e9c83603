"""A short training on generated images: its keys, and its folder, which several tests read."""

from pathlib import Path

from models import NARROW_RESNET

from balanced_det.config import load_config
from balanced_det.data import shapes
from balanced_det.engine import Trainer

CLASSES = 6


def make_data(folder):
    """Generate a training and a validation set of images of 64 pixels."""
    return shapes.generate(folder / "shapes", classes=CLASSES, train=30, val=6, size=64)


def keys_of_data(data):
    """Return the keys {key: value} that name a generated data set."""
    sets = [[str(p), str(p), str(data.image_root)] for p in (data.train_json, data.val_json)]
    return {
        "BALANCE.DATASETS": sets,
        "DATASETS.TRAIN": (sets[0][0],),
        "DATASETS.TEST": (sets[1][0],),
    }


def run_keys(data, out, **changes):
    """Return the keys {key: value} over the quickstart that make it a run of a second.

    Args:
        data: the paths of a generated data set.
        out: the output folder.
        changes: more keys, with "__" for each dot.
    """
    return {
        **keys_of_data(data),
        **NARROW_RESNET,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
        # A network that has hardly learnt anything still finds something to compare.
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.STEPS": (),
        "OUTPUT_DIR": str(out),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }


def options(keys):
    """Return keys {key: value} as they stand on a command line."""
    return [str(text) for pair in keys.items() for text in pair]


def run_config(data, out, **changes):
    """Return the config of such a run."""
    return load_config("configs/quickstart.yaml", **run_keys(data, out, **changes))


def train(cfg, trainer_class=Trainer, resume=False):
    """Train; return the folder."""
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    folder = Path(cfg.OUTPUT_DIR)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder
