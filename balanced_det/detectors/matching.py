"""The seam at which samplers learn IoUs: Detectron2's matcher computes them and drops them."""


class IoUKeepingMatcher:
    """Call Detectron2's ``Matcher`` and keep, of each call, what samplers ask for.

    Detectron2 matches one image and samples it before it matches the next, so a sampler that runs
    right after a match finds its own image here.

    Attributes:
        ious: list of (R,) tensors, one a call: each row's largest IoU with any object, 0 without
            an object.
        matched_idxs: list of (R,) tensors, one a call: the object that it is the largest with.
    """

    def __init__(self, matcher):
        self.matcher = matcher
        self.clear()

    def clear(self):
        """Forget all calls; do so before each batch."""
        self.ious, self.matched_idxs = [], []

    def __call__(self, match_quality_matrix):
        """Match one image: (M, R) IoUs -> (R,) object indices and (R,) labels."""
        matched_idxs, labels = self.matcher(match_quality_matrix)
        if len(match_quality_matrix):
            self.ious.append(match_quality_matrix.max(dim=0).values)
        else:
            self.ious.append(match_quality_matrix.new_zeros(match_quality_matrix.shape[1]))
        self.matched_idxs.append(matched_idxs)
        return matched_idxs, labels
