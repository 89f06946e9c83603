"""One total batch on one worker and on several, a step at a time, for :mod:`bench_workers`.

Each of :data:`DETECTORS` trains five steps on images in a fixed order, which Detectron2's own rule
deals out to the workers. In the second step every second image, so all of every second worker, has
no object; in the third its objects are smaller than two pixels, which in FCOS no point is in; in
the fourth there is none anywhere. Kept of every step are the losses, the normalizers, r of the
guided loss, all statistics that a checkpoint keeps, the running means of batch norm, and the
gradients after they were averaged over the workers. All rows are taken, since those that a sampler
draws depend on who draws them.

Two numbers differ by |a - b| / |a|, tensors by their norms. What another order of sums does is seen
on one worker: it trains the same steps with the images of each batch in reverse order. Several
workers may differ from one by :data:`NOISE` times that, or by :data:`ROUNDING`, gradients by
:data:`ROUNDING_OF_GRADIENT`; in bfloat16 by as much as bfloat16 differs from float32 on one worker.
float32 is without TF32.
"""

import functools
import itertools
import json
from pathlib import Path

import torch
from detectron2.engine import HookBase, launch
from detectron2.utils import comm

from balanced_det.config import load_config
from balanced_det.criterion import criteria
from balanced_det.data import shapes
from balanced_det.data.loader import TrainLoader
from balanced_det.distributed import mean_over_workers, num_workers, sum_over_workers
from balanced_det.engine import Trainer
from balanced_det.engine.checkpoint import statistics_names
from balanced_det.selection import Selection

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "shapes"
CLASSES = 20
ALL_ROWS = {
    "BALANCE.RPN.SAMPLER": "AllSampler",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 100_000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}
MASKS = {"MODEL.MASK_ON": True, "MODEL.ROI_MASK_HEAD.NAME": "BalancedMaskHead"}
# Name: (file of configs/shapes, fragment, more keys).
DETECTORS = {
    "RetinaNet, GHM-C and GHM-R": ("retinanet.yaml", "ghmc_ghmr", {}),
    "RetinaNet, sampling-free": ("retinanet.yaml", "sampling_free", {}),
    "RetinaNet, EFL": ("retinanet.yaml", "efl", {}),
    "FCOS, sampling-free": ("fcos.yaml", "sampling_free", {}),
    "Faster R-CNN, sampling-free": ("faster_rcnn.yaml", "sampling_free", {}),
    "Mask R-CNN, EQL": ("faster_rcnn.yaml", "eql", {**ALL_ROWS, **MASKS}),
    "Mask R-CNN, EQLv2": ("faster_rcnn.yaml", "eqlv2", {**ALL_ROWS, **MASKS}),
    "Faster R-CNN, Seesaw": ("faster_rcnn.yaml", "seesaw", ALL_ROWS),
}
STEPS = (
    "objects everywhere",
    "every second worker without an object",
    "every second worker with objects that are too small",
    "no object anywhere",
    "objects everywhere again",
)
# Each run is one draw of what rounding does. Now and then it turns a ReLU on or off, which no loss
# shows but the gradient does; a normalizer of one worker alone would change it by a tenth or more.
NOISE = 10
ROUNDING = {"float32": 1e-4, "bfloat16": 1e-2}
ROUNDING_OF_GRADIENT = 1e-2


# --- Data -----------------------------------------------------------------------------------------


def make_data(folder, size, batch):
    """Generate the shapes, and of their training set that of :data:`STEPS`; return the paths."""
    data = shapes.generate(folder / "shapes", classes=CLASSES, train=256, val=64, size=size)
    content = json.loads(data.train_json.read_text())
    images = content["images"][: batch * len(STEPS)]
    place = {image["id"]: divmod(i, batch) for i, image in enumerate(images)}
    annotations = []
    for annotation in content["annotations"]:
        step, position = place.get(annotation["image_id"], (3, 0))
        if step == 3 or (step == 1 and position % 2):
            continue
        if step == 2 and position % 2:
            x, y = annotation["bbox"][:2]
            corners = [x, y, x + 1.5, y, x + 1.5, y + 1.5, x, y + 1.5]
            small = {"bbox": [x, y, 1.5, 1.5], "area": 2.25, "segmentation": [corners]}
            annotation = {**annotation, **small}
        annotations.append(annotation)
    steps = folder / "steps.json"
    steps.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    return data, steps


