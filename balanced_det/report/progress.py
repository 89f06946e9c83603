"""Signs of life from work that takes long and cannot count its steps."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

from ..errors import printable

# A process of its own, since a thread stands still while one call of C code, such as the reading of
# a JSON file, keeps Python's lock. It ends with the one that it speaks for.
_TICK = """
import os, sys, time
what, period, parent = sys.argv[1], float(sys.argv[2]), os.getppid()
began = time.monotonic()
while True:
    time.sleep(period)
    if os.getppid() != parent:
        break
    print(f"  {what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
"""


@contextlib.contextmanager
def telling(what: str, period: float = 3.0) -> Iterator[None]:
    """Say on standard error what is being done, and every ``period`` seconds that it still is.

    Args:
        what: "Reading 'a.json'", for example.
        period: in seconds.
    """
    began = time.monotonic()
    what = printable(what)
    print(f"{what} ...", file=sys.stderr, flush=True)
    # -S -E: nothing of the environment is needed, and it starts in milliseconds.
    ticking = subprocess.Popen([sys.executable, "-S", "-E", "-c", _TICK, what, str(period)])
    try:
        yield
    finally:
        ticking.kill()
        ticking.wait()
    if time.monotonic() - began > period:
        print(f"  {what}: done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
