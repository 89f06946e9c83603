"""Pages that explain numbers: one HTML file each, which needs neither a network nor a server.

:class:`Page` collects sentences, figures and tables and writes them whole or not at all;
:mod:`.figures` makes the figures; :mod:`.files` writes the numbers beside the page. Nothing here
knows what a page is about, and nothing needs torch or Detectron2.
"""

from . import figures
from .files import write_csv, write_json, write_json_lines, write_whole
from .page import Page
from .progress import telling

__all__ = [
    "Page",
    "figures",
    "telling",
    "write_csv",
    "write_json",
    "write_json_lines",
    "write_whole",
]
