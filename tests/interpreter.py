"""Runs the tests of Triton kernels on a CPU, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest


def run_in_interpreter(file):
    """Run the tests of a file that are called triton-cpu in a process that interprets kernels."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    finished = subprocess.run(
        [*command, "-k", "triton-cpu"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
