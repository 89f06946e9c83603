#!/usr/bin/env python
"""Train and evaluate a detector; the command line is Detectron2's own.

python train_net.py --config-file configs/quickstart.yaml --num-gpus 1
python train_net.py --config-file configs/lvis_v1/Base-Mask-RCNN-FPN.yaml --with eql rfs
python train_net.py --config-file configs/lazy/mask_rcnn_R_50_FPN.py train.max_iter=1000
python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS model.pth
"""

import logging
import os
import sys
import warnings

from balanced_det.errors import InputError

try:
    # Detectron2 and fvcore still script functions, which torch deprecates at their import.
    warnings.filterwarnings("ignore", ".torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "Importing from timm.models.layers", FutureWarning)
    from detectron2.engine import default_setup
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run 'make .venv' and use .venv/bin/python, or install Detectron2 yourself.")

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from balanced_det.config import load_config, parse_args
from balanced_det.config.lazy import lazy_config, save_lazy_config
from balanced_det.engine import (
    check_run,
    is_first_process,
    load_trained,
    locked,
    num_processes,
    print_results,
    remove_checkpoints,
    start,
    trainer_of,
)
from balanced_det.run_report import report_run


def configure(args):
    """Return the frozen config of a command line, with its data sets registered."""
    cfg = load_config(args.config_file, args.opts, fragments=args.fragments)
    cfg.freeze()
    return cfg


def main(args):
    """Train or evaluate, in each process."""
    cfg = configure(args)
    default_setup(cfg, args)
    if lazy_config(cfg) is not None and comm.is_main_process():
        save_lazy_config(cfg)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="balanced_det")
    logger.setLevel(logging.INFO)  # below that, the evaluation library talks about every class
    if args.eval_only:
        # What is counted comes with the checkpoint.
        model = trainer_of(cfg).build_model(cfg, count=False)
        load_trained(model, cfg, args.resume)
        results = trainer_of(cfg).test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results = {**results, **trainer_of(cfg).test_with_augmentation(cfg, model)}
    else:
        trainer = trainer_of(cfg)(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if cfg.BALANCE.REPORT and comm.is_main_process():
        weights = cfg.MODEL.WEIGHTS if args.eval_only and not args.resume else ""
        report_run(cfg, args.config_file, weights)
    print_results(results, cfg.OUTPUT_DIR)
    return results


def run(args):
    """Check the whole command line, then launch :func:`main` in as many processes as it asks for.

    What is wrong is an :class:`InputError` here, before anything is written.
    """
    if not is_first_process(args):
        start(main, args)
        return
    cfg = configure(args)
    check_run(cfg, args.eval_only, args.resume, num_processes(args))
    with locked(cfg.OUTPUT_DIR):
        if cfg.BALANCE.OVERWRITE and not (args.eval_only or args.resume):
            remove_checkpoints(cfg.OUTPUT_DIR)
        start(main, args)


if __name__ == "__main__":
    try:
        run(parse_args())
    except InputError as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted.", file=sys.stderr)
        sys.exit(130)
