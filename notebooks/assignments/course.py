"""Make the student copies of the assignments in this folder, and grade what students hand in.

    python notebooks/assignments/course.py build --out runs/course
    python notebooks/assignments/course.py grade SUBMISSIONS --out grades.csv
    python notebooks/assignments/course.py grade SUBMISSIONS 01_counts        only this one

SUBMISSIONS holds one folder per student with the notebooks in it. Student code runs with your rights and is NOT
sandboxed: grade in a container without network and without anything that you would miss (INSTRUCTOR.md).

A source NN_name.ipynb holds task, solution and checks. Tags: `exercise`, what students write in, the solution between
### BEGIN SOLUTION and ### END SOLUTION; `check`, whose first line says number, points and idea; `hidden`, the same
between ### BEGIN HIDDEN TESTS and ### END HIDDEN TESTS, right after a `check`, which students do not get; `look`, a
picture or table that needs their work.
"""

import copy
import csv
import os
import re
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import nbformat
import typer
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?### END SOLUTION[^\n]*$", re.DOTALL | re.MULTILINE)
MARKS = re.compile(r"^[ \t]*### (BEGIN|END) (SOLUTION|HIDDEN TESTS)[^\n]*\n?", re.MULTILINE)
CHECK = re.compile(r"# Check (\d+) \((\d+) points?\): (.+)")  # number, points, idea

os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # "python3" means the kernel of the Python that runs this
KERNEL = {
    "MPLBACKEND": "Agg",  # pictures are not graded, so they are not drawn
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


class BrokenEnvironment(Exception):
    """The course's own solution does not score full marks here, or an empty copy scores: nobody can be graded."""


def sources(names: list[str] | None = None) -> dict[str, NotebookNode]:
    """The assignments of this folder by name, in order, or those named. Raises FileNotFoundError."""
    known = {path.stem: path for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb"))}
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names or known]
    for name in wanted:
        if name not in known:
            raise FileNotFoundError(f"no assignment '{name}' in {HERE}; there are: {', '.join(known) or 'none'}")
    return {name: nbformat.read(known[name], as_version=4) for name in wanted}


def tagged(cell: NotebookNode, *tags: str) -> bool:
    """Whether a cell has one of the tags."""
    return bool(set(tags) & set(cell.metadata.get("tags", [])))


def student_copy(source: NotebookNode) -> NotebookNode:
    """The source without solutions and hidden checks."""
    notebook = copy.deepcopy(source)
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "hidden")]
    for cell in notebook.cells:
        if tagged(cell, "exercise"):
            cell.source = SOLUTION.sub(r'\1raise NotImplementedError("write this")', cell.source)
        if tagged(cell, "check"):
            cell.metadata |= {"editable": False, "deletable": False}
    return notebook


def solution_copy(source: NotebookNode) -> NotebookNode:
    """The source with solutions and all checks, without the marks."""
    notebook = copy.deepcopy(source)
    for cell in notebook.cells:
        cell.source = MARKS.sub("", cell.source).rstrip()
    return notebook


def assembled(source: NotebookNode, submission: NotebookNode) -> tuple[list, dict, list[str]]:
    """The code cells to run, in the student's order; the checks among them by number; notes on what was put back.

    Kept as handed in: exercise cells and cells of the student's own. Everything else is replaced by the original,
    known by its id, or a check by its first line where a tool has lost the ids. Hidden checks follow the check before
    them.
    """
    fixed = [cell for cell in source.cells if cell.cell_type == "code" and not tagged(cell, "exercise")]
    by_id = {cell.id: cell for cell in fixed}
    by_line = {first_line(cell): cell for cell in fixed if tagged(cell, "check", "hidden")}
    left = {number(cell): cell for cell in fixed if tagged(cell, "check", "hidden")}
    cells, checks, notes = [], {}, []

    def place(original: NotebookNode) -> None:
        cells.append(copy.deepcopy(original))
        if tagged(original, "check", "hidden"):
            checks[number(original)] = cells[-1]
            del left[number(original)]
            following = fixed[fixed.index(original) + 1 :]
            if following and tagged(following[0], "hidden"):
                place(following[0])

    for cell in (cell for cell in submission.cells if cell.cell_type == "code"):
        original = by_id.get(cell.get("id")) or by_line.get(first_line(cell))
        if original is None:
            cells.append(cell)
        elif not tagged(original, "check", "hidden"):
            place(original)
        elif tagged(original, "check") and number(original) in left:
            if cell.source.strip() != original.source.strip():
                notes.append(f"check {number(original)} had been changed, put back")
            place(original)
    while left:
        notes.append(f"check {min(left)} was missing, put back at the end")
        place(left[min(left)])
    return cells, checks, notes


