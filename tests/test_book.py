"""The course as a web site (notebooks/book.py): everything in place, and nothing fetched from elsewhere."""

import importlib.util
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

import mfdiff_lite

for module in ("sphinx", "myst_nb", "furo", "latex2mathml"):
    pytest.importorskip(
        module, reason=f"no test of the book: {module} is missing; install it: pip install -e '.[book]'"
    )

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "notebooks/book.py"
_spec = importlib.util.spec_from_file_location("notebooks_book", BOOK)
book = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(book)

pytestmark = pytest.mark.slow

WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "0", "version_major": 2, "version_minor": 0}}
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
SLICES = (
    "<style>.mfdiff-scroll {display: grid}</style><div class='mfdiff-scroll'><input type='radio'>slice 1 of 12</div>"
)


class Page(HTMLParser):
    """What a page loads, where it leads, which places it has, and its pictures' texts."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.places, self.alts = [], [], set(), []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, pairs):
        attributes = dict(pairs)
        self.places.add(attributes.get("id"))
        if tag == "link" and attributes.get("rel") in ("stylesheet", "preload", "icon", "modulepreload"):
            self.loads.append(attributes["href"])
        elif tag in ("a", "link"):
            self.links.append(attributes.get("href", ""))
        else:
            self.loads += [attributes[key] for key in ("src", "srcset", "data", "poster") if attributes.get(key)]
        if tag == "img":
            self.alts.append(attributes.get("alt", ""))


def write_notebook(path: Path, *cells):
    metadata = {"papermill": {"parameters": {"profile": "smoke"}}}
    metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)


def html_output(html, **other):
    return new_output("display_data", data={"text/html": html, "text/plain": "not this"} | other)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book") / "executed"
    write_notebook(
        folder / "00_quickstart.ipynb",
        new_markdown_cell("# 00 Toy\n\nNext: [01](01_data.ipynb#counted-twice), then [03](03_diffusion.ipynb)."),
        new_code_cell(f'out_dir = "{folder}/00_quickstart"', metadata={"tags": ["injected-parameters"]}),
        new_code_cell("picture", outputs=[html_output(f'<img alt="two doses of one head" src="{PIXEL}">')]),
        new_code_cell("explore", outputs=[html_output(SLICES, **WIDGET)]),
        new_code_cell("bar", outputs=[new_output("stream", name="stdout", text=f"\rstep {k}") for k in (1, 2)]),
    )
    write_notebook(
        folder / "01_data.ipynb",
        new_markdown_cell("# 01 Toy\n\nBack to [00](00_quickstart.ipynb), the [README](../README.md)."),
        new_markdown_cell(
            "## Counted twice\n\nA xylophone, $\\bar\\alpha_t$ of it:\n\n$$E\\big[x^2\\big] = \\frac{1}{2}$$"
        ),
    )
    return folder


@pytest.fixture(scope="module")
def site(executed):
    out = executed.parent / "html"
    command = [sys.executable, str(BOOK), str(executed), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "Sphinx found something to warn of"
    assert sorted(path.name for path in out.parent.iterdir()) == ["executed", "html"], "left something behind"
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_links_lead_to_pages_and_places_of_the_site(site, pages):
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"https?:", link):
                continue
            name, _, place = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.is_file() and target.is_relative_to(site), f"{path.name} links to {link}"
            assert not place or target not in pages or place in pages[target].places, f"{path.name}: no place {link}"
    first, second = (pages[site / f"notebooks/{name}.html"] for name in ("00_quickstart", "01_data"))
    assert "01_data.html#counted-twice" in first.links
    assert {"00_quickstart.html", "../README.html"} <= set(second.links)
    assert "notebooks/00_quickstart.html" in pages[site / "index.html"].links
    assert "03_diffusion" not in first.text, "a notebook that was not executed has no page"


def test_launch_link_is_made_from_the_metadata(site, pages, monkeypatch):
    home = re.search(r'^Homepage = "https://github.com/(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    link = f"https://mybinder.org/v2/gh/{home}/HEAD?urlpath=lab/tree/notebooks/01_data.ipynb"
    assert link in pages[site / "notebooks/01_data.html"].links
    assert f"github.com/{home}" in pages[site / "index.html"].text
    for address, owner in {
        "https://github.com/lecturer/my.fork": "lecturer/my.fork",
        "https://github.com/lecturer/fork.git": "lecturer/fork",
        "https://github.com/lecturer": "",
        "https://example.org/a/b": "",
    }.items():
        urls = ["Issues, https://github.com/other/one", f"Homepage, {address}"]
        monkeypatch.setattr(book.importlib.metadata, "metadata", lambda name, urls=urls: Mock(get_all=lambda key: urls))
        assert book.repository() == owner
        assert (
            (f"/gh/{owner}/HEAD" in book.ways_out("a.ipynb")) == ("Binder" in book.ways_out("a.ipynb")) == bool(owner)
        )


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        for address in page.loads:
            inside = (path.parent / address.partition("?")[0]).resolve().is_relative_to(site)
            assert address.startswith("data:") or (inside and "//" not in address), f"{path.name} loads {address}"
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", page.text, re.DOTALL)
        assert not any("//" in script for script in scripts), f"{path.name} has a script with an address"
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path.name


def test_outputs_are_kept(site, pages, executed):
    first = pages[site / "notebooks/00_quickstart.html"]
    assert "two doses of one head" in first.alts and PIXEL in first.text
    assert SLICES in first.text and "not this" not in first.text
    assert "step 2" in first.text and "step 1" not in first.text
    assert str(executed) not in first.text and "executed/00_quickstart" in first.text
    assert all(alt for page in pages.values() for alt in page.alts)


def test_formulas_are_mathml(site, pages):
    text = pages[site / "notebooks/01_data.html"].text
    assert len(re.findall(r"<math\b", text)) == 2 and "<mfrac>" in text


def test_library_page_has_every_public_name(pages, site):
    page = pages[site / "library.html"]
    names = {f"mfdiff_lite.{name}" for name in mfdiff_lite.__all__}
    assert names <= page.places and "mfdiff_lite.MFdiff.restore" in page.places, names - page.places
    assert "library.html" in pages[site / "index.html"].links
    text = re.sub(r"<[^>]*>", "", page.text)
    assert "~mfdiff_lite" not in text and "factory" not in text, "a signature that Sphinx could not parse"
    for name in mfdiff_lite.__all__:
        first = re.split(r"[`<>&\'\"]|\.\s", " ".join(inspect.getdoc(getattr(mfdiff_lite, name)).split()))[0]
        assert first in " ".join(text.split()), f"{name}: no docstring on the page"


def test_docstrings_are_plain_text():
    """Nothing is markup but `code`; columns stay columns."""
    conf = {}
    exec(book.CONF, conf)
    lines = ["A *b* of `x_0`s,", "|c_|.", "", "    a = b * c", "", "method   sampler"]
    conf["prose"](None, "function", "f", None, None, lines)
    assert lines[0] == r"A \*b\* of \ ``x_0``\ s\, \|c_\|\."
    assert lines[2:] == ["::", "", "        a = b * c", "", "::", "", "    method   sampler", ""]


def test_index_and_search(site, pages):
    index = pages[site / "index.html"].text
    assert "Not a medical device" in index and "Executed with profile smoke" in index
    assert "xylophon" in (site / "searchindex.js").read_text(encoding="utf-8")  # the stem of a word of notebook 01
    assert any("searchindex.js" in address for address in pages[site / "search.html"].loads)


def test_refusals_are_one_sentence_and_leave_an_earlier_site(site, executed, tmp_path):
    write_notebook(
        tmp_path / "failed/00_quickstart.ipynb",
        new_code_cell("1 / 0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="division by zero")]),
    )
    before = (site / "index.html").stat().st_mtime_ns
    for arguments, words in (
        ([tmp_path / "nowhere", "--out", site], "make book"),
        ([tmp_path / "failed", "--out", site], "stopped at an error"),
        ([executed, "--out", executed], "not an earlier book"),
    ):
        done = CliRunner().invoke(book.app, list(map(str, arguments)))
        assert done.exit_code == 2 and words in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert (site / "index.html").stat().st_mtime_ns == before and (executed / "01_data.ipynb").exists()


def test_says_what_to_install(executed, tmp_path, monkeypatch):
    monkeypatch.setattr(book.importlib.util, "find_spec", lambda name: None if name == "furo" else name)
    done = CliRunner().invoke(book.app, [str(executed), "--out", str(tmp_path / "html")])
    assert done.exit_code == 2 and done.stderr == "not installed: furo; install: pip install -e '.[book]'\n"
