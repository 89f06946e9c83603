"""The parts of a detector that label rows of their own, and what each has slots for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a detector with a loss, a sampler and a prior of its own.

    Attributes:
        name: of its node in ``BALANCE``.
        serves: who reads that node, for messages.
        classification_loss, sampler: names of the methods that are Detectron2's own choice.
        prior_prob: the probability that every class starts with; None is a bias of zero.
        has_classes: False for objectness: one logit a row, and nothing is counted a class.
        counts_rows: rows are labelled without the network, so they can be counted before training.
        has_classifier: its last layer is of features of a row alone, and can be exchanged.
        has_levels: its losses get the rows of each pyramid level apart.
        has_quota: how many rows a sampler takes is a key of this node, not one of Detectron2's.
    """

    name: str
    serves: str
    classification_loss: str
    sampler: str
    prior_prob: float | None
    has_classes: bool = True
    counts_rows: bool = True
    has_classifier: bool = False
    has_levels: bool = False
    has_quota: bool = False


DENSE = Part(
    "DENSE",
    "one-stage detectors: MODEL.META_ARCHITECTURE BalancedRetinaNet or BalancedFCOS",
    classification_loss="FocalLoss",
    sampler="AllSampler",
    prior_prob=0.01,
    has_levels=True,
    has_quota=True,
)
RPN = Part(
    "RPN",
    "the region proposal network MODEL.PROPOSAL_GENERATOR.NAME BalancedRPN",
    classification_loss="BinaryCrossEntropyLoss",
    sampler="RandomSampler",
    prior_prob=0.5,  # a bias of zero
    has_classes=False,
)
ROI_HEADS = Part(
    "ROI_HEADS",
    "region heads: MODEL.ROI_HEADS.NAME BalancedROIHeads or BalancedCascadeROIHeads",
    classification_loss="CrossEntropyLoss",
    sampler="RandomSampler",
    prior_prob=None,
    counts_rows=False,  # proposals come from the network
    has_classifier=True,
)
PARTS = {part.name: part for part in (DENSE, RPN, ROI_HEADS)}
