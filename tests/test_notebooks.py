"""Every notebook runs and is built the same way; and the harness that says so fails when it should."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import comm
import nbformat
import pytest

from mfdiff_lite import notebook
from mfdiff_lite.look import knobs

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAGIC = "%matplotlib inline"

_spec = importlib.util.spec_from_file_location("notebooks_run", ROOT / "notebooks" / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

WITHOUT_KNOB = ("00_quickstart", "09_explorer")  # their viewer shows one case, in all planes

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_notebooks_are_there_and_numbered_without_a_gap():
    assert NOTEBOOKS, "no notebooks found"  # the tests below would be skipped
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02d}_" for number in range(len(NOTEBOOKS))]


@pytest.mark.notebook
@each_notebook
def test_runs(path, tmp_path):
    try:
        executed = run.run_notebook(path, tmp_path, profile="smoke")
    except run.NotebookError as error:
        pytest.fail(f"{error}\n{error.detail}", pytrace=False)
    cells = nbformat.read(executed, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not picture_problems(outputs)
    metrics = tmp_path / path.stem / "metrics.json"
    assert metrics.is_file(), f"{path.name} wrote no metrics.json into its out_dir"
    found = json.loads(metrics.read_text(encoding="utf-8"))
    expected = json.loads((ROOT / "notebooks" / "expected_metrics.json").read_text(encoding="utf-8"))[path.stem]
    outside = {n: (found.get(n), r) for n, r in expected.items() if not r[0] <= found.get(n, float("nan")) <= r[1]}
    assert not outside, f"{path.name}: name: (found, expected range) {outside}"
    controls = live_controls(executed.with_suffix(".html").read_text(encoding="utf-8"))
    assert controls, f"{path.name}: no control on its page works without a kernel"
    turned = [size for size, meta in controls if meta["knobs"]]
    assert turned or path.stem in WITHOUT_KNOB, f"{path.name}: no knob to turn"
    assert all(size <= 300_000 for size in turned), f"{path.name}: a knob of {max(turned)} bytes"


def live_controls(page: str) -> list[tuple[int, dict]]:
    """(bytes, what it knows of itself) of every viewer of a page that has its data and its script with it."""
    inside = r'<script type="application/json">(.*?)</script><script>(.*?)</script>'
    viewers = re.findall(rf'(<div class="mfdiff-viewer">.*?{inside})', page, re.DOTALL)
    return [(len(all_of_it), json.loads(data)["meta"]) for all_of_it, data, script in viewers if ".mount(" in script]


@each_notebook
def test_has_a_control(path):
    """Without running it: so that one that goes missing is noticed at once."""
    code = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert ("mf.explore(" if path.stem in WITHOUT_KNOB else "mf.knobs(") in code


def test_a_control_that_needs_a_kernel_is_noticed():
    page = knobs({"dose": [4, 20]}, numbers={"noise": [1, 2]}).html()
    ((size, meta),) = live_controls(f"<p>{page}</p>")
    assert size < 80_000 and meta["knobs"][0]["choices"] == ["4", "20"]
    assert not live_controls(re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))  # data without a script
    assert not live_controls(re.sub(r'<script type="application/json">.*?</script>', "", page, flags=re.DOTALL))
    assert not live_controls("<p>Error displaying widget: model not found</p>")


def picture_problems(outputs) -> list[str]:
    """What keeps a blind student from the pictures among a notebook's outputs; empty when each has a text."""
    data = [o.get("data", {}) for o in outputs]
    pictures = _Pictures()
    for one in data:
        pictures.feed("".join(one.get("text/html", "")))
    pictures.close()
    problems = ["a figure was left open or displayed without a text: use show(fig, alt)"] * sum(
        "image/png" in one for one in data
    )
    problems += [f"a picture has the text {alt!r}, too short" for alt in pictures.texts if len(alt.strip()) < 20]
    return problems if pictures.texts else [*problems, "no picture with a text"]


