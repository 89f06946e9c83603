"""One total batch on one worker and on two: the same images, losses, statistics and gradients."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from distributed import run_workers
from models import DETECTORS, batch, config
from runs import make_data, run_config
from torch.nn.parallel import DistributedDataParallel

from balanced_det.build import build_model
from balanced_det.data.loader import TrainLoader
from balanced_det.distributed import mean_over_workers, num_workers
from balanced_det.engine.checkpoint import statistics_names

# Which rows a sampler draws depends on who draws them, so all are taken.
ALL_ROWS = {
    "BALANCE.RPN.SAMPLER": "AllSampler",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 10_000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}
CASES = {
    "RetinaNet, focal": ("retinanet", {}),
    "RetinaNet, EFL": (
        "retinanet",
        {"BALANCE.DENSE.CLASSIFICATION_LOSS": "EqualizedFocalLoss"},
    ),
    "FCOS, guided": (
        "fcos",
        {
            "BALANCE.DENSE.CLASSIFICATION_LOSS": "BinaryCrossEntropyLoss",
            "BALANCE.DENSE.GUIDED_LOSS": True,
        },
    ),
    "Mask R-CNN, Seesaw": (
        "mask",
        {**ALL_ROWS, "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "SeesawLoss"},
    ),
}
# Objects of the four images of each step, which two workers take in turn: ordinary ones, the second
# worker without any, nobody with any, and ordinary ones again.
STEPS = [(2, 3, 1, 2), (4, 0, 1, 0), (0, 0, 0, 0), (1, 2, 3, 1)]


def train_share(rank, workers):
    """Train every case on this worker's images; return what each step has, by name."""
    results = {}
    for name, (detector, keys) in CASES.items():
        torch.manual_seed(0)
        model = build_model(config(DETECTORS[detector], keys), count=False).train()
        replica = DistributedDataParallel(model) if workers > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        results[name] = []
        for seed, num_objects in enumerate(STEPS):
            optimizer.zero_grad()
            with EventStorage():
                losses = replica(batch(num_objects, seed)[rank::workers])
            sum(losses.values()).backward()
            optimizer.step()
            state = model.state_dict()
            found = {name: mean_over_workers(loss.detach()) for name, loss in losses.items()}
            found.update({name: state[name].clone() for name in statistics_names(model)})
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            results[name].append({**found, "gradient": torch.cat(gradients)})
    return results


@pytest.fixture(scope="module")
def one_and_two():
    return train_share(0, 1), run_workers(train_share, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_total_batch_gives_the_same_on_one_worker_and_on_two(one_and_two, case):
    one, workers = one_and_two
    for number, expected in enumerate(one[case]):
        for worker in workers:
            for name, value in worker[case][number].items():
                difference = (value - expected[name]).double().norm()
                # Some ten thousand float32 numbers of either sign, added in another order.
                assert difference <= 1e-5 * expected[name].double().norm(), (number, name)
        assert expected["gradient"].any()


def images_of_worker(rank, folder, workers):
    """Return the first eight batches of a worker, as [(image id, pixels), ...] each."""
    assert num_workers() == workers
    data = make_data(folder)
    cfg = run_config(data, folder / "out", SOLVER__IMS_PER_BATCH=4, SEED=3)
    batches = [batch for batch, _ in zip(TrainLoader(cfg), range(8))]
    return [[(sample["image_id"], sample["image"]) for sample in batch] for batch in batches]


def test_two_workers_load_the_images_of_one_and_flip_the_same_of_them(tmp_path):
    alone = images_of_worker(0, tmp_path, 1)
    shares = run_workers(images_of_worker, tmp_path, 2)
    for batch_of_one, *of_workers in zip(alone, *shares, strict=True):
        # They take images of one order in turn. The second has 16: without one rule for both, they
        # would be flipped as on one worker once in 65,536 times.
        together = [sample for pair in zip(*of_workers, strict=True) for sample in pair]
        for (image_id, pixels), (expected_id, expected) in zip(together, batch_of_one, strict=True):
            assert image_id == expected_id
            assert torch.equal(pixels, expected)