def first_line(cell: NotebookNode) -> str:
    """First line of a cell: for a check its number, points and idea."""
    return cell.source.strip().partition("\n")[0]


def number(check: NotebookNode) -> int:
    """The number that a check has in its notebook."""
    return int(CHECK.match(check.source)[1])


def points(source: NotebookNode) -> dict[int, int]:
    """Number of each check -> its points."""
    checks = [cell for cell in source.cells if tagged(cell, "check", "hidden")]
    return {number(cell): int(CHECK.match(cell.source)[2]) for cell in checks}


def execute(cells: list[NotebookNode], seconds: float) -> list[str]:
    """Run cells in a kernel of their own and an empty folder, each for at most `seconds`; a note if it broke off."""
    with tempfile.TemporaryDirectory(prefix="mfdiff_grade_", ignore_cleanup_errors=True) as folder:
        client = NotebookClient(
            nbformat.v4.new_notebook(cells=cells),
            kernel_name="python3",
            timeout=seconds,
            interrupt_on_timeout=True,
            error_on_timeout={"ename": "TimeLimit"},  # or it would wait for ever for code that ignores the interrupt
            allow_errors=True,
            shutdown_kernel="immediate",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=40"],
        )
        with client.setup_kernel(env=os.environ | KERNEL | {"IPYTHONDIR": folder}):
            for index, cell in enumerate(cells):
                began = time.monotonic()
                try:
                    client.execute_cell(cell, index)
                except DeadKernelError:
                    return [f"the kernel died in cell '{first_line(cell)[:60]}'"]
                if time.monotonic() - began > seconds and not failure(cell, seconds):
                    return [f"cell '{first_line(cell)[:60]}' could not be stopped after {seconds:g} s"]
    return []


def failure(cell: NotebookNode, seconds: float) -> str:
    """The error of an executed cell in one line, "" without one."""
    error = next((output for output in cell.get("outputs", []) if output.output_type == "error"), None)
    if error is None:
        return ""
    what = f"stopped after {seconds:g} s" if error.ename == "KeyboardInterrupt" else f"{error.ename}: {error.evalue}"
    return " ".join(what.split())[:200]


def grade_notebook(source: NotebookNode, submission: NotebookNode, seconds: float) -> tuple[dict[int, int], list[str]]:
    """Points of each check, and notes: what was put back, which cells and checks failed and why."""
    cells, checks, notes = assembled(source, submission)
    passed = secrets.token_hex(8)  # only a check that runs to its last line prints what nobody knew beforehand
    for check in checks.values():
        check.source += f'\nprint("{passed}")'
    notes += execute(cells, seconds)
    scores, check_of = dict.fromkeys(points(source), 0), {id(cell): n for n, cell in checks.items()}
    for cell in cells:
        check, why = check_of.get(id(cell)), failure(cell, seconds)
        if check is None:
            notes += [f"cell '{first_line(cell)[:60]}': {why}"] if why else []
        elif any(passed in output.get("text", "") for output in cell.get("outputs", [])):
            scores[check] = points(source)[check]
        else:
            notes.append(f"check {check}: {why or 'did not run to its end'}")
    return scores, notes


def self_test(name: str, source: NotebookNode, seconds: float) -> None:
    """Raise BrokenEnvironment unless the solution scores full marks here and the empty student copy nothing."""
    for what, submission, wanted in (
        ("the solution", solution_copy(source), points(source)),
        ("an empty copy", student_copy(source), dict.fromkeys(points(source), 0)),
    ):
        scores, notes = grade_notebook(source, submission, seconds)
        if scores != wanted:
            found = f"scores {sum(scores.values())} of {sum(points(source).values())} points ({'; '.join(notes)})"
            raise BrokenEnvironment(f"{name}: {what} {found}. Nobody was graded; repair this first.")


def grade_folder(folder: Path, name: str, source: NotebookNode, seconds: float) -> tuple[dict[int, int], list[str]]:
    """Grade one student's NN_name.ipynb; a browser's "NN_name (1).ipynb" will do."""
    nothing = dict.fromkeys(points(source), 0)
    found = sorted(folder.glob(f"{name}*.ipynb"), key=lambda path: (path.stem != name, path.name))
    if not found:
        return nothing, [f"no {name}.ipynb"]
    try:
        submission = nbformat.read(found[0], as_version=4)
        nbformat.validate(submission)
    except Exception as error:  # anything may be in that file, and nbformat has no error of its own for most of it
        return nothing, [f"{found[0].name} is not a readable notebook ({type(error).__name__})"]
    scores, notes = grade_notebook(source, submission, seconds)
    return scores, notes + ([f"graded {found[0].name} of {len(found)} files"] if len(found) > 1 else [])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Student copies and grades.")


@app.command()
def build(
    out: Path = typer.Option(Path("runs/course"), help="Folder for student/, solution/ and autograder/."),
) -> None:
    """Write the student copies, the solutions and, as a copy of this folder, the autograder."""
    for part, made in (("student", student_copy), ("solution", solution_copy)):
        (out / part).mkdir(parents=True, exist_ok=True)
        for name, source in sources().items():
            nbformat.write(made(source), out / part / f"{name}.ipynb")
    shutil.copy(HERE / "STUDENT.md", out / "student" / "README.md")
    shutil.copytree(HERE, out / "autograder", ignore=shutil.ignore_patterns("[._]*"), dirs_exist_ok=True)
    typer.echo(f"{len(sources())} assignments in {out / 'student'}, {out / 'solution'}, {out / 'autograder'}")


@app.command()
def grade(
    submissions: Path = typer.Argument(..., exists=True, file_okay=False, help="One folder per student."),
    names: list[str] | None = typer.Argument(None, help="Assignments to grade; all when none is named."),
    out: Path = typer.Option(Path("grades.csv"), help="One row per student."),
    cell_seconds: float = typer.Option(60, help="Time limit of one cell."),
) -> None:
    """Grade a folder of submissions into a CSV, after a test that grading works here at all."""
    students = sorted(path for path in submissions.iterdir() if path.is_dir() and path.name[0] != ".")
    try:
        chosen = sources(names)
        if not students:
            raise FileNotFoundError(f"{submissions}: expected one folder per student, found none")
    except FileNotFoundError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    try:
        for name, source in chosen.items():
            self_test(name, source, cell_seconds)
            typer.echo(f"{name}: self-test passed")
    except BrokenEnvironment as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    columns = {(n, k): f"{n[:2]}.{k} (of {p})" for n, source in chosen.items() for k, p in points(source).items()}
    with out.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["student", *columns.values(), "total", "notes"])
        for student in students:
            graded = {name: grade_folder(student, name, source, cell_seconds) for name, source in chosen.items()}
            scores = [graded[name][0][check] for name, check in columns]
            notes = "; ".join(f"{name[:2]}: {note}" for name, (_, found) in graded.items() for note in found)
            table.writerow([student.name, *scores, sum(scores), notes])
            stream.flush()
            typer.echo(f"{student.name}: {sum(scores)}")


if __name__ == "__main__":
    app()