class _Pictures(HTMLParser):
    """`texts`: the alt of every <img>, "" where there is none."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.texts.append(dict(attrs).get("alt") or "")


@each_notebook
def test_structure(path):
    problems = structure_problems(nbformat.read(path, as_version=4))
    assert not problems, f"{path.name}: " + "; ".join(problems)


def structure_problems(notebook) -> list[str]:
    """How a notebook differs from the rules in CONTRIBUTING.md; empty when it keeps them."""
    cells, code = notebook.cells, [c for c in notebook.cells if c.cell_type == "code"]
    trees = [_tree(cell.source) for cell in code]
    tags = [cell.metadata.get("tags", []) for cell in code]
    nodes = [node for tree in trees if tree for node in ast.walk(tree)]
    head, tail = cells[0], cells[-1]
    rules = {
        "its kernel is not python3": notebook.metadata.get("kernelspec", {}).get("name") == "python3",
        "it stores widget state": "widgets" not in notebook.metadata,
        "it stores outputs": not any(c.outputs or c.execution_count for c in code),
        "a cell is not plain Python (the only magic allowed is %matplotlib inline)": None not in trees,
        "it calls get_ipython": not any(isinstance(n, ast.Name) and n.id == "get_ipython" for n in nodes),
        "it defines a class": not any(isinstance(n, ast.ClassDef) for n in nodes),
        "it has fewer than three code cells": len(code) >= 3,
        "its first code cell holds more than imports": bool(trees and trees[0])
        and all(isinstance(n, ast.Import | ast.ImportFrom) for n in trees[0].body),
        "its second code cell, and no other, must be tagged 'parameters'": [
            n for n, names in enumerate(tags) if "parameters" in names
        ]
        == [1],
        "parameters must have profile, seed, device, out_dir": len(trees) > 1
        and {"profile", "seed", "device", "out_dir"} <= _assigned(trees[1]),
        "the default profile must be smoke": len(code) > 1 and 'profile = "smoke"' in code[1].source,
        "the cell after the parameters must begin with mf.start_notebook()": len(code) > 2
        and code[2].source.startswith("mf.start_notebook()\n"),
        "its results must go below the folder that it runs in": len(code) > 1 and 'out_dir = "runs/' in code[1].source,
        "it must open with a heading and Objectives, Needs, Time": head.cell_type == "markdown"
        and head.source.startswith("# ")
        and all(word in head.source for word in ("Objectives", "Needs", "Time")),
        "it must end with an Exercise and Next": tail.cell_type == "markdown"
        and all(word in tail.source for word in ("Exercise", "Next")),
    }
    return [problem for problem, kept in rules.items() if not kept]


def _tree(source: str):
    """Syntax tree of a cell, or None where it is not Python: no other magic and no shell line would parse."""
    try:
        return ast.parse("\n".join(line for line in source.splitlines() if line.strip() != MAGIC))
    except SyntaxError:
        return None


def _assigned(tree) -> set[str]:
    targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets] if tree else []
    targets += [n.target for n in tree.body if isinstance(n, ast.AnnAssign)] if tree else []
    return {t.id for t in targets if isinstance(t, ast.Name)}


# Controls: fabricated notebooks, so that a harness that lets everything pass is noticed.


def fabricate(folder: Path, *sources: str, name: str = "05_made_up") -> Path:
    """A notebook that keeps every rule, with `sources` as its code cells after the parameters."""
    new = nbformat.v4
    parameters = 'profile = "smoke"\nseed = 0\ndevice = "auto"\nout_dir = "runs/05_made_up"'
    cells = [
        new.new_markdown_cell("# Made up\n**Objectives** a - b - c. **Needs** nothing. **Time** seconds."),
        new.new_code_cell(f"import json\nimport pathlib\n\nimport mfdiff_lite as mf\n\n{MAGIC}"),
        new.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new.new_code_cell("mf.start_notebook()\n"),
        *[new.new_code_cell(source) for source in sources],
        new.new_markdown_cell("**Exercise** do it again. **Next** nothing."),
    ]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{name}.ipynb"
    nbformat.write(new.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    return path


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ([{"data": {"text/html": '<img alt="A curve that falls from left to right" src="x">'}}], ""),
        ([{"data": {"text/html": '<img alt="A curve that falls" src="x">'}}], "too short"),
        ([{"data": {"text/html": '<p><img src="x"></p>'}}], "too short"),
        ([{"data": {"text/html": '<img alt src="x">'}}], "too short"),
        ([{"data": {"text/html": "<p>a table</p>", "text/plain": "a table"}}, {"text": "printed"}], "no picture"),
        ([{"data": {"image/png": "iVBORw0=", "text/plain": "<Figure>"}}], "show(fig, alt)"),
    ],
)
def test_picture_without_a_text_is_noticed(outputs, problem):
    found = "; ".join(picture_problems(outputs))
    assert problem in found if problem else not found


@pytest.mark.notebook
def test_harness_passes_parameters_and_writes_copy_and_html(tmp_path):
    path = fabricate(
        tmp_path,
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "import ipywidgets\nipywidgets.IntSlider()",
        "import os, sys\n"
        "assert pathlib.Path.cwd() == pathlib.Path(os.environ['WANTED_CWD'])\n"
        "pathlib.Path(out_dir).mkdir(parents=True)\n"
        "found = {'profile': profile, 'seed': seed, 'python': sys.executable}\n"
        "(pathlib.Path(out_dir) / 'metrics.json').write_text(json.dumps(found))",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANTED_CWD", str(tmp_path.resolve()))
        executed = run.run_notebook(path, tmp_path / "out", "cpu", {"seed": 3}, cell_seconds=60)
    found = json.loads((tmp_path / "out/05_made_up/metrics.json").read_text(encoding="utf-8"))
    assert found == {"profile": "cpu", "seed": 3, "python": sys.executable}
    assert executed == tmp_path / "out/05_made_up.ipynb"
    notebook = nbformat.read(executed, as_version=4)
    assert "widgets" not in notebook.metadata
    assert any("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))
    assert "data:image/png;base64" in executed.with_suffix(".html").read_text(encoding="utf-8")
    assert not structure_problems(nbformat.read(path, as_version=4))


def test_pages_fold_tagged_code_and_keep_answers_closed(tmp_path):
    """Also: a picture that is attached to a cell is in the page, and of a progress bar the last state."""
    new = nbformat.v4
    box = "> **Predict.** What?\n\n<details><summary>Answer</summary>\n\nThis *answer*.\n\n</details>"
    drawn = new.new_markdown_cell("![a drawing](attachment:a.svg)")
    drawn["attachments"] = {"a.svg": {"image/svg+xml": "PHN2Zy8+"}}
    folded = new.new_code_cell("hidden = 1", metadata={"tags": ["hide-input"]})
    bar = [new.new_output("stream", name="stdout", text=f"\rstep {k}") for k in (1, 2)]
    bar.append(new.new_output("display_data", data={"text/plain": "Slider(value=1)", run.WIDGET: {"model_id": "0"}}))
    cells = [new.new_markdown_cell(box), drawn, folded, new.new_code_cell("shown = 2", outputs=bar)]
    path = tmp_path / "a.ipynb"
    nbformat.write(new.new_notebook(cells=cells), path)
    run.write_page(path)
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    answer = page.split("<summary>Answer</summary>")[1].split("</details>")[0]
    assert "This <em>answer</em>" in answer
    code = page.split('<details class="folded">')
    assert len(code) == 2 and "hidden" in code[1].split("</details>")[0] and "shown" in code[1].split("</details>")[1]
    assert "data:image/svg+xml;base64,PHN2Zy8+" in page
    assert "step 2" in page and "step 1" not in page and "Slider" not in page


# Plain papermill, from any folder


def papermill(folder, *arguments):
    command = [sys.executable, "-m", "papermill", *map(str, arguments), "--no-progress-bar"]
    environment = {name: value for name, value in os.environ.items() if name not in notebook.LIVE}
    environment |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def fabricated(tmp_path):
    """A notebook with a formula, an explorer, a file that it writes; and another folder to run it from."""
    path = fabricate(
        tmp_path,
        "import numpy as np\nfrom IPython.display import Markdown\nmf.explore({'LPET': np.ones((8, 9, 4))})",
        "Markdown(r'$\\bar\\alpha * x * y$, an amount of $5 and <b>more</b>')",
        "pathlib.Path(out_dir).mkdir(parents=True)\n(pathlib.Path(out_dir) / 'profile.txt').write_text(profile)",
    )
    (tmp_path / "elsewhere").mkdir()
    return path


@pytest.mark.notebook
def test_plain_papermill_writes_below_the_folder_it_runs_in_and_needs_no_widgets(fabricated):
    here = fabricated.parent / "elsewhere"
    done = papermill(here, fabricated, "out.ipynb", "-p", "profile", "cpu")
    assert done.returncode == 0, done.stderr
    assert (here / "runs/05_made_up/profile.txt").read_text() == "cpu"
    assert sorted(path.name for path in fabricated.parent.iterdir()) == ["05_made_up.ipynb", "elsewhere"]
    executed = nbformat.read(here / "out.ipynb", as_version=4)
    assert "widgets" not in executed.metadata
    command = [sys.executable, str(ROOT / "notebooks/run.py"), "--page", str(here / "out.ipynb")]
    made = subprocess.run(command, cwd=fabricated.parent, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0 and made.stdout == f"{here / 'out.html'}\n", made.stderr
    page = (here / "out.html").read_text(encoding="utf-8")
    assert page.count("<math") == 1 and "$5 and" in page and "mfdiffViewers" in page
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"'](?!data:|#)", page)
    scripts = re.findall(r"<script.*?</script>", page, re.DOTALL)
    assert scripts and not [one for one in scripts if run.FETCHES.search(one)], "scripts that fetch others"


@pytest.mark.notebook
def test_plain_papermill_refuses_a_parameter_that_the_notebook_does_not_have(fabricated):
    done = papermill(fabricated.parent, fabricated, "out.ipynb", "-p", "sede", "3")
    assert done.returncode != 0 and "found 'sede'; did you mean 'seed'?" in done.stderr
    assert not (fabricated.parent / "runs").exists()


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        (["", "seed = 0", "# Parameters\nseed = 3\n"], ""),
        (["", "seed = 0", "other = 1"], ""),  # a notebook that a person runs
        (["", "seed: int = 0", "# Parameters\nsede = 3\n"], "found 'sede'; did you mean 'seed'?"),
        (["", "seed, where = 0, 1\nout_dir = 'x'", "# Parameters\nzzz = 3\n"], "found 'zzz'; choose one of out_dir"),
    ],
)
def test_parameters_are_those_of_the_cell_before(cells, sentence, monkeypatch):
    monkeypatch.setattr(notebook, "get_ipython", lambda: SimpleNamespace(user_ns={"In": cells}))
    monkeypatch.setenv(notebook.LIVE[0], "somebody sits here")
    before = comm.create_comm
    if sentence:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            notebook.start_notebook()
    else:
        notebook.start_notebook()
    assert comm.create_comm is before, "widgets must stay alive"


@pytest.mark.notebook
def test_harness_names_notebook_cell_and_error_in_one_line(tmp_path):
    path = fabricate(tmp_path, "fine = 1", "\n# why\nvalues = [1, 2]\nraise ValueError('two\\nlines')")
    with pytest.raises(run.NotebookError) as caught:
        run.run_notebook(path, tmp_path / "out")
    assert str(caught.value) == "05_made_up.ipynb, cell '# why': ValueError: two lines"
    assert "ValueError" in caught.value.detail
    assert not (tmp_path / "out/05_made_up.html").exists()


@pytest.mark.notebook
def test_harness_stops_a_cell_over_the_limit(tmp_path):
    path = fabricate(tmp_path, "import time\ntime.sleep(60)", "never = 1")
    with pytest.raises(run.NotebookError, match=r"^05_made_up.ipynb, cell 'import time': ran longer than .* 12 s$"):
        run.run_notebook(path, tmp_path / "out", cell_seconds=12)  # on a busy machine imports take seconds


@pytest.mark.notebook
def test_harness_names_the_cell_that_killed_the_kernel(tmp_path):
    path = fabricate(tmp_path, "import os\nos._exit(1)", "never = 1")
    with pytest.raises(run.NotebookError, match=r"^05_made_up.ipynb, cell 'import os': the kernel died"):
        run.run_notebook(path, tmp_path / "out")


@pytest.mark.notebook
def test_kernels_have_no_network(tmp_path):
    path = fabricate(tmp_path, "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)")
    with pytest.raises(run.NotebookError, match="NetworkRefused"):
        run.run_notebook(path, tmp_path / "out")


def test_harness_refuses_an_unknown_parameter(tmp_path):
    path = fabricate(tmp_path, "fine = 1")
    with pytest.raises(run.ParameterError, match="05_made_up.ipynb: no parameter 'sede'; did you mean 'seed'"):
        run.run_notebook(path, tmp_path / "out", parameters={"sede": 1})
    assert not (tmp_path / "out").exists()


def test_harness_refuses_what_is_not_a_notebook(tmp_path):
    path = tmp_path / "05_made_up.ipynb"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(run.NotebookError, match="05_made_up.ipynb: not a readable notebook"):
        run.run_notebook(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["99_nowhere"], "no notebook '99_nowhere'"),
        (["--profile", "huge"], "'huge' is none of smoke, cpu, gpu"),
        (["-p", "seed"], "expected name=value"),
    ],
)
def test_command_line_refuses_bad_usage(arguments, sentence):
    command = [sys.executable, str(ROOT / "notebooks/run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert sentence in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda nb: nb.metadata.kernelspec.update(name="mine"), "kernel is not python3"),
        (lambda nb: nb.cells[1].update(source="import json\nx = 1"), "more than imports"),
        (lambda nb: nb.cells[1].update(source="%pip install x"), "not plain Python"),
        (lambda nb: nb.cells[3].update(source="!ls"), "not plain Python"),
        (lambda nb: nb.cells[3].update(source="%%time\nx = 1"), "not plain Python"),
        (lambda nb: nb.cells[3].update(source="get_ipython().system('ls')"), "get_ipython"),
        (lambda nb: nb.cells[3].update(source="if True:\n    class A: pass"), "defines a class"),
        (lambda nb: nb.cells[2].metadata.clear(), "tagged 'parameters'"),
        (lambda nb: nb.cells[2].update(source='profile = "smoke"'), "seed, device, out_dir"),
        (lambda nb: nb.cells[3].update(execution_count=1), "stores outputs"),
        (lambda nb: nb.cells[3].update(source="x = 1"), "start_notebook"),
        (lambda nb: nb.cells[2].update(source=nb.cells[2].source.replace("runs/", "../runs/")), "below the folder"),
        (lambda nb: nb.cells[0].update(source="# Made up"), "Objectives"),
        (lambda nb: nb.cells.pop(), "must end"),
    ],
)
def test_structure_rules_notice(change, problem, tmp_path):
    notebook = nbformat.read(fabricate(tmp_path, "x = 1"), as_version=4)
    change(notebook)
    assert problem in "; ".join(structure_problems(notebook))
