"""The seam at which samplers learn IoUs: Detectron2's matcher computes them and drops them."""


class IoUKeepingMatcher:
    """Call Detectron2's ``Matcher`` and keep, of each call, what samplers ask for.

    Detectron2 matches one image and samples it before it matches the next, so a sampler that runs
    right after a match finds its own image here.

    Attributes:
        ious: list of (R,) tensors, one a call: each row's largest IoU with any object, 0 without
            an object. None each, while no sampler wants them.
        matched_idxs: list of (R,) tensors, one a call: the object that it is the largest with.
    """

    def __init__(self, matcher):
        self.matcher = matcher
        self.start(None)

    def start(self, sampler):
        """Forget all calls and keep for ``sampler`` from now on; do so before each batch."""
        self._keep_ious = sampler is not None and sampler.needs_ious
        self.ious, self.matched_idxs = [], []

    def __call__(self, match_quality_matrix):
        """Match one image: (M, R) IoUs -> (R,) object indices and (R,) labels."""
        matched_idxs, labels = self.matcher(match_quality_matrix)
        self.ious.append(_largest(match_quality_matrix) if self._keep_ious else None)
        self.matched_idxs.append(matched_idxs)
        return matched_idxs, labels


def _largest(ious):
    return ious.amax(dim=0) if len(ious) else ious.new_zeros(ious.shape[1])
