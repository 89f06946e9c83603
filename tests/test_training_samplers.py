"""Samplers of training images that know the classes."""

import itertools
import math
from collections import Counter

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.samplers import RepeatFactorTrainingSampler
from distributed import run_workers

from balanced_det.data.training_samplers import (
    TRAINING_SAMPLERS,
    ClassAwareTrainingSampler,
    build_training_sampler,
    instance_aware_repeat_factors,
)
from balanced_det.errors import InputError


def image(*classes, crowds=()):
    return {
        "annotations": [{"category_id": c} for c in classes]
        + [{"category_id": c, "iscrowd": 1} for c in crowds]
    }


# Class 0 in four images, class 2 in one with five objects, class 5 in one with one.
DATA = [image(0, 0), image(0, crowds=[5]), image(0, 2, 2, 2, 2, 2), image(), image(5), image(0)]


def test_repeat_factors_follow_the_geometric_mean_of_images_and_objects():
    threshold = 0.5
    factors = instance_aware_repeat_factors(DATA, threshold)
    images, instances = {0: 4, 2: 1, 5: 1}, {0: 5, 2: 5, 5: 1}
    repeat = {
        c: max(1, math.sqrt(threshold / math.sqrt(images[c] / 6 * instances[c] / 11)))
        for c in images
    }
    assert repeat[5] > repeat[2] > repeat[0] == 1  # the more objects, the less rare
    expected = [1, 1, repeat[2], 1, repeat[5], 1]
    # Float32 rounding.
    assert factors.tolist() == pytest.approx(expected, rel=1e-6)
    plain = instance_aware_repeat_factors(DATA, threshold, sqrt=False)
    assert plain[4].item() == pytest.approx(repeat[5] ** 2, rel=1e-6)


def test_repeat_factors_of_images_without_objects_are_one():
    assert instance_aware_repeat_factors([image(), image()], 0.1).tolist() == [1, 1]
    with pytest.raises(InputError, match="threshold"):
        instance_aware_repeat_factors(DATA, -1)


def test_class_aware_sampler_shows_every_class_equally_often():
    draws = 12_000
    drawn = Counter(itertools.islice(ClassAwareTrainingSampler(DATA, seed=0), draws))
    # One class in three; class 0 then has one of four images.
    expected = {0: 1 / 12, 1: 1 / 12, 2: 1 / 12 + 1 / 3, 4: 1 / 3, 5: 1 / 12}
    assert drawn.keys() == expected.keys()
    for index, share in expected.items():
        # Five standard deviations of a share.
        tolerance = 5 * math.sqrt(share * (1 - share) / draws)
        assert drawn[index] / draws == pytest.approx(share, abs=tolerance)


def test_class_aware_sampler_needs_an_object():
    with pytest.raises(InputError, match="there is none"):
        ClassAwareTrainingSampler([image(), image(crowds=[1])])


def config(name, seed=3):
    cfg = get_cfg()
    cfg.DATALOADER.SAMPLER_TRAIN = name
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    cfg.SEED = seed
    return cfg


def draw(rank, name, seed):
    return list(itertools.islice(build_training_sampler(config(name, seed), DATA), 3000))


@pytest.mark.parametrize("name", TRAINING_SAMPLERS)
def test_workers_share_one_stream(name):
    stream = draw(0, name, 3)
    assert draw(0, name, 3) == stream != draw(0, name, 4)
    # Seeds that the workers draw for themselves agree too.
    first, second = run_workers(draw, name, 3)
    alike = min(len(stream) // 2, 1500)
    assert first[:alike] == stream[: 2 * alike : 2]
    assert second[:alike] == stream[1 : 2 * alike : 2]


def test_repeat_factor_sampler_repeats_by_the_factors():
    sampler = build_training_sampler(config("InstanceAwareRepeatFactorTrainingSampler"), DATA)
    assert isinstance(sampler, RepeatFactorTrainingSampler)
    factors = instance_aware_repeat_factors(DATA, 0.5)
    drawn = Counter(itertools.islice(sampler, 6000))
    share = factors / factors.sum()
    counted = torch.tensor([drawn[i] for i in range(6)]) / 6000
    # Five standard deviations of a share, at most 1 / 2 / sqrt(6000).
    torch.testing.assert_close(counted, share, rtol=0, atol=5 * 0.5 / math.sqrt(6000))


def test_samplers_of_detectron2_are_left_to_it():
    assert build_training_sampler(config("TrainingSampler"), DATA) is None


def test_negative_seed_is_drawn():
    streams = {tuple(draw(0, "ClassAwareTrainingSampler", -1)[:50]) for _ in range(3)}
    assert len(streams) > 1
