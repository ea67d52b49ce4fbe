"""Make the student copies of the assignments in this folder, and grade what students hand in.

    python notebooks/assignments/course.py build --out runs/course
    python notebooks/assignments/course.py grade SUBMISSIONS --out grades.csv
    python notebooks/assignments/course.py grade SUBMISSIONS 01_counts        only this one
    python course.py ready 01_counts.ipynb        for students: can this file be handed in?

SUBMISSIONS holds one folder per student with the notebooks in it. Student code runs with your rights and is NOT
sandboxed: grade in a container without network and without anything that you would miss (INSTRUCTOR.md).

A source NN_name.ipynb holds task, solution and checks. Tags: `exercise`, what students write in, the solution between
### BEGIN SOLUTION and ### END SOLUTION; `check`, whose first line says number, points and idea; `hidden`, the same
between ### BEGIN HIDDEN TESTS and ### END HIDDEN TESTS, right after a `check`, which students do not get; `look`, a
picture or table that needs their work; `answer`, text in the place of a model answer with its rubric, for a person to
read; the question is the cell before.
"""

import copy
import csv
import hashlib
import html
import os
import re
import secrets
import shutil
import tempfile
import textwrap
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
QUESTION = re.compile(r"\*\*Question (\d+) \((\d+) points?\)\.\*\* (.+)", re.DOTALL)
UNWRITTEN = 'raise NotImplementedError("write this")'
UNANSWERED = "*Write your answer here.*"

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
    read = {name: nbformat.read(known[name], as_version=4) for name in wanted}
    for name, source in read.items():
        source.metadata["assignment"] = name
    return read


def tagged(cell: NotebookNode, *tags: str) -> bool:
    """Whether a cell has one of the tags."""
    return bool(set(tags) & set(cell.metadata.get("tags", [])))


def student_copy(source: NotebookNode) -> NotebookNode:
    """The source without solutions and hidden checks; its checks print their verdict, its metadata know them."""
    notebook = copy.deepcopy(source)
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "hidden")]
    for cell in notebook.cells:
        if tagged(cell, "exercise"):
            cell.source = SOLUTION.sub(rf"\1{UNWRITTEN}", cell.source)
        if tagged(cell, "answer"):
            cell.source = UNANSWERED
        if tagged(cell, "check"):
            cell.source = with_verdict(cell)
            cell.metadata |= {"editable": False, "deletable": False}
    checks = {str(number(cell)): digest(cell) for cell in notebook.cells if tagged(cell, "check")}
    notebook.metadata["checks"] = checks
    return notebook


def with_verdict(check: NotebookNode) -> str:
    """A check that prints one line: its points, or its hint without a traceback. Other errors are the student's own."""
    first, _, body = check.source.partition("\n")
    k, worth = CHECK.match(first).groups()[:2]
    return (
        f"{first}\ntry:\n{textwrap.indent(body, '    ')}\n"
        "except (AssertionError, NotImplementedError) as hint:\n"
        f'    print("Check {k}, not yet:", hint)\n'
        f'else:\n    print("Check {k} passed: {worth} point{"s" * (worth != "1")}")'
    )


def digest(cell: NotebookNode) -> str:
    """Fingerprint of a cell's source."""
    return hashlib.sha256(cell.source.strip().encode()).hexdigest()


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
            if cell.source.strip() not in (original.source.strip(), with_verdict(original)):
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


def questions(source: NotebookNode) -> dict[int, tuple[int, str]]:
    """Number of each question -> its points and text."""
    found = filter(None, (QUESTION.match(cell.source) for cell in source.cells if cell.cell_type == "markdown"))
    return {int(one[1]): (int(one[2]), one[3]) for one in found}


def answers(source: NotebookNode, submission: NotebookNode) -> dict[int, str]:
    """Number of each question -> what the student wrote, "" for nothing; known by id, else by tag and order."""
    wanted = [cell.id for cell in source.cells if tagged(cell, "answer")]
    there = {cell.get("id"): cell for cell in submission.cells}
    found = [there.get(one) for one in wanted]
    if None in found:
        marked = [cell for cell in submission.cells if tagged(cell, "answer")]
        found = marked if len(marked) == len(wanted) else found
    texts = ["" if cell is None else cell.source.replace(UNANSWERED, "").strip() for cell in found]
    return dict(zip(questions(source), texts, strict=True))


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


def grade_folder(
    folder: Path, name: str, source: NotebookNode, seconds: float
) -> tuple[dict[int, int], list[str], dict[int, str]]:
    """Grade one student's NN_name.ipynb: points, notes, answers. A browser's "NN_name (1).ipynb" will do."""
    nothing, silent = dict.fromkeys(points(source), 0), dict.fromkeys(questions(source), "")
    found = sorted(folder.glob(f"{name}*.ipynb"), key=lambda path: (path.stem != name, path.name))
    if not found:
        return nothing, [f"no {name}.ipynb"], silent
    try:
        submission = nbformat.read(found[0], as_version=4)
        nbformat.validate(submission)
    except Exception as error:  # anything may be in that file, and nbformat has no error of its own for most of it
        return nothing, [f"{found[0].name} is not a readable notebook ({type(error).__name__})"], silent
    scores, notes = grade_notebook(source, submission, seconds)
    notes += [f"graded {found[0].name} of {len(found)} files"] if len(found) > 1 else []
    return scores, notes, answers(source, submission)


STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
td { padding: .3rem 0; vertical-align: top; border-bottom: 1px solid #8886 }
td:nth-child(2) { white-space: nowrap; text-align: right; padding-left: 1rem }
blockquote { white-space: pre-wrap; border-left: 3px solid #8886; margin: .5rem 0; padding-left: 1rem }
"""


def page(title: str, body: list[str]) -> str:
    """A page of its own, with nothing to fetch."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    lines = ["<!DOCTYPE html>", f'<html lang="en"><head>{head}<style>{STYLE}</style></head><body>']
    return "\n".join([*lines, f"<h1>{html.escape(title)}</h1>", *body, "</body></html>", ""])


def feedback(name: str, source: NotebookNode, scores: dict, notes: list[str], written: dict[int, str]) -> list[str]:
    """One assignment on a student's page. Of hidden checks it gives the points alone."""
    told = {k: "" for k in scores}
    hidden = {number(cell): first_line(cell) for cell in source.cells if tagged(cell, "hidden")}
    others = []
    for note in notes:
        check = re.match(r"check (\d+): (?:AssertionError: )?(.*)", note, re.DOTALL)
        if check:
            told[int(check[1])] = check[2]
        else:
            for line in hidden.values():
                note = note.replace(line[:60], "a further check")
            others.append(note)
    worth, total = points(source), sum(scores.values())
    rows = [f"<h2>{html.escape(name)}: {total} of {sum(worth.values())} points for checks</h2>", "<table>"]
    for cell in (cell for cell in source.cells if tagged(cell, "check")):
        k, _, idea = CHECK.match(cell.source).groups()
        hint = told[int(k)].replace("NotImplementedError: write this", "not written yet")
        idea = html.escape(f"Check {k}: {idea}") + f"<br><em>{html.escape(hint)}</em>" * bool(hint)
        rows.append(f"<tr><td>{idea}</td><td>{scores[int(k)]} of {worth[int(k)]}</td></tr>")
    if hidden:
        reached = f"{sum(scores[k] for k in hidden)} of {sum(worth[k] for k in hidden)}"
        rows.append(f"<tr><td>Further checks, of other numbers</td><td>{reached}</td></tr>")
    rows += ["</table>", *(f"<p>{html.escape(note)}</p>" for note in others)]
    for k, (worth_it, _) in questions(source).items():
        text = html.escape(written[k]) or "<em>no answer</em>"
        rows.append(f"<p>Question {k}, read by a person: ___ of {worth_it}</p><blockquote>{text}</blockquote>")
    return rows


def answers_page(chosen: dict[str, NotebookNode], students: dict[str, dict]) -> str:
    """For whoever marks: question by question, the rubric and then everybody's answer."""
    body = []
    for name, source in chosen.items():
        models = [MARKS.sub("", cell.source).strip() for cell in source.cells if tagged(cell, "answer")]
        for (k, (worth, text)), model in zip(questions(source).items(), models, strict=True):
            body.append(f"<h2>{html.escape(name)}, question {k} ({worth} points)</h2><p>{html.escape(text)}</p>")
            body.append("<details><summary>Model answer and rubric</summary>")
            body.append(f"<blockquote>{html.escape(model)}</blockquote></details>")
            for student, graded in students.items():
                answer = html.escape(graded[name][2][k]) or "<em>no answer</em>"
                body.append(f"<h3>{html.escape(student)}</h3><blockquote>{answer}</blockquote>")
    return page("Answers", body)


def inspect(path: Path, seconds: float) -> tuple[list[str], list[str]]:
    """What keeps a file from being handed in, and what is not done yet. Runs it in a kernel and folder of its own."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # as in grade_folder
        return [f"{path.name}: expected a notebook, found {type(error).__name__}; save it again in Jupyter"], []
    name, checks = notebook.metadata.get("assignment"), notebook.metadata.get("checks", {})
    if not name or not checks:
        return [f"{path.name}: expected a notebook of the course; copy your cells into a fresh one"], []
    stops = [] if path.stem == name else [f"{path.name}: expected the name {name}.ipynb; rename it"]
    there = {number(cell): digest(cell) for cell in notebook.cells if CHECK.match(cell.source)}
    for k, wanted in checks.items():
        if there.get(int(k)) != wanted:
            stops.append(f"check {k}: {'changed' if int(k) in there else 'missing'}; take it from a fresh copy")
    open_ends = [
        f"{first_line(cell)[2:]}: not written"
        for cell in notebook.cells
        if UNWRITTEN in cell.source and tagged(cell, "exercise")
    ]
    blank = [
        cell for cell in notebook.cells if tagged(cell, "answer") and not cell.source.replace(UNANSWERED, "").strip()
    ]
    open_ends += [f"answers: {len(blank)} of {sum(tagged(c, 'answer') for c in notebook.cells)} not written"] * bool(
        blank
    )
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stops += execute(cells, seconds)
    for cell in cells:
        said = "".join(output.get("text", "") for output in cell.get("outputs", [])).strip()
        why = failure(cell, seconds)
        if CHECK.match(cell.source):
            open_ends += (
                [] if f"Check {number(cell)} passed" in said else [why and f"check {number(cell)}: {why}" or said]
            )
        elif "stopped after" in why:
            stops.append(f"cell '{first_line(cell)[:60]}': {why}; make it shorter")
        elif why and UNWRITTEN[6:25] not in why:
            open_ends.append(f"cell '{first_line(cell)[:60]}': {why}")
    return stops, open_ends


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
    for name, called in (("STUDENT.md", "README.md"), ("PROJECT.md", "PROJECT.md"), ("course.py", "course.py")):
        shutil.copy(HERE / name, out / "student" / called)
    shutil.copytree(HERE, out / "autograder", ignore=shutil.ignore_patterns("[._]*"), dirs_exist_ok=True)
    typer.echo(f"{len(sources())} assignments in {out / 'student'}, {out / 'solution'}, {out / 'autograder'}")


@app.command()
def grade(
    submissions: Path = typer.Argument(..., exists=True, file_okay=False, help="One folder per student."),
    names: list[str] | None = typer.Argument(None, help="Assignments to grade; all when none is named."),
    out: Path = typer.Option(Path("grades.csv"), help="One row per student."),
    cell_seconds: float = typer.Option(60, help="Time limit of one cell."),
) -> None:
    """Grade a folder of submissions into a CSV, after a test that grading works here at all. Beside the CSV: a page of
    feedback for each student, and one with all answers to mark."""
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
    asked = [f"{n[:2]}.Q{k} (of {p})" for n, source in chosen.items() for k, (p, _) in questions(source).items()]
    beside, everybody = out.with_name(f"{out.stem}-feedback"), {}
    beside.mkdir(exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["student", *columns.values(), "total", *asked, "notes"])
        for student in students:
            graded = {name: grade_folder(student, name, source, cell_seconds) for name, source in chosen.items()}
            everybody[student.name] = graded
            scores = [graded[name][0][check] for name, check in columns]
            notes = "; ".join(f"{name[:2]}: {note}" for name, (_, found, _) in graded.items() for note in found)
            table.writerow([student.name, *scores, sum(scores), *[""] * len(asked), notes])
            stream.flush()
            body = [row for name, source in chosen.items() for row in feedback(name, source, *graded[name])]
            (beside / f"{student.name}.html").write_text(page(student.name, body), encoding="utf-8")
            typer.echo(f"{student.name}: {sum(scores)}")
    if asked:
        out.with_name(f"{out.stem}-answers.html").write_text(answers_page(chosen, everybody), encoding="utf-8")


@app.command()
def ready(
    files: list[Path] = typer.Argument(..., exists=True, dir_okay=False, help="Your notebooks."),
    cell_seconds: float = typer.Option(60, help="Time limit of one cell."),
) -> None:
    """For students: run a notebook from the top and say whether it can be handed in, and what is not done yet."""
    stopped = False
    for path in files:
        stops, open_ends = inspect(path, cell_seconds)
        stopped |= bool(stops)
        verdict = (
            "cannot be handed in yet" if stops else "ready" if open_ends else "ready, and all that you see is done"
        )
        typer.echo(f"{path.name}: {verdict}")
        for line in (*(f"repair {one}" for one in stops), *(f"open: {one}" for one in open_ends)):
            typer.echo(f"  {line}")
    raise typer.Exit(int(stopped))


if __name__ == "__main__":
    app()
