#!/usr/bin/env python
"""Train and evaluate a detector; the command line is Detectron2's own.

python train_net.py --config-file configs/quickstart.yaml --num-gpus 1
python train_net.py --config-file configs/lvis_v1/mask_rcnn_R_50_FPN_1x.yaml --with eql rfs
python train_net.py --config-file configs/lazy/mask_rcnn_R_50_FPN.py train.max_iter=1000
python train_net.py --config-file configs/quickstart.yaml --eval-only MODEL.WEIGHTS model.pth
"""

import os
import sys
import warnings

from balanced_det.errors import InputError

try:
    # Detectron2 and fvcore still script functions, which torch deprecates at their import.
    warnings.filterwarnings("ignore", ".torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "Importing from timm.models.layers", FutureWarning)
    from balanced_det.train import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run 'make .venv' and use .venv/bin/python, or install Detectron2 yourself.")

if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")
