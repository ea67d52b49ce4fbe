"""The assignments grade what they should, and the grader survives what students hand in."""

import ast
import copy
import csv
import functools
import importlib.util
import re
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks" / "assignments"


def script(name):
    spec = importlib.util.spec_from_file_location(f"assignments_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])  # mutants.py adds its folder
        spec.loader.exec_module(module)
    return module


course, mutants = script("course"), script("mutants")

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
    assert sum(course.points(source).values()) == 10 and "**Points** 10 for checks, 4 for answers" in head
    assert all(word in head for word in ("**You will**", "**Needs**", "**Time**"))
    for cell in graded:
        for node in (node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Assert)):
            assert node.msg, f"check {course.number(cell)} has an assertion without a hint: {ast.unparse(node)}"


@each
def test_questions_have_points_a_model_answer_and_a_rubric(name):
    source, asked = SOURCES[name], course.questions(SOURCES[name])
    answers = [cell for cell in source.cells if course.tagged(cell, "answer")]
    assert list(asked) == list(range(1, len(answers) + 1)) and sum(worth for worth, _ in asked.values()) == 4
    for cell in answers:
        assert course.QUESTION.match(source.cells[source.cells.index(cell) - 1].source)
        assert course.SOLUTION.fullmatch(cell.source) and "point" in cell.source
    student = course.student_copy(source)
    assert [cell.source for cell in student.cells if course.tagged(cell, "answer")] == [course.UNANSWERED] * len(
        answers
    )
    assert set(course.answers(source, student).values()) == {""}


@each
def test_the_notebooks_that_an_assignment_needs_teach_it(name):
    """Each course notebook that the head names is there; together they use every name that the assignment imports."""
    needs = re.search(r"\*\*Needs\*\*(.*?)\*\*Time", SOURCES[name].cells[0].source, re.DOTALL)[1]
    numbers = set()
    for first, last in re.findall(r"\b(\d\d)(?: to (\d\d))?", needs):
        numbers |= set(range(int(first), int(last or first) + 1))
    texts = [next((ROOT / "notebooks").glob(f"{number:02d}_*.ipynb")).read_text(encoding="utf-8") for number in numbers]
    nodes = list(ast.walk(ast.parse(SOURCES[name].cells[1].source)))
    used = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mfdiff_lite")
        for alias in node.names
    }
    taught = {word for word in used if any(word in text for text in texts)}
    explained = {"residual_sd", "lesion_contrast", "mr_guided", "tune"}  # by the assignment's own text
    assert numbers and used - taught <= explained, used - taught


def shape(node):
    """A syntax tree as text, whatever its variables and numbers are called; what is called keeps its name."""
    node = copy.deepcopy(node)
    called = {id(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and id(inner) not in called:
            inner.id = "_"
        if isinstance(inner, ast.Constant):
            inner.value = 0
        if isinstance(inner, ast.arg):
            inner.arg = "_"
    return ast.dump(node).replace("Constant(value=0)", "Name(id='_', ctx=Load())")


def expressions(code):
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.expr)]


def telling(exercise):
    """What of an exercise's solution must stand in no other cell: the whole value of a statement unless it is a word
    or two, and every larger piece of one. A call of a function of the exercise with its plain arguments tells nothing.
    """
    found = {}
    for match in course.SOLUTION.finditer(exercise):
        block = textwrap.dedent(course.MARKS.sub("", match[0]))
        tree = ast.parse(f"def f():\n{textwrap.indent(block, '    ')}")
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.comprehension)]
        whole = {id(getattr(node, part, None)) for node in statements for part in ("value", "iter")}
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.expr)):
            size = sum(isinstance(inner, ast.expr | ast.comprehension) for inner in ast.walk(node))
            plain = isinstance(node, ast.Call) and all(isinstance(part, ast.Name) for part in (node.func, *node.args))
            if not plain and size >= (4 if id(node) in whole and not isinstance(node, ast.Attribute) else 7):
                found[shape(node)] = ast.unparse(node)
    return found


