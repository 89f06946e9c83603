"""The seam at which Detectron2 reads score thresholds, see :mod:`balanced_det.thresholds`."""


class CountedScoreThreshold:
    """Gives Detectron2, which reads ``test_score_thresh``, the value of ``score_threshold``.

    For a module with an attribute ``score_threshold`` to inherit before Detectron2's class.
    """

    @property
    def test_score_thresh(self):
        """The threshold: a number, or (K,); Detectron2 compares (R, K) scores with it."""
        return self.score_threshold.value

    @test_score_thresh.setter
    def test_score_thresh(self, value):
        """Ignore what Detectron2's constructor sets: ``score_threshold`` has it."""
