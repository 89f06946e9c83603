"""What the pages of ``docs`` get when the site is built.

A page is plain Markdown that reads well on GitHub, too. Comments in it say where the build puts
what is made from the code, so that no number is typed twice:

- ``<!-- figure: NAME: caption -->`` a figure of :mod:`figures`;
- ``<!-- keys: EqualizationLoss BALANCE.DENSE.PRIOR_PROB -->`` a table of config keys with their
  defaults, of methods and of single keys; ``<!-- keys: all -->`` all of them;
- ``<!-- modules: balanced_det.losses -->`` the reference of a package's modules, from docstrings;
- a code block called ``math`` becomes MathML, which browsers draw by themselves.

A link to a file that is not part of the site becomes its path, since the site may be read anywhere.
"""

import html
import pkgutil
import posixpath
import re
from pathlib import Path

import figures
import keys
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
# Pages that lie elsewhere in the repository, and what they are called in the site.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "configs/README.md": "configs.md",
    "README.md": "index.md",  # never a page of its own: links to it lead to the start
    "datasets/README.md": "data.md",
}
_FIGURE = re.compile(r"<!-- figure: (\w+): (.*?) -->", re.DOTALL)
_KEYS = re.compile(r"<!-- keys: (.*?) -->", re.DOTALL)
_MODULES = re.compile(r"<!-- modules: (.*?) -->", re.DOTALL)
_MATH = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
# A link that is defined once, "[results]: ../docs/results.md".
_DEFINED = re.compile(r"^\[(.+?)\]: (\S+)$", re.MULTILINE)


def on_files(files, config):
    """Add the pages from elsewhere and the figures to the site."""
    for path, name in ELSEWHERE.items():
        if name not in files.src_uris:
            source = ROOT / path
            files.append(File.generated(config, name, content=source.read_text(encoding="utf-8")))
    for name in set(figures.names()) - {"walk"}:
        content = figures.svg(name)
        files.append(File.generated(config, f"assets/figures/{name}.svg", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in what is made from the code, and mend links."""
    top = posixpath.relpath(".", posixpath.dirname(page.file.src_uri) or ".")
    markdown = _FIGURE.sub(lambda found: _figure(*found.groups(), top), markdown)
    markdown = _KEYS.sub(lambda found: keys.table(found[1].split()), markdown)
    markdown = _MODULES.sub(lambda found: _reference(found[1].split()), markdown)
    markdown = _MATH.sub(lambda found: mathml(found[1]), markdown)
    mend = _mended(page.file.src_uri, files)

    def mend_all(text):
        text = _DEFINED.sub(lambda found: f"[{found[1]}]: {mend(found[2])}", text)
        return _LINK.sub(lambda found: _link(found[1], mend(found[2])), text)

    return _outside_code(markdown, mend_all)


def on_post_build(config):
    """Write the search index as a script, too, which a page that lies in a folder can load."""
    folder = Path(config.site_dir, "search")
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var __index = {index}", encoding="utf-8")


def mathml(formulas: str) -> str:
    """Return the MathML of formulas in LaTeX; a line may break at each ``\\quad`` between them."""
    parts = re.split(r"\s*\\quad\s*", " ".join(formulas.split()))
    return f'<div class="formula">{"".join(map(_mathml, parts))}</div>\n'


def _mathml(formula):
    text = convert(formula, display="block")
    # A function's name and its argument stand apart, unless a bracket parts them.
    return re.sub(r"(<mi>(?:log|ln)</mi>)(?!<mo)", r'\1<mspace width="0.17em"/>', text)


def _figure(name, caption, top):
    caption = html.escape(" ".join(caption.split()))
    source = f"{top}/assets/figures/{name}.svg"
    image = f"![{caption}]({source})"
    if name == "walk":  # a part of the page, so that its text has the page's colour
        image = figures.svg(name)
    return f'<figure markdown="span">\n{image}\n<figcaption>{caption}</figcaption>\n</figure>\n'


def _reference(packages):
    return "\n\n".join(f"::: {name}" for package in packages for name in _modules(package))


def _modules(package):
    folder = ROOT.joinpath(*package.split("."))
    if not folder.is_dir():
        return [package]
    found = pkgutil.iter_modules([str(folder)])
    return [
        f"{package}.{module.name}"
        for module in found
        if not module.ispkg and not module.name.startswith("_")
    ]


def _outside_code(markdown, change):
    """Apply ``change`` to all of a page but its code blocks."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def _mended(page, files):
    """Return a function that maps a link's target in ``page`` to one in the site.

    A file that is not part of the site becomes its path in backticks.
    """
    origin = next((path for path, name in ELSEWHERE.items() if name == page), f"docs/{page}")
    if page == "index.md":
        origin = "docs/index.md"

    def mend(target):
        if re.match(r"[a-z]+:|#", target):
            return target
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        name = ELSEWHERE.get(path) or path.removeprefix("docs/")
        if name in files.src_uris and (path in ELSEWHERE or path.startswith("docs/")):
            return posixpath.relpath(name, posixpath.dirname(page) or ".") + hash_ + anchor
        # What does not exist is left for MkDocs to complain about.
        return f"`{path}`" if (ROOT / path).exists() else target

    return mend


def _link(text, target):
    if not target.startswith("`"):
        return f"[{text}]({target})"
    return target if text.strip("`") in target else f"{text} ({target})"
