"""Make one static site with search out of executed notebooks: the second half of `make book`.

    python notebooks/run.py --profile cpu --out runs/book/executed
    python notebooks/book.py runs/book/executed --out runs/book/html

One page more has the library's public names and their docstrings. The site needs no server and loads nothing from
elsewhere: open OUT/index.html.
"""

import importlib.metadata
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import typer
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

import mfdiff_lite

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "runs" / "web"  # of `make web`, where it was made: it goes into the book
LINK = re.compile(r"\[([^][]*)]\(([^)\s#:]+)(?:#[^)\s]*)?\)")  # [text](file#place) with a relative file
ABOUT = re.compile(r"^\| \[.*]\(notebooks/(\w+\.ipynb)\) \| (.*) \|$", re.MULTILINE)  # a row of the README's table
DOWNLOADS = "downloads"
BINDER = "https://mybinder.org/v2/gh/{}/HEAD?urlpath=lab/tree/notebooks/{}"  # builds from environment.yml
ABOUT_BINDER = """*Launch* on a notebook's page starts it on mybinder.org, a free service, as it is in github.com/{}.
It works if that repository is public. The first start takes minutes, and what you change there is not kept."""
CONF = r'''
import re

project = html_title = "mfdiff_lite"
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
html_theme = "furo"
html_theme_options = {"announcement": "For teaching and research. Not a medical device."}
html_static_path = html_css_files = ["book.css"]
pygments_dark_style = "native"
html_show_copyright = html_copy_source = html_use_index = False
html_show_search_summary = False  # read from the pages found, which a browser forbids on disk
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["downloads"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_mime_priority_overrides = [("html", "text/html", 0)]  # still slices, not the widget that has no kernel here
nb_ipywidgets_js = {}  # scripts for widgets, from elsewhere


def formula(writer, node):
    """MathML needs no script, which a page would fetch from elsewhere."""
    from docutils.nodes import SkipNode
    from latex2mathml.converter import convert

    inline = node.tagname == "math"
    math = convert(node.astext(), display="inline" if inline else "block")
    writer.body.append(math if inline else f'<div class="formula">{math}</div>')
    raise SkipNode


def prose(app, what, name, thing, options, lines):
    """The library's docstrings are plain text: `code` is all their markup, and what is set in columns stays so."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines.clear()
    for rows in map(str.splitlines, blocks):
        if all(row.startswith("    ") for row in rows) or any("   " in row.strip() for row in rows):
            lines += ["::", "", *("    " + row for row in rows), ""]
        else:
            parts = re.split(r"`([^`]+)`", " ".join(map(str.strip, rows)))
            parts[::2] = [re.sub(r"([^\w\s])", r"\\\1", part) for part in parts[::2]]
            parts[1::2] = [rf"\ ``{part}``\ " for part in parts[1::2]]
            lines += ["".join(parts), ""]


def signature(app, what, name, thing, options, arguments, result):
    """A dataclass shows a default that it makes anew as "<factory>", which Sphinx cannot parse."""
    return arguments and arguments.replace("<factory>", "..."), result


def setup(app):
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("autodoc-process-docstring", prose)
    app.connect("autodoc-process-signature", signature)
'''
CSS = """
.content { width: 58em }  /* a line of code has up to 120 characters */
.cell_input pre { font-size: .82em }
.content details { margin-bottom: 1em }
.formula { margin: 1em 0; overflow-x: auto }
.cell_output table:not(.docutils) { display: block; overflow-x: auto; border-collapse: collapse; margin: 1em 0 }
.cell_output :is(th, td) { padding: .25em .6em; text-align: left; vertical-align: top }
.cell_output tr { border-bottom: 1px solid var(--color-background-border) }
"""


class BookError(Exception):
    """The book cannot be made; `str()` is one sentence that says what to do."""


def library_page() -> str:
    """Every public name under the module that it comes from; Sphinx fills in signatures and docstrings."""
    rows = ["The library", "===========", "", "The public names of ``mfdiff_lite``, by the module that holds them.", ""]
    for module, names in mfdiff_lite._PUBLIC.items():
        rows += [module, "-" * len(module), "", f".. automodule:: mfdiff_lite.{module}", "   :no-index:", ""]
        for name in names:
            kind = "class" if inspect.isclass(getattr(mfdiff_lite, name)) else "function"
            rows += [f".. auto{kind}:: mfdiff_lite.{name}", *["   :members:"] * (kind == "class"), ""]
    return "\n".join(rows)


def repository() -> str:
    """OWNER/NAME on GitHub: the `Homepage` of pyproject.toml, as installed; "" if that is elsewhere."""
    urls = importlib.metadata.metadata("mfdiff_lite").get_all("Project-URL") or []
    found = re.search(r"^Homepage, https://github\.com/([^/]+/[^/]+?)(\.git)?/?$", "\n".join(urls), re.MULTILINE)
    return found[1] if found else ""


def ways_out(name: str) -> str:
    """Under a notebook's head: the file to download, and where mybinder.org runs the repository's copy of it."""
    launch = f" · [Launch this notebook on Binder]({BINDER.format(repository(), name)})" * bool(repository())
    return f"\n\n{{download}}`Download this notebook <../{DOWNLOADS}/{name}>`{launch}"


