"""A short training on generated images, whose folder several tests read."""

from pathlib import Path

from balanced_det.config import load_config
from balanced_det.data import shapes
from balanced_det.engine import Trainer

CLASSES = 6


def make_data(folder):
    """Generate a training and a validation set of images of 64 pixels."""
    return shapes.generate(folder / "shapes", classes=CLASSES, train=30, val=6, size=64)


def run_config(data, out, **overrides):
    """Return the quickstart on ``data``, small enough for seconds."""
    sets = [[str(p), str(p), str(data.image_root)] for p in (data.train_json, data.val_json)]
    keys = {
        "BALANCE__DATASETS": sets,
        "DATASETS__TRAIN": (sets[0][0],),
        "DATASETS__TEST": (sets[1][0],),
        "DATALOADER__NUM_WORKERS": 0,
        "INPUT__MIN_SIZE_TRAIN": (64,),
        "INPUT__MIN_SIZE_TEST": 64,
        "MODEL__DEVICE": "cpu",
        "MODEL__FPN__OUT_CHANNELS": 16,
        "MODEL__ROI_HEADS__NUM_CLASSES": CLASSES,
        # A network that has hardly learnt anything still finds something to compare.
        "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
        "MODEL__ROI_BOX_HEAD__FC_DIM": 32,
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__MAX_ITER": 4,
        "SOLVER__STEPS": (),
        "OUTPUT_DIR": str(out),
        **overrides,
    }
    return load_config("configs/quickstart.yaml", **keys)


def train(cfg, trainer_class=Trainer, resume=False):
    """Train; return the folder."""
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    folder = Path(cfg.OUTPUT_DIR)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder
