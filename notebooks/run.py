"""Run notebooks without a browser: the one harness behind `make demo`, `make notebooks` and the tests.

    python notebooks/run.py                                     all of them, profile smoke, as many at a time as cores
    python notebooks/run.py --profile cpu 01_data               one of them, at full size
    python notebooks/run.py -p seed=3 --out runs/try 00_quickstart
    python notebooks/run.py --page out.ipynb                    the page of one that papermill has run

For notebooks/NAME.ipynb it writes OUT/NAME.ipynb (the executed copy) and OUT/NAME.html; the notebook itself writes its
results into OUT/NAME/.
"""

import ast
import contextlib
import difflib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import nbformat
import papermill
import typer
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.exceptions import PapermillExecutionError

HERE = Path(__file__).resolve().parent
CELL_SECONDS = {"smoke": 120, "cpu": 2 * 3600, "gpu": 24 * 3600}  # the longest that one cell may take, by profile
TAIL = 25  # lines of traceback worth reading
TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_css -%}{{ super() }}<style>
.jp-InputArea-editor { overflow-x: auto }  /* a line of code is longer than a phone is wide */
.jp-RenderedMarkdown .highlight { margin-bottom: 1em }
@media (min-width: 761px) { /* pictures and tables begin where text does */
  .jp-OutputArea-child:not(.jp-OutputArea-executeResult) > .jp-RenderedHTMLCommon { padding-left: 17px } }
</style>{%- endblock html_head_css -%}
{%- block input_group -%}
{%- if 'hide-input' in cell.metadata.get('tags', []) -%}
<details class="folded"><summary style="color: var(--jp-ui-font-color2)">code</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock input_group -%}"""
WIDGET = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
SCRIPT = re.compile(r"<script.*?</script>", re.DOTALL)
FETCHES = re.compile(r"<script[^>]*\bsrc=|mathjax|//cdn")  # what a page's template would load from elsewhere


class NotebookError(Exception):
    """A notebook did not run: `str()` is one line naming notebook, cell and error, `detail` the traceback's end."""

    def __init__(self, message: str, detail: str = ""):
        super().__init__(" ".join(ANSI.sub("", message).split()))
        self.detail = detail


class ParameterError(NotebookError):
    """A parameter was passed that the notebook's `parameters` cell does not declare."""


def find_notebooks(names: list[str] | None = None, folder: Path = HERE) -> list[Path]:
    """Every notebook of `folder` in the order of the course, or those named (with or without folder and ending)."""
    known = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names or known]
    for name in wanted:
        if name not in known:
            raise FileNotFoundError(f"no notebook '{name}' in {folder}; there are: {', '.join(known) or 'none'}")
    if not wanted:
        raise FileNotFoundError(f"no notebooks in {folder}")
    return [known[name] for name in wanted]


def run_notebook(
    path: Path,
    out: Path,
    profile: str = "smoke",
    parameters: dict | None = None,
    cell_seconds: float | None = None,
    progress: bool = False,
) -> Path:
    """Execute one notebook in its own folder and return the executed copy; HTML is written beside it.

    `profile` and `out_dir` are passed to notebooks that declare them. `parameters` must be declared: papermill only
    logs a misspelt name, and the run then silently uses the default. Raises NotebookError.
    """
    path, out = Path(path).resolve(), Path(out).resolve()
    executed = out / path.name
    try:
        source = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
        raise NotebookError(f"{path.name}: not a readable notebook: {error}") from None
    if executed == path:
        raise NotebookError(f"{path.name}: the output folder {out} is the notebook's own, choose another")
    passed = _parameters(path, {"profile": profile, "out_dir": str(out / path.stem)}, parameters or {})

    out.mkdir(parents=True, exist_ok=True)
    failure = None  # raised outside the except blocks, so that one traceback is printed and not a chain of three
    with _kernel_environment():
        try:
            papermill.execute_notebook(
                path,
                executed,
                passed,
                kernel_name="python3",  # the kernel of the Python that runs this file, whatever name is stored
                language=source.metadata.get("kernelspec", {}).get("language", "python"),
                cwd=path.parent,
                progress_bar=progress,
                start_timeout=60,
                execution_timeout=cell_seconds or CELL_SECONDS[profile],
                extra_arguments=["--log-level=40"],  # no warning about unencrypted loopback connections per kernel
                store_widget_state=False,  # with a stored state, HTML shows no picture where there is no front end
            )
        except PapermillExecutionError as error:
            tail = ANSI.sub("", "\n".join(error.traceback)).splitlines()[-TAIL:]
            failure = _failure(path, error.source, f"{error.ename}: {error.evalue}", tail)
        except CellTimeoutError:
            limit = cell_seconds or CELL_SECONDS[profile]
            failure = _failure(path, _last_started(executed), f"ran longer than the limit of {limit:g} s")
        except DeadKernelError:
            failure = _failure(path, _last_started(executed), "the kernel died (out of memory?)")
        except Exception as error:  # the kernel is not there or does not start, the disk is full, ...
            failure = NotebookError(f"{path.name}: {type(error).__name__}: {error}")
    if failure:
        raise failure
    write_page(executed)
    return executed


def _parameters(path: Path, standard: dict, explicit: dict) -> dict:
    declared = papermill.inspect_notebook(path)
    for name in explicit:
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(declared) or 'none'}"
            raise ParameterError(f"{path.name}: no parameter '{name}'; {hint}")
    return {name: value for name, value in standard.items() if name in declared} | explicit


@contextlib.contextmanager
def _kernel_environment() -> Iterator[None]:
    """Kernels inherit this process's environment: make them independent of what else the user has installed or set."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="mfdiff_kernel_", ignore_cleanup_errors=True) as private:
        os.environ.update(
            JUPYTER_PREFER_ENV_PATH="1",  # this environment's kernel "python3", not one in the home folder
            JUPYTER_RUNTIME_DIR=private,  # the home folder may be read-only
            IPYTHONDIR=private,  # no start-up files of the user's; no history shared by parallel kernels
            PYDEVD_DISABLE_FILE_VALIDATION="1",
        )
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.pop("MPLBACKEND", None)  # figures must go into the notebook
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _failure(path: Path, source: str, what: str, tail: list[str] | None = None) -> NotebookError:
    first = next((line.strip() for line in source.splitlines() if line.strip()), "")
    return NotebookError(f"{path.name}, cell '{first[:80]}': {what}", "\n".join(tail or []))


def _last_started(executed: Path) -> str:
    """Source of the cell that was running: in the end papermill calls every cell completed, but only these began."""
    if not executed.exists():
        return ""
    cells = nbformat.read(executed, as_version=4).cells
    begun = [c.source for c in cells if c.cell_type == "code" and c.metadata.get("papermill", {}).get("start_time")]
    return begun[-1] if begun else ""


class _Renderer(IPythonRenderer):
    """Formulas as MathML, which needs no script that a page would fetch from elsewhere."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    multiline_math = block_math


def write_page(executed: Path) -> Path:
    """NAME.html beside an executed notebook, to be read without a network; widgets are shown by their still picture."""

    @pass_context
    def markdown(context, source: str) -> str:
        # Attachments are embedded anyway; `embed_images` would close every <details> at once.
        attached = context.get("cell", {}).get("attachments", {})
        return MarkdownWithMath(renderer=_Renderer(escape=False, attachments=attached)).render(source)

    exporter = HTMLExporter(
        filters={"markdown2html": markdown},
        raw_template=TEMPLATE,
        **{f"{script}_url": "" for script in ("require_js", "jquery", "mathjax")},
    )
    notebook = nbformat.read(executed, as_version=4)
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})  # of a progress bar, the last state
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:  # a widget without a still picture would be shown by its name
        shown = [o for o in cell.get("outputs", []) if set(o.get("data", {})) != {WIDGET, "text/plain"}]
        cell.update({"outputs": shown} if cell.cell_type == "code" else {})
    page, _ = exporter.from_notebook_node(notebook)
    written = executed.with_suffix(".html")
    page = SCRIPT.sub(lambda script: "" if FETCHES.search(script[0]) else script[0], page)
    written.write_text(page, encoding="utf-8")
    return written


def _parse(assignments: list[str]) -> dict:
    """`name=value` pairs; a value that is a Python literal is taken as such, any other as text."""
    parsed = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"expected name=value, found '{assignment}'", param_hint="-p")
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = text
    return parsed


def _attempt(path: Path, out: Path, profile: str, parameters: dict, cell_seconds: float | None, alone: bool) -> tuple:
    """Run one notebook: seconds, page or None, complaint, detail. Beside others it gets one thread."""
    if not alone:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    begin = time.monotonic()
    try:
        executed = run_notebook(path, out, profile, parameters, cell_seconds, alone and sys.stderr.isatty())
    except NotebookError as error:
        return time.monotonic() - begin, None, str(error), error.detail
    return time.monotonic() - begin, executed.with_suffix(".html"), "", ""


def _attempts(notebooks: list[Path], jobs: int, *settings) -> Iterator[tuple[Path, tuple]]:
    """Each notebook with the result of its attempt, in the order in which they end."""
    if jobs == 1:
        for path in notebooks:
            yield path, _attempt(path, *settings, True)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_attempt, path, *settings, False): path for path in notebooks}
        for done in as_completed(running):
            yield running[done], done.result()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: list[str] | None = typer.Argument(None, help="Notebooks to run; all when none is named."),
    profile: str = typer.Option("smoke", help=f"Size of the run: {', '.join(CELL_SECONDS)}."),
    out: Path = typer.Option(Path("runs/notebooks"), help="Folder for executed copies, HTML and results."),
    parameter: list[str] | None = typer.Option(None, "--parameter", "-p", help="Another parameter, as name=value."),
    cell_seconds: float | None = typer.Option(None, help="Time limit of one cell; default depends on the profile."),
    jobs: int | None = typer.Option(None, min=1, help="Notebooks at a time; default: one a core, with gpu one."),
    page: Path | None = typer.Option(None, exists=True, dir_okay=False, help="Run nothing; make the page of this one."),
) -> None:
    """Run notebooks headlessly; write executed copies and HTML."""
    if page:
        typer.echo(str(write_page(page)))
        return
    if profile not in CELL_SECONDS:
        raise typer.BadParameter(f"'{profile}' is none of {', '.join(CELL_SECONDS)}", param_hint="--profile")
    parameters = _parse(parameter or [])
    try:
        notebooks = find_notebooks(names)
        for path in notebooks:
            _parameters(path, {}, parameters)
    except (FileNotFoundError, ParameterError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None

    jobs = min(len(notebooks), jobs or (1 if profile == "gpu" else os.cpu_count() or 1))
    what = notebooks[0].stem if len(notebooks) == 1 else f"{len(notebooks)} notebooks, {jobs} at a time"
    typer.echo(f"running {what}, profile {profile}")
    failed = 0
    for number, (path, (seconds, page, complaint, detail)) in enumerate(
        _attempts(notebooks, jobs, out, profile, parameters, cell_seconds), start=1
    ):
        if page is None:
            failed += 1
            typer.echo(f"FAILED {complaint}", err=True)
            if detail:
                typer.echo(detail, err=True)
        else:
            typer.echo(f"[{number}/{len(notebooks)}] {path.stem}: {seconds:.0f} s, {page}")
    if failed:
        typer.echo(f"{failed} of {len(notebooks)} notebooks failed", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
