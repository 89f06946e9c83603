"""Headless Chromium for tests of pages; they are skipped where there is none."""

import re
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def open_page(path, tmp_path, width=1200, dark=False):
    """Open a page in a frame of a width; return how many figures it drew, and how wide it became.

    A window cannot be as narrow as a phone, a frame can. The page's figures count themselves.

    Returns:
        (drawn, content_width, messages): messages are what the page wrote to the console.
    """
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    frame = tmp_path / f"frame{width}.html"
    frame.write_text(
        f'<body><iframe id="page" src="{path.as_uri()}" width="{width}" height="900"></iframe>'
        "<script>setInterval(() => { const d = page.contentDocument.documentElement;"
        "if (!d) return;"  # not loaded yet
        "document.body.dataset.drawn = d.dataset.drawn;"
        "document.body.dataset.width = d.scrollWidth; }, 50)</script></body>"
    )
    done = subprocess.run(
        [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            # Names that no server answers to: the page needs none.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *(["--force-dark-mode"] if dark else []),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            "--virtual-time-budget=20000",
            "--enable-logging=stderr",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = dict(re.findall(r'data-(drawn|width)="(\d+)"', done.stdout))
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return int(found.get("drawn", -1)), int(found.get("width", -1)), messages
