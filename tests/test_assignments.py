"""The assignments grade what they should, and the grader survives what students hand in."""

import ast
import copy
import csv
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks" / "assignments"

_spec = importlib.util.spec_from_file_location("assignments_course", FOLDER / "course.py")
course = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(course)

SOURCES = course.sources()
SECONDS = 200  # generous: the tests share two cores with others
each = pytest.mark.parametrize("name", SOURCES)
MARK = re.compile("### (BEGIN|END) (SOLUTION|HIDDEN TESTS)")


def grade(name, submission):
    return course.grade_notebook(SOURCES[name], submission, SECONDS)


# The sources


@each
def test_source_keeps_the_rules(name):
    source = SOURCES[name]
    code = [cell for cell in source.cells if cell.cell_type == "code"]
    kinds = [
        [t for t in cell.metadata.get("tags", []) if t in ("exercise", "check", "hidden", "look")] for cell in code
    ]
    graded = [cell for cell in code if course.tagged(cell, "check", "hidden")]
    assert source.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are stored"
    assert [cell.id for cell in source.cells] == [f"{name}-{i:02d}" for i in range(len(source.cells))], (
        "ids: NAME-00, ..."
    )
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code[0].source).body)
    assert max(map(len, kinds)) == 1
    for cell in code:
        ast.parse(cell.source)
        assert (
            course.tagged(cell, "exercise")
            == ("BEGIN SOLUTION" in cell.source)
            == cell.source.startswith("# Exercise ")
        )
        assert course.tagged(cell, "hidden") == ("BEGIN HIDDEN TESTS" in cell.source)
        assert (cell in graded) == bool(course.CHECK.match(cell.source))
    for before, kind in zip(kinds[:-1], kinds[1:], strict=True):
        assert kind != ["hidden"] or before in (["check"], ["hidden"]), "a hidden check follows a check"
    assert [course.number(cell) for cell in graded] == list(range(1, len(graded) + 1))
    head = source.cells[0].source
    assert sum(course.points(source).values()) == 10 and "**Points** 10" in head
    assert all(word in head for word in ("**You will**", "**Needs**", "**Time**"))


@each
def test_student_copy_holds_no_solution_and_no_hidden_check(name):
    student = nbformat.writes(course.student_copy(SOURCES[name]))
    assert not MARK.search(student)
    withheld = [cell.source for cell in SOURCES[name].cells if course.tagged(cell, "hidden")]
    for cell in SOURCES[name].cells:
        withheld += [match[0] for match in course.SOLUTION.finditer(cell.source) if course.tagged(cell, "exercise")]
    shown = {line.strip() for cell in course.student_copy(SOURCES[name]).cells for line in cell.source.splitlines()}
    lines = {line.strip() for text in withheld for line in text.splitlines() if len(line.strip()) > 24}
    # A hidden check may begin like a public one; what it asserts must not be public.
    assert not {line for line in lines & shown if "assert" in line or "return" in line}
    assert "raise NotImplementedError" in student


def test_assignments_are_numbered_and_not_taken_for_course_notebooks():
    assert [name[:3] for name in SOURCES] == [f"{number:02d}_" for number in range(1, len(SOURCES) + 1)]
    assert not set(SOURCES) & {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_build_writes_three_folders(tmp_path):
    done = CliRunner().invoke(course.app, ["build", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {path.stem for path in (tmp_path / "student").glob("*.ipynb")} == set(SOURCES)
    assert not MARK.search((tmp_path / "solution/02_gate.ipynb").read_text(encoding="utf-8"))
    assert (tmp_path / "autograder/course.py").is_file()
    student = nbformat.read(tmp_path / "student/02_gate.ipynb", as_version=4)
    nbformat.validate(student)
    assert all(cell.metadata.deletable is False for cell in student.cells if course.tagged(cell, "check"))


@pytest.mark.notebook
@each
def test_the_solution_scores_full_marks(name):
    scores, notes = grade(name, course.solution_copy(SOURCES[name]))
    assert (scores, notes) == (course.points(SOURCES[name]), [])


@pytest.mark.notebook
@each
def test_an_empty_copy_scores_nothing_and_fails_in_the_right_cells(name):
    scores, notes = grade(name, course.student_copy(SOURCES[name]))
    assert not any(scores.values())
    looks = [course.first_line(cell)[:60] for cell in SOURCES[name].cells if course.tagged(cell, "look")]
    wanted = [f"check {n}: " for n in scores] + [f"cell '{line}': " for line in looks]
    assert sorted(notes) == sorted(f"{where}NotImplementedError: write this" for where in wanted)


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("name", "right", "wrong", "lost"),
    [
        ("01_counts", "rng.binomial(counts, 1 / dose_reduction)", "np.rint(counts / dose_reduction)", {1, 2, 3}),
        ("02_gate", "channels, 1, bias=False", "channels, 1", {6}),
        ("03_ddim", "a * xt - b * v, b * xt + a * v", "(xt - b * v) / a, b * xt + a * v", {4, 5, 6, 7, 9}),
        ("05_shift", "sinogram.split(seed)", "(sinogram.thin(2, seed), sinogram.thin(2, seed + 1))", {2}),
    ],
)
def test_a_typical_mistake_loses_the_right_points(name, right, wrong, lost):
    submission = course.solution_copy(SOURCES[name])
    assert sum(cell.source.count(right) for cell in submission.cells) == 1
    for cell in submission.cells:
        cell.source = cell.source.replace(right, wrong)
    scores, notes = grade(name, submission)
    assert {number for number, points in course.points(SOURCES[name]).items() if scores[number] < points} == lost, notes


# The grader, on a made-up assignment that needs nothing but Python


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with one source, 00_tiny: checks 1 and 2 (hidden) of `double`, check 3 of `triple`."""
    new, folder = nbformat.v4, tmp_path / "sources"
    exercise = "# Exercise {}\ndef {}(x):\n    ### BEGIN SOLUTION\n    return {} * x\n    ### END SOLUTION"
    hidden = "# Check 2 (2 points): zero\n### BEGIN HIDDEN TESTS\nassert double(0) == 0\n### END HIDDEN TESTS"
    cells = [
        ("given", "import math"),
        ("exercise", exercise.format(1, "double", 2)),
        ("check", "# Check 1 (1 point): two\nassert double(1) == 2, f'expected 2, found {double(1)}'"),
        ("hidden", hidden),
        ("exercise", exercise.format(2, "triple", 3)),
        ("check", "# Check 3 (4 points): three\nassert triple(1) == math.floor(3.5)"),
    ]
    notebook = new.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for number, (tag, text) in enumerate(cells):
        notebook.cells.append(new.new_code_cell(text, id=f"tiny-{number}", metadata={"tags": [tag]}))
    folder.mkdir()
    nbformat.write(notebook, folder / "00_tiny.ipynb")
    monkeypatch.setattr(course, "HERE", folder)
    return course.sources()["00_tiny"]


def handed_in(source, **changes):
    """The solution, with the sources of single cells changed: {index: text}, None deletes the cell."""
    notebook = course.solution_copy(source)
    notebook.cells = [cell for cell in notebook.cells if not course.tagged(cell, "hidden")]
    for cell_id, text in changes.items():
        (cell,) = [cell for cell in notebook.cells if cell.id == cell_id.replace("_", "-")]
        cell.source = text or ""
        if text is None:
            notebook.cells.remove(cell)
    return notebook


@pytest.mark.notebook
def test_a_folder_becomes_a_table(tiny, tmp_path):
    submissions, out = tmp_path / "submissions", tmp_path / "grades.csv"
    wrong, without_ids, twice = "def double(x):\n    return 2", handed_in(tiny), handed_in(tiny)
    for cell in without_ids.cells:
        cell.id = f"new-{cell.id}"
    twice.cells.insert(3, copy.deepcopy(twice.cells[2]))
    twice.cells[3].id = "copied"
    students = {
        "all right": handed_in(tiny),
        "copied a check": twice,
        "ids lost": without_ids,
        "half": handed_in(tiny, tiny_1=wrong),
        "tampered": handed_in(tiny, tiny_1=wrong, tiny_2="# Check 1 (1 point): two\npass", tiny_5=None),
        "syntax": handed_in(tiny, tiny_4="def triple(x)\n    return 3 * x"),
        "quits": handed_in(tiny, tiny_4="def triple(x):\n    raise SystemExit"),
        "dies": handed_in(tiny, tiny_4="import os\nos._exit(1)"),
    }
    for name, notebook in students.items():
        (submissions / name).mkdir(parents=True)
        nbformat.write(notebook, submissions / name / "00_tiny.ipynb")
    (submissions / "half/00_tiny.ipynb").rename(submissions / "half/00_tiny (1).ipynb")  # as a browser names it
    for name, text in (("unreadable", "{"), ("no notebook", "[]")):
        (submissions / name).mkdir()
        (submissions / name / "00_tiny.ipynb").write_text(text, encoding="utf-8")
    (submissions / "missing").mkdir()
    done = CliRunner().invoke(course.app, ["grade", str(submissions), "--out", str(out), "--cell-seconds", "60"])
    assert done.exit_code == 0, done.output
    with out.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["student", "00.1 (of 1)", "00.2 (of 2)", "00.3 (of 4)", "total", "notes"]
    scores = {name: [int(score) for score in scores] for name, *scores, _ in rows}
    notes = {name: note for name, *_, note in rows}
    full = [1, 2, 4, 7]
    assert scores == {
        **{"all right": full, "copied a check": full, "ids lost": full, "half": [1, 0, 4, 5], "tampered": [1, 0, 4, 5]},
        **{"syntax": [1, 2, 0, 3], "quits": [1, 2, 0, 3], "dies": [1, 2, 0, 3]},
        **{"unreadable": [0] * 4, "no notebook": [0] * 4, "missing": [0] * 4},
    }
    assert not notes["all right"] and not notes["ids lost"]
    assert "check 1 had been changed, put back" in notes["tampered"]
    assert "check 3 was missing, put back at the end" in notes["tampered"]
    assert "SyntaxError" in notes["syntax"] and "check 3: NameError" in notes["syntax"]
    assert "check 3: SystemExit" in notes["quits"]
    assert "the kernel died in cell 'import os'" in notes["dies"]
    assert notes["missing"] == "00: no 00_tiny.ipynb"
    assert "not a readable notebook" in notes["unreadable"] and "not a readable notebook" in notes["no notebook"]


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("loop", "scores", "note"),
    [
        ("while True:\n    pass", {1: 1, 2: 2, 3: 0}, "cell 'while True:': stopped after 4 s"),
        ("def triple(x):\n    while True:\n        pass", {1: 1, 2: 2, 3: 0}, "check 3: stopped after 4 s"),
        (
            "while True:\n    try:\n        pass\n    except BaseException:\n        pass\n"
            "    import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
            {1: 1, 2: 2, 3: 0},
            "could not be stopped after 4 s",
        ),
    ],
    ids=["cell", "function", "stubborn"],
)
def test_an_endless_loop_is_stopped_and_the_rest_is_graded(tiny, loop, scores, note):
    found, notes = course.grade_notebook(tiny, handed_in(tiny, tiny_4=loop), 4)
    assert found == scores
    assert note in "; ".join(notes)


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("index", "text", "sentence"),
    [
        (2, "# Check 1 (1 point): two\nassert double(1) == 3", "the solution scores 6 of 7 points"),
        (5, "# Check 3 (4 points): three", "an empty copy scores 4 of 7 points"),
    ],
)
def test_nobody_is_graded_where_the_course_itself_fails(tiny, tmp_path, index, text, sentence):
    tiny.cells[index].source = text
    nbformat.write(tiny, course.HERE / "00_tiny.ipynb")
    (tmp_path / "submissions/somebody").mkdir(parents=True)
    out = tmp_path / "grades.csv"
    done = CliRunner().invoke(course.app, ["grade", str(tmp_path / "submissions"), "--out", str(out)])
    assert done.exit_code == 1
    assert sentence in done.output
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["05_nowhere"], []], ids=["unknown assignment", "no students"])
def test_bad_usage_ends_with_a_sentence(arguments, tmp_path):
    done = CliRunner().invoke(course.app, ["grade", str(tmp_path), *arguments])
    assert done.exit_code == 2
    assert ("no assignment '05_nowhere'" if arguments else "expected one folder per student") in done.output