def keys_of(data, train_json, size, device, batch):
    """Return the keys {key: value} of every run."""
    sets = [["train", str(train_json)], ["val", str(data.val_json)]]
    return {
        "BALANCE.DATASETS": [[*names, str(data.image_root)] for names in sets],
        "DATASETS.TRAIN": ("train",),
        "DATASETS.TEST": ("val",),
        "MODEL.DEVICE": device,
        "INPUT.MIN_SIZE_TRAIN": (size,),
        "INPUT.MAX_SIZE_TRAIN": size,
        "INPUT.MIN_SIZE_TEST": size,
        "INPUT.MAX_SIZE_TEST": size,
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.STEPS": (),
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    }


# --- In each worker -------------------------------------------------------------------------------


class InOrder:
    """The images in the order of their file, dealt out as Detectron2's samplers do.

    Args:
        cfg, records: as the loader gives them.
        backwards: the order within each batch is the reverse.
    """

    def __init__(self, cfg, records, backwards=False):
        order = sorted(range(len(records)), key=lambda i: records[i]["image_id"])
        size = cfg.SOLVER.IMS_PER_BATCH
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        self.order = [i for batch in batches for i in (batch[::-1] if backwards else batch)]

    def __iter__(self):
        endless = itertools.cycle(self.order)
        return itertools.islice(endless, comm.get_rank(), None, comm.get_world_size())


class InOrderTrainer(Trainer):
    """The trainer of ``train_net.py``, on images in order."""

    @classmethod
    def build_train_loader(cls, cfg):
        """Return this project's loader with another sampler."""
        return TrainLoader(cfg, sampler=InOrder)


class BackwardsTrainer(Trainer):
    """The same with the images of each batch in reverse order."""

    @classmethod
    def build_train_loader(cls, cfg):
        """Return this project's loader with another sampler."""
        return TrainLoader(cfg, sampler=functools.partial(InOrder, backwards=True))


class Record(HookBase):
    """Keep of each step what must not depend on how many workers share it.

    Attributes:
        steps: one {name: float64 tensor} a step.
        workers_agree: whether all workers had the same statistics, to the bit, after every step.
    """

    def __init__(self):
        self.steps = []
        self.workers_agree = True
        self._numbers = {}

    def before_train(self):
        """Watch the losses, and what they are divided by."""
        self.trainer.model.register_forward_hook(self._keep_losses)
        for name, module in self.trainer.model.named_modules():
            if isinstance(module, Selection):
                part = name.removeprefix("module.").removesuffix(".selection")
                keep = functools.partial(self._keep_normalizer, part)
                module.divisor.register_forward_hook(keep)

    def _keep_losses(self, _model, _inputs, losses):
        for name, loss in losses.items():
            self._numbers[f"loss: {name}"] = mean_over_workers(loss.detach().double())

    def _keep_normalizer(self, part, _module, _inputs, normalizer):
        device = next(self.trainer.model.parameters()).device
        of_worker = torch.as_tensor(normalizer, dtype=torch.float64, device=device).detach()
        # That of one worker is the sum of those of several.
        self._numbers[f"normalizer: {part}"] = sum_over_workers(of_worker.clone())

    def after_step(self):
        """Keep the rest."""
        model = getattr(self.trainer.model, "module", self.trainer.model)
        state = model.state_dict()
        kept = {f"statistic: {name}": state[name] for name in statistics_names(model)}
        for part, criterion in criteria(model):
            if criterion.guided:
                kept[f"r: {part}"] = criterion.monitored["guided_scale"]
        # Not their variances: with several workers Detectron2 leaves out the factor n / (n - 1).
        means = [v.flatten() for name, v in state.items() if name.endswith("running_mean")]
        kept["batch norm: running_mean"] = torch.cat(means)
        # Copies: the next step changes buffers in place.
        kept = {n: v.detach().to("cpu", torch.float64, copy=True) for n, v in kept.items()}
        for other in comm.all_gather(kept):
            self.workers_agree &= all(torch.equal(v, other[name]) for name, v in kept.items())
        for part, module in model.named_children():
            found = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            if found:
                kept[f"gradient: {part}"] = torch.cat(found).double().cpu()
        kept.update({name: value.cpu() for name, value in self._numbers.items()})
        self.steps.append(kept)
        self._numbers = {}