def leaks(source, *more):
    """Pieces of solutions that stand in cells that students get, or in `more`."""
    cells = [c for c in course.student_copy(source).cells if c.cell_type == "code" and not course.tagged(c, "exercise")]
    shown = {shape(node) for code in (*(cell.source for cell in cells), *more) for node in expressions(code)}
    secret = [telling(cell.source) for cell in source.cells if course.tagged(cell, "exercise")]
    found = {text for one in secret for form, text in one.items() if form in shown}
    return sorted(found - {"np.random.default_rng(seed)"})  # how every random number begins


@each
def test_student_copy_holds_no_solution_and_no_hidden_check(name):
    copied = course.student_copy(SOURCES[name])
    assert not MARK.search(nbformat.writes(copied))
    assert not any(course.tagged(cell, "hidden") for cell in copied.cells)
    assert not leaks(SOURCES[name])
    assert course.UNWRITTEN in nbformat.writes(copied).replace('\\"', '"')


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("01_counts", "part, apart = rng.binomial(full, 1 / drf), rng.binomial(other, 1 / drf)"),
        ("03_ddim", "for here, there in zip(a[:-1], a[1:], strict=True): way.append(here)"),
        ("05_shift", "a, b = (scanner.reconstruct(half) for half in low.split(7))"),
    ],
)
def test_a_solution_in_other_words_is_noticed(name, line):
    assert leaks(SOURCES[name], line)


@each
def test_a_check_in_the_student_copy_is_the_same_check(name, capsys):
    for cell in (cell for cell in SOURCES[name].cells if course.tagged(cell, "check")):
        (wrapped,) = ast.parse(course.with_verdict(cell)).body
        assert [ast.dump(node) for node in wrapped.body] == [ast.dump(node) for node in ast.parse(cell.source).body]


def test_a_check_prints_one_line(tiny, capsys):
    code = course.with_verdict(tiny.cells[2])
    for answer, line in ((2, "Check 1 passed: 1 point"), (3, "Check 1, not yet: expected 2, found 3")):
        exec(code, {"double": lambda x, answer=answer: answer * x})
        assert capsys.readouterr().out == f"{line}\n"
    with pytest.raises(ZeroDivisionError):  # an error of the student's own keeps its traceback
        exec(code, {"double": lambda x: 1 / 0})


# What the checks are worth


@functools.cache
def bench(name):
    return mutants.Bench(name)


@pytest.mark.parametrize("one", mutants.MUTANTS, ids=lambda one: one.name)
def test_a_wrong_solution_loses_points(one):
    assert one.lost and set(bench(one.assignment).failed(one.changes, one.lost)) == one.lost


@pytest.mark.parametrize("one", mutants.UNUSUAL, ids=lambda one: one.name)
def test_a_right_but_unusual_solution_scores_full(one):
    assert bench(one.assignment).failed(one.changes) == {}


def test_every_assignment_and_every_check_has_its_wrong_solutions():
    for name in SOURCES:
        wrong = [one for one in mutants.MUTANTS if one.assignment == name]
        assert len(wrong) >= 5 and sum(one.assignment == name for one in mutants.UNUSUAL) >= 1, name
        missed = {
            number: cell for number, cell in bench(name).checks.items() if not any(number in one.lost for one in wrong)
        }
        assert len(missed) <= 1, (name, list(missed))
    assert len({one.name for one in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 30


def test_a_mutant_that_changes_nothing_is_refused():
    with pytest.raises(ValueError, match="expected 'nowhere' once"):
        bench("03_ddim").failed({"nowhere": "x"})


def test_assignments_are_numbered_and_not_taken_for_course_notebooks():
    assert [name[:3] for name in SOURCES] == [f"{number:02d}_" for number in range(1, len(SOURCES) + 1)]
    assert not set(SOURCES) & {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_build_writes_three_folders(tmp_path):
    done = CliRunner().invoke(course.app, ["build", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {path.stem for path in (tmp_path / "student").glob("*.ipynb")} == set(SOURCES)
    assert not MARK.search((tmp_path / "solution/02_gate.ipynb").read_text(encoding="utf-8"))
    assert (tmp_path / "autograder/course.py").is_file()
    assert {"README.md", "PROJECT.md", "course.py"} < {path.name for path in (tmp_path / "student").iterdir()}
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
        ("check", "# Check 3 (4 points): three\nassert triple(1) == math.floor(3.5), 'three times one is three'"),
        ("question", "**Question 1 (2 points).** Why is zero doubled zero?"),
        ("answer", "### BEGIN SOLUTION\nNothing twice is nothing.\n- 2 points: says so.\n### END SOLUTION"),
    ]
    notebook = new.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for number, (tag, text) in enumerate(cells):
        make = new.new_markdown_cell if tag in ("question", "answer") else new.new_code_cell
        notebook.cells.append(make(text, id=f"tiny-{number}", metadata={"tags": [tag]}))
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
        "half": handed_in(tiny, tiny_1=wrong, tiny_7="<b>bold</b> & short"),
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
    assert header == ["student", "00.1 (of 1)", "00.2 (of 2)", "00.3 (of 4)", "total", "00.Q1 (of 2)", "notes"]
    scores = {name: [int(score) for score in scores] for name, *scores, _, _ in rows}
    assert {mark for *_, mark, _ in rows} == {""}, "a mark that a person gives"
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
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "grades-feedback").iterdir()}
    assert set(pages) == set(students) | {"unreadable", "no notebook", "missing"}
    assert "5 of 7 points for checks" in pages["half"] and "<td>0 of 2</td>" in pages["half"]
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; short" in pages["half"] and "___ of 2" in pages["half"]
    for text in pages.values():
        assert "zero" not in text and "double(0)" not in text and "check 2" not in text.lower(), "a hidden check told"
        assert "http" not in text and "<script" not in text
    collected = (tmp_path / "grades-answers.html").read_text(encoding="utf-8")
    assert "Why is zero doubled zero?" in collected and "Nothing twice is nothing." in collected
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; short" in collected and "<b>bold" not in collected


@pytest.mark.notebook
def test_a_student_is_told_whether_a_file_is_ready(tiny, tmp_path):
    def asked(notebook, name="00_tiny.ipynb"):
        nbformat.write(notebook, tmp_path / name)
        done = CliRunner().invoke(course.app, ["ready", str(tmp_path / name), "--cell-seconds", "5"])
        return done.exit_code, done.stdout

    fresh = course.student_copy(tiny)
    code, said = asked(fresh)
    assert code == 0 and said.startswith("00_tiny.ipynb: ready\n"), said
    for line in ("Exercise 1: not written", "Exercise 2: not written", "answers: 1 of 1", "Check 1, not yet"):
        assert line in said
    done = copy.deepcopy(fresh)
    done.cells[1].source, done.cells[3].source = "def double(x):\n    return 2 * x", "def triple(x):\n    return 3 * x"
    done.cells[-1].source = "Nothing twice is nothing."
    assert asked(done) == (0, "00_tiny.ipynb: ready, and all that you see is done\n")
    assert "expected the name 00_tiny.ipynb" in asked(done, "tiny.ipynb")[1]
    for cell, text, line in (
        (2, "# Check 1 (1 point): two\npass", "check 1: changed"),
        (2, "pass", "check 1: missing"),
        (1, "while True:\n    pass", "stopped after 5 s; make it shorter"),
    ):
        broken = copy.deepcopy(done)
        broken.cells[cell].source = text
        code, said = asked(broken)
        assert code == 1 and line in said and "cannot be handed in yet" in said, said
    (tmp_path / "00_tiny.ipynb").write_text("{", encoding="utf-8")
    result = CliRunner().invoke(course.app, ["ready", str(tmp_path / "00_tiny.ipynb")])
    assert result.exit_code == 1 and "expected a notebook" in result.stdout


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


def test_the_instructors_table_counts_what_is_there():
    rows = (FOLDER / "INSTRUCTOR.md").read_text(encoding="utf-8")
    for name, source in SOURCES.items():
        texts = [c for c in source.cells if c.cell_type == "markdown" and not course.tagged(c, "answer")]
        blocks = [
            m[0] for c in source.cells if course.tagged(c, "exercise") for m in course.SOLUTION.finditer(c.source)
        ]
        lines = [line for block in blocks for line in course.MARKS.sub("", block).splitlines() if line.strip()]
        words = sum(len(cell.source.split()) for cell in texts)
        (row,) = re.findall(rf"^\| `{name}` \|.*", rows, re.MULTILINE)
        assert f"| {words} | {len(lines)} |" in row, f"{name}: {words} words, {len(lines)} lines"
