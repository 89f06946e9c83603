#!/usr/bin/env python
"""Train and evaluate a detector; the command line is Detectron2's own.

    python train_net.py --config-file configs/quickstart.yaml --num-gpus 1
    python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS model.pth
"""

import os
import sys

from balanced_det.errors import InputError

try:
    from detectron2.engine import default_argument_parser, default_setup, launch
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run 'make .venv' and use .venv/bin/python, or install Detectron2 yourself.")

from detectron2.checkpoint import DetectionCheckpointer

from balanced_det.engine import Trainer, load_config, print_results


def setup(args):
    """Return the frozen config of a command line, with its data sets registered."""
    cfg = load_config(args.config_file, args.opts)
    if args.eval_only:
        cfg.BALANCE.COUNT = False  # what is counted comes with the checkpoint
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args):
    """Train or evaluate, in each process."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    print_results(results, cfg.OUTPUT_DIR)
    return results


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    try:
        launch(
            main,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except InputError as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")
