"""What the one-stage detectors share: rows of all pyramid levels, read where the head left them."""

import torch
from detectron2.utils.events import get_event_storage
from torch import nn

from ..build import build_criterion, build_sampler, initial_prior
from ..distributed import num_workers, sum_over_workers
from ..rows import foreground, ignore_others, level_rows, split_levels
from ..samplers import AllSampler
from .inference import dense_detections
from .thresholds import CountedScoreThreshold, build_score_threshold
from .wide_conv import WideConv2d


class BalancedDenseDetector(CountedScoreThreshold):
    """Losses, sampling and scores of ``BALANCE.DENSE``, to inherit before Detectron2's detector.

    Args:
        criterion: the :class:`~balanced_det.criterion.Criterion`.
        sampler: which rows take part, see :mod:`balanced_det.samplers`.
        score_threshold: the :class:`~balanced_det.detectors.thresholds.ScoreThreshold`.
        prior_prob: the probability that every class starts with.
        rows_per_image, positive_fraction: how many rows a sampler other than "all" takes.
        kwargs: Detectron2's own arguments.

    Attributes:
        initial_normalizer: foreground rows of a batch while none was seen, as Detectron2 has it.
    """

    initial_normalizer = None

    def __init__(
        self,
        *,
        criterion,
        sampler,
        score_threshold,
        prior_prob=0.01,
        rows_per_image=512,
        positive_fraction=0.25,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.criterion = criterion
        self.sampler = sampler
        self.score_threshold = score_threshold
        self.rows_per_image = rows_per_image
        self.positive_fraction = positive_fraction
        self.set_prior(prior_prob)
        # Foreground rows of a worker's batch, a moving average as Detectron2 has it. A buffer, so
        # that it is saved with the model and no step waits for the device to know it.
        self.register_buffer("loss_normalizer", torch.tensor(float(self.initial_normalizer)))

    def set_prior(self, prior_prob):
        """Start every class at the given probability: set the bias of the last layer."""
        layer = self.head.cls_score
        bias = self.criterion.classification_loss.initial_bias(prior_prob)  # (num_logits,)
        with torch.no_grad():
            layer.bias.copy_(bias.repeat(len(layer.bias) // len(bias)))

    @property
    def row_features(self):
        """The names of the feature maps that have rows, fine to coarse."""
        return self.head_in_features

    def label_rows(self, features, instances):
        """Return the labels (R,) of one image's rows.

        Args:
            features: one tensor a level, of which only the last two sizes matter.
            instances: ``Instances`` with ``gt_boxes`` and ``gt_classes``.
        """
        return self.label_anchors(self.anchor_generator(features), [instances])[0][0]

    def sample_rows(self, labels, ious=None, matched_idxs=None):
        """Return a copy of one image's labels (R,) in which the rows not sampled are ignored.

        A sampler by loss chooses later, when the losses are known: it gets the labels as they are.

        Args:
            labels: (R,).
            ious, matched_idxs: (R,), what a sampler by IoU asks for.
        """
        if self.sampler.needs_losses or isinstance(self.sampler, AllSampler):
            return labels
        return self._kept(labels, ious=ious, matched_idxs=matched_idxs)

    def _kept(self, labels, ious=None, **options):
        kept = self.sampler(
            labels, ious, self.rows_per_image, self.positive_fraction, self.num_classes, **options
        )
        return ignore_others(labels, torch.cat(kept))

    def _dense_losses(self, anchors, logits, deltas, gt_labels, gt_boxes):
        """Return the criterion's losses and the foreground rows that they were computed on.

        Args:
            anchors: (R, 4), of all levels.
            logits, deltas: the head's output, (N, A num_logits, H, W) and (N, A 4, H, W) a level.
            gt_labels: (N, R).
            gt_boxes: (N, R, 4).

        Returns:
            (losses, (image, anchor)): the index vectors of the F foreground rows.
        """
        levels = [level_rows(x, self.criterion.num_logits) for x in logits]
        if self.sampler.needs_losses:
            gt_labels = self._hard_rows(levels, gt_labels)
        image, anchor = foreground(gt_labels, self.num_classes).nonzero(as_tuple=True)  # (F,)
        get_event_storage().put_scalar("num_pos_anchors", len(image) / len(gt_labels))

        boxes = self.criterion.box_pairs(
            self.box2box_transform,
            anchors[anchor],
            torch.cat([level_rows(x, 4).flatten(1, 3) for x in deltas], dim=1)[image, anchor],
            gt_boxes[image, anchor],
        )
        losses = self.criterion(
            levels,
            split_levels(gt_labels, levels),
            boxes,
            self._update_normalizer(len(image)),
            # Nobody reads the logits after their loss: the gradient may take their place.
            overwrite_logits=True,
        )
        return losses, (image, anchor)

    def _detections(self, anchors, logits, deltas, images, centerness=None):
        """Return one ``Instances`` an image; see :func:`.inference.dense_detections`."""
        return dense_detections(
            anchors,
            logits,
            deltas,
            images.image_sizes,
            self.criterion,
            self.box2box_transform,
            score_threshold=self.test_score_thresh,
            topk_per_level=self.test_topk_candidates,
            nms_threshold=self.test_nms_thresh,
            detections_per_image=self.max_detections_per_image,
            centerness=centerness,
        )

    def _update_normalizer(self, num_foreground, momentum=0.9):
        count = self.loss_normalizer.new_tensor(float(max(num_foreground, 1)))
        count = sum_over_workers(count) / num_workers()
        self.loss_normalizer.lerp_(count, 1 - momentum)
        return self.loss_normalizer.clone()

    @torch.no_grad()
    def _hard_rows(self, levels, gt_labels):
        losses = [
            self.criterion.classification_loss.row_losses(rows, labels).flatten(1)
            for rows, labels in zip(levels, split_levels(gt_labels, levels), strict=True)
        ]
        images = zip(gt_labels, torch.cat(losses, dim=1), strict=True)
        return torch.stack([self._kept(y, losses=losses_of_image) for y, losses_of_image in images])


def balance_arguments(cfg, num_classes, fixed_threshold):
    """Translate ``cfg.BALANCE.DENSE`` into the arguments of :class:`BalancedDenseDetector`.

    Args:
        cfg: the whole config.
        num_classes: K.
        fixed_threshold: Detectron2's own score threshold.
    """
    keys = cfg.BALANCE.DENSE
    return {
        "criterion": build_criterion(cfg, "DENSE", num_classes),
        "sampler": build_sampler(cfg, "DENSE"),
        "score_threshold": build_score_threshold(cfg, "DENSE", num_classes, fixed_threshold),
        "prior_prob": initial_prior(cfg, "DENSE"),
        "rows_per_image": keys.ROWS_PER_IMAGE,
        "positive_fraction": keys.POSITIVE_FRACTION,
    }


def replace_classifier(head, num_anchors_times_logits):
    """Give a dense head a last layer of as many logits as the classification loss needs."""
    old = head.cls_score
    head.cls_score = WideConv2d(
        old.in_channels, num_anchors_times_logits, old.kernel_size, old.stride, old.padding
    )
    if old.out_channels == num_anchors_times_logits:
        head.cls_score.load_state_dict(old.state_dict())
    else:
        nn.init.normal_(head.cls_score.weight, std=0.01)