def write_sources(executed: Path, source: Path) -> None:
    """Fill `source`, laid out like the repository: executed notebooks, README, every file these link to, an index."""
    copies = sorted(executed.glob("[0-9][0-9]_*.ipynb"))
    if not copies:
        raise BookError(
            f"no executed notebooks in {executed}: 'make book' makes them, or "
            f"'python notebooks/run.py --profile cpu --out {executed}'"
        )
    absent = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} - {path.name for path in copies}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    profiles, pages = set(), []
    for path in copies:
        notebook, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.read(path, as_version=4), {})
        if any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", [])):
            raise BookError(f"{path} stopped at an error: run it again with notebooks/run.py")
        profiles.add(notebook.metadata.get("papermill", {}).get("parameters", {}).get("profile", "unknown"))
        stored = ROOT / "notebooks" / path.name
        if stored.is_file():  # as the course hands it out, without outputs
            (source / DOWNLOADS).mkdir(exist_ok=True)
            shutil.copy(stored, source / DOWNLOADS / path.name)
            notebook.cells[0].source += ways_out(path.name)
        text = nbformat.writes(notebook).replace("(attachment:", "(../docs/drawings/")  # MyST knows no attachments
        for folder in (ROOT, executed.resolve().parent):  # where it was executed is nobody's business
            text = text.replace(f"{folder}/", "")
        pages.append((Path("notebooks", path.name), text))
    pages.append((Path("README.md"), readme))

    known = {page for page, _ in pages}
    for page, text in pages:  # grows by what the pages link to
        text = LINK.sub(lambda link: link[1] if Path(link[2]).name in absent else link[0], text)
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        (source / page).write_text(text, encoding="utf-8")
        linked = {Path(os.path.normpath(page.parent / link[2])) for link in LINK.finditer(text)} - known
        for target in sorted(path for path in linked if path.parts[0] != ".." and (ROOT / path).is_file()):
            known.add(target)
            if target.suffix in (".md", ".ipynb"):
                pages.append((target, (ROOT / target).read_text(encoding="utf-8")))
            else:
                (source / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / target, source / target)

    about, claims = dict(ABOUT.findall(readme)), readme.split("\n## What the paper claims")
    rows = [f"| [{path.stem}](notebooks/{path.name}) | {about.get(path.name, '')} |" for path in copies]
    index = [readme.split("\n## ")[0], *["## What the paper claims" + part.split("\n## ")[0] for part in claims[1:]]]
    link = f'<p><a href="{PAGE.name}/try.html">Restore a slice in this browser</a></p>'
    index += [link, ""] * PAGE.is_dir()
    index += ["## The notebooks", f"Executed with profile {', '.join(sorted(profiles))}.", ""]
    index += ["| | |", "|---|---|", *rows, "", *[ABOUT_BINDER.format(repository()), ""] * bool(repository())]
    index += ["Every public name: [the library](library.rst).", ""]
    index += ["Words: [glossary](docs/glossary.md). Symbols: [notation](docs/notation.md).", ""]
    index = LINK.sub(lambda link: link[1] if Path(link[2]).name in absent else link[0], "\n".join(index)).split("\n")
    listed = [page.with_suffix("").as_posix() if page.name != "README.md" else "Read me <README>" for page, _ in pages]
    listed.insert(len(copies), "The library <library>")
    index += ["```{toctree}", ":hidden:", "", *listed, "```", ""]
    for name, text in (
        ("index.md", "\n".join(index)),
        ("conf.py", CONF),
        ("book.css", CSS),
        ("library.rst", library_page()),
    ):
        (source / name).write_text(text, encoding="utf-8")


def build(executed: Path, out: Path) -> None:
    """Make the site and put it in place of an earlier one, all or nothing. Raises BookError."""
    lacking = [name for name in ("sphinx", "myst_nb", "furo", "latex2mathml") if not importlib.util.find_spec(name)]
    if lacking:
        raise BookError(f"not installed: {', '.join(lacking)}; install: pip install -e '.[book]'")
    if out.exists() and not (out / "searchindex.js").is_file():
        raise BookError(f"{out} exists and is not an earlier book, which would be replaced: name another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book_", dir=out.parent) as temporary:
        source, site = Path(temporary, "source"), Path(temporary, "site")
        source.mkdir()
        write_sources(executed, source)
        command = [sys.executable, "-m", "sphinx", "-q", "-d", f"{temporary}/doctrees", str(source), str(site)]
        if subprocess.run(command).returncode:
            raise BookError("Sphinx stopped, see its message above")
        if PAGE.is_dir():
            shutil.copytree(PAGE, site / PAGE.name)
        if out.exists():
            out.rename(Path(temporary, "earlier"))
        site.rename(out)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    executed: Path = typer.Argument(Path("runs/book/executed"), help="Folder with executed notebooks."),
    out: Path = typer.Option(Path("runs/book/html"), help="Folder of the site; an earlier site there is replaced."),
) -> None:
    """Make one static site with search out of executed notebooks."""
    try:
        build(executed, out)
    except BookError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    typer.echo(f"{out / 'index.html'}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    app()