def record(out, names, dtypes, keys):
    """Train the steps of each detector in each type, in each worker; the first writes ``out``.

    That is {(name, dtype, trainer): (steps, whether workers agree)}.
    """
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found = {}
    trainers = (InOrderTrainer, BackwardsTrainer) if num_workers() == 1 else (InOrderTrainer,)
    for name, dtype, trainer_class in itertools.product(names, dtypes, trainers):
        file, fragment, more = DETECTORS[name]
        amp = {"SOLVER.AMP.ENABLED": dtype == "bfloat16", "BALANCE.AMP_DTYPE": "bfloat16"}
        keys_here = {key.replace(".", "__"): v for key, v in {**keys, **more, **amp}.items()}
        cfg = load_config(str(CONFIGS / file), fragments=[fragment], **keys_here)
        torch.manual_seed(0)
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=False)  # which counts the priors
        hook = Record()
        trainer.register_hooks([hook])
        trainer.train()
        found[name, dtype, trainer_class.__name__] = hook.steps, hook.workers_agree
    if comm.is_main_process():
        torch.save(found, out)


# --- The comparison -------------------------------------------------------------------------------


def relative(one, other):
    """Return |one - other| / |one|; 0 where both are zero."""
    distance = (one - other).norm().item()
    return distance / max(one.norm().item(), 1e-30) if distance else 0.0


def differences(one, other):
    """Return {name: (difference of each step)} of two lists of steps."""
    return {name: [relative(a[name], b[name]) for a, b in zip(one, other)] for name in one[0]}


def compare_steps(one, other, backwards, float32):
    """Return a row for every number that the steps have.

    Args:
        one, other: the steps on one worker and on several.
        backwards: those on one worker with the images of each batch in reverse order.
        float32: those on one worker in float32, or the same as ``one``.
    """
    is_float32 = float32 is one
    noise, of_type = differences(one, backwards), differences(float32, one)
    rows = []
    for name, of_steps in differences(one, other).items():
        largest = max(of_steps)
        rounding = ROUNDING["float32" if is_float32 else "bfloat16"]
        if name.startswith("gradient"):
            rounding = ROUNDING_OF_GRADIENT
        rows.append(
            {
                "what": name,
                "on_one": [step[name].norm().item() for step in one],
                "on_several": [step[name].norm().item() for step in other],
                "difference": of_steps,
                "difference_of_reverse_order": noise[name],
                "largest_difference": largest,
                "in_step": STEPS[of_steps.index(largest)],
                "within_noise": largest <= max(rounding, NOISE * max(noise[name]), *of_type[name]),
            }
        )
    return rows


def compared_steps(args, keys):
    """Train on each number of workers; return the rows of :func:`compare_steps`.

    Args:
        args: the command line of :mod:`bench_workers`.
        keys: of :func:`keys_of`, with the data of the steps.
    """
    names = [name for name in DETECTORS if args.only.lower() in name.lower()]
    keys = {
        **keys,
        "DATASETS.TEST": (),
        "DATALOADER.NUM_WORKERS": 2,
        "SOLVER.MAX_ITER": len(STEPS),
        # Weights stay as they are: what rounding does to a gradient grows tenfold a step, on one
        # worker too. Statistics go on.
        "SOLVER.BASE_LR": 1e-12,
        "SOLVER.WARMUP_ITERS": 0,
        "INPUT.RANDOM_FLIP": "none",  # which images are flipped depends on their place in the order
        "OUTPUT_DIR": str(args.folder / "statistics"),
    }
    (args.folder / "statistics").mkdir(exist_ok=True)
    found = {}
    for workers in args.gpus:
        out = args.folder / f"statistics_{workers}.pt"
        launch(record, workers, dist_url="auto", args=(out, names, args.dtypes, keys))
        found[workers] = torch.load(out)
    first, *others = args.gpus
    rows = []
    for workers, name, dtype in itertools.product(others, names, args.dtypes):
        one, _ = found[first][name, dtype, "InOrderTrainer"]
        other, agree = found[workers][name, dtype, "InOrderTrainer"]
        backwards, _ = found[first][name, dtype, "BackwardsTrainer"]
        float32 = one
        if "float32" in args.dtypes:
            float32, _ = found[first][name, "float32", "InOrderTrainer"]
        what = {"detector": name, "dtype": dtype, "workers": workers, "workers_agree": agree}
        rows += [{**what, **row} for row in compare_steps(one, other, backwards, float32)]
    return rows
