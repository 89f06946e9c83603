"""Train and evaluate a detector: what ``train_net.py`` and ``balanced-det train`` do.

The command line is Detectron2's own, see ``train_net.py``.
"""

import argparse
import logging
import os
import sys
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .config import load_config, parse_args
from .config.lazy import lazy_config, save_lazy_config
from .engine import (
    check_run,
    in_a_sentence,
    is_first_process,
    load_trained,
    locked,
    num_processes,
    print_results,
    remove_checkpoints,
    start,
    trainer_of,
)
from .logs import escape_log_records
from .run_report import report_run


def configure(args: argparse.Namespace) -> CfgNode:
    """Return the frozen config of a command line, with its data sets registered."""
    cfg = load_config(args.config_file, args.opts, fragments=args.fragments)
    cfg.freeze()
    return cfg


def work(args: argparse.Namespace) -> Any:
    """Train or evaluate, in each process."""
    escape_log_records()
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
        with in_a_sentence("The evaluation failed", cfg):
            results: Any = trainer_of(cfg).test(cfg, model)
            if cfg.TEST.AUG.ENABLED:
                results = {**results, **trainer_of(cfg).test_with_augmentation(cfg, model)}
    else:
        with in_a_sentence("The training cannot be set up", cfg):
            trainer = trainer_of(cfg)(cfg)
            trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if cfg.BALANCE.REPORT and comm.is_main_process():
        weights = cfg.MODEL.WEIGHTS if args.eval_only and not args.resume else ""
        report_run(cfg, args.config_file, weights)
    print_results(results, cfg.OUTPUT_DIR)
    return results


def run(args: argparse.Namespace) -> None:
    """Check the whole command line, then launch :func:`work` in as many processes as it asks for.

    What is wrong is an :class:`InputError` here, before anything is written.
    """
    if not is_first_process(args):
        start(work, args)
        return
    cfg = configure(args)
    check_run(cfg, args.eval_only, args.resume, num_processes(args))
    with locked(cfg.OUTPUT_DIR):
        if cfg.BALANCE.OVERWRITE and not (args.eval_only or args.resume):
            remove_checkpoints(cfg.OUTPUT_DIR)
        start(work, args)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return its exit code.

    Raises:
        InputError: something of it is wrong.
    """
    escape_log_records()
    try:
        run(parse_args(arguments))
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted.", file=sys.stderr)
        return 130
    return 0
