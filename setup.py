from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="balanced_det",
    version="0.1.0",
    description="Remedies for imbalanced detector training, composable in Detectron2.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["balanced_det", "balanced_det.*"]),
    python_requires=">=3.10",
    # Detectron2 is on no package index, see "Install" in README.md; torch and torchvision are what
    # you have, of one build.
    install_requires=[
        "torch>=2.0",
        "torchvision",
        "numpy",
        "hotcoco>=1.3",
        "opencv-python-headless",
        "pycocotools",
        "tabulate",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "dev": ["faster-coco-eval", "hypothesis", "pytest", "pytest-xdist", "ruff"],
        "report": ["matplotlib"],
    },
)
