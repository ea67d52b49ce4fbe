"""What a reader of the notebooks meets: questions with answers, words before their use, sentences that ask values."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from latex2mathml.converter import convert
from safetensors import safe_open

from mfdiff_lite.evaluation import beside
from mfdiff_lite.model import load_pretrained, training_runs

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
ASSIGNMENTS = sorted((ROOT / "notebooks" / "assignments").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def course():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        others = {name: sys.modules.pop(name, None) for name in ("course", "results")}  # of the same names
        yield importlib.import_module("course")
    for name, other in others.items():
        sys.modules.pop(name, None)
        if other is not None:
            sys.modules[name] = other


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_questions_have_answers(course, path):
    cells = cells_of(path)
    found = course.questions(cells)
    assert 3 <= sum("".join(cell["source"]).startswith("> **Predict.**") for cell in cells) <= 5
    for question, answer in found:
        assert len(question) > 25 and len(answer) > 60, question


def test_every_mistake_of_08_is_a_card_before_it_is_measured():
    cells = cells_of(ROOT / "notebooks" / "08_evaluation.ipynb")
    first, last = (
        next(i for i, cell in enumerate(cells) if heading in "".join(cell["source"]))
        for heading in ("## 2. Spot the mistake", "## 3. ")
    )
    cards = [i for i in range(first, last) if "".join(cells[i]["source"]).startswith("> **Spot the mistake.**")]
    assert len(cards) == 8  # activity, ruler, SSIM, mask, scale, split, choice, noise
    assert all(cells[i + 1]["cell_type"] == "code" for i in cards)


def touched(code: str) -> set[str]:
    """Names that a program binds, stores into, or calls a method of that changes it."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.alias):
            names.add((getattr(node, "asname", None) or node.name).split(".")[0])
        changes = isinstance(node, ast.Attribute) and node.attr in (
            "append",
            "extend",
            "insert",
            "pop",
            "update",
            "setdefault",
        )
        if changes or isinstance(getattr(node, "ctx", None), ast.Store):
            while isinstance(node, ast.Attribute | ast.Subscript):
                node = node.value
            names |= {node.id} if isinstance(node, ast.Name) else set()
    return names


def taken_from(cells: list[dict], begins: str, ends: str) -> set[str]:
    """Names that the cells behind a part read as the part left them; `found` only collects."""
    codes, part = ["", "", ""], 0
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            part += (begins, ends, "\0")[part] in text
        else:
            codes[part] += "\n".join(line for line in text.splitlines() if line[:1] != "%") + "\n"
    assert part == 2 and len(touched(codes[1])) > 10
    left = touched(codes[0]) - touched(codes[1]) | {"found"}
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", "-"]
    program = " = ".join(sorted(left)) + " = None\n" + codes[2]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    return {complaint["message"].split("`")[1] for complaint in json.loads(done.stdout)}


@pytest.mark.parametrize(
    ("name", "begins", "ends"), [("06_stage2", "## 2. A toy", "## 3. "), ("08_evaluation", "## 2. Spot", "## 3. ")]
)
def test_a_part_of_its_own_can_be_left_out(name, begins, ends):
    assert not taken_from(cells_of(ROOT / "notebooks" / f"{name}.ipynb"), begins, ends)


@pytest.mark.parametrize(
    ("part", "behind", "taken"),
    [
        ("only = 1", "print(only)", {"only"}),
        ("only = 1", "print(only)\nonly = 2", {"only"}),  # set again, but too late
        ("only = 1", "only = 2\nprint(only)", set()),
        ("only = 1", "def f():\n    return only", {"only"}),
        ("only = 1", "print([only for only in before])", set()),
        ("before = 1", "print(before)", {"before"}),  # was there, and is another now
        ("before['a'] = 1", "print(before)", {"before"}),
        ("before[0].a |= 1", "print(before)", {"before"}),
        ("before.append(1)", "print(before)", {"before"}),
        ("found['a'] = before", "print(found, before)", set()),
        ("def only():\n    return 1", "only()", {"only"}),
        ("import a as only", "only.b()", {"only"}),
    ],
)
def test_a_cell_that_needs_the_part_is_noticed(part, behind, taken):
    heads = [{"cell_type": "markdown", "source": [text]} for text in ("## P", "## Q")]
    many = ";".join(f"own{i} = {i}" for i in range(11))
    before, part, behind = (
        {"cell_type": "code", "source": [code]} for code in ("before, found = {}, {}", f"{part}\n{many}", behind)
    )
    assert taken_from([before, heads[0], part, heads[1], behind], "## P", "## Q") == taken


@each_notebook
def test_the_exercise_has_a_worked_solution_in_python(course, path):
    codes = course.worked(cells_of(path))
    assert codes
    for code in codes:
        ast.parse(code)


@each_notebook
def test_head_and_next(path):
    """Reading time beside computing time, where words are explained, and a way on in the order of the course."""
    texts = ["".join(cell["source"]) for cell in cells_of(path)]
    assert re.search(r"\*\*Time\*\* reading about \d+ minutes", texts[0])
    assert "docs/glossary.md" in texts[0] and "docs/notation.md" in texts[0]
    later = NOTEBOOKS[NOTEBOOKS.index(path) + 1 :]
    if later:
        way = re.search(r"\]\((.*?)\)", texts[-1].split("## Next")[1])
        assert way[1] == later[0].name


@each_notebook
def test_links_of_the_notebooks_lead_somewhere(path):
    for cell in cells_of(path):
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)#\s:]+)\)", "".join(cell["source"])):
                assert (path.parent / target).exists(), target


def unreadable(text: str) -> list[str]:
    """Commands of formulas that MathML, which pages and book are made with, shows as they are written."""
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL), re.DOTALL)
    return [name for formula in formulas for name in re.findall(r"\\\w+", convert(formula.strip("$")))]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *ASSIGNMENTS], ids=lambda path: path.stem)
def test_formulas_are_readable(path):
    texts = ["".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "markdown"]
    assert not [name for text in texts for name in unreadable(text)]


def test_an_unreadable_formula_is_noticed():
    assert unreadable(r"a $\big\langle x \big\rangle$ b $$\nosuch{x}$$") == [r"\langle", r"\rangle", r"\nosuch"]
    assert not unreadable(r"a $\langle x \rangle$, `$\nosuch$` and $$\sqrt{\bar\alpha_t}$$")


@each_notebook
def test_plots_and_bookkeeping_are_folded(path):
    """An import, a plot of its own and what writes metrics.json carry the tag that the book and the pages fold."""
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    folded = ["hide-input" in cell["metadata"].get("tags", []) for cell in code]
    assert folded[0]
    assert not any("metrics.json" in "".join(c["source"]) and not f for c, f in zip(code, folded, strict=True))
    assert not all(folded[2:]), "the idea must be in sight"


def test_no_term_is_used_before_the_notebook_that_explains_it(course):
    assert not course.undefined()


def test_a_term_without_a_link_is_noticed(course, monkeypatch):
    early = {"cell_type": "markdown", "source": ["A warm start, and nothing else."]}
    monkeypatch.setattr(course, "course", lambda: {"00_a": [early], "03_diffusion": [early]})
    assert course.undefined() == ["warm start: 00_a, explained in 03"]
    monkeypatch.setattr(course, "course", lambda: {"00_a": [early | {"source": ["warm start ([03](03_d.ipynb))"]}]})
    assert not course.undefined()


# ---- sentences that follow values ----------------------------------------------------------------------------------


@each_notebook
def test_no_sentence_of_a_cell_compares_without_asking_the_value(course, path):
    found = [
        text for c in cells_of(path) if c["cell_type"] == "code" for text in course.hard_wired("".join(c["source"]))
    ]
    assert not found


def test_a_hard_wired_sentence_is_noticed(course):
    assert course.hard_wired('print(f"Ours is better by {gain} dB")')
    assert course.hard_wired(
        "show(fig, 'Two curves over the steps of training, and the second one of them falls much earlier')"
    )
    assert not course.hard_wired('print(f"Ours is {x}" + ("better" if x > 0 else "worse"))')
    assert not course.hard_wired('def conclude_x(gain):\n    return f"better by {gain}"')


def test_every_exception_is_still_needed(course):
    code = "\n".join("".join(c["source"]) for path in NOTEBOOKS for c in cells_of(path) if c["cell_type"] == "code")
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    assert not [start for start in course.ALLOWED if start.rstrip("{") not in joined]


CPU, GPU = {"torch": "2.6.0+cpu"}, {"torch": "2.6.0+cu124"}
BEST_OTHER = {("a", "another head"): 9, ("b", "another head"): 8, ("a", "same head"): 1}
KNOWN = {"beside": beside, "np": np, "n_samples": 4, "START": 0.9, "k": 3, "long": 30, "iterations": [1, 8]}
# function of a notebook: pairs of arguments and of words that its sentence must have
CONCLUSIONS = {
    "table": [
        (({"LPET": 7.0, "coarse": 0.01}, {"LPET": 1.0, "mean": 0.6}, "mean"), "did not change the PSNR"),
        (({"LPET": 7.0, "coarse": 0.4}, {"LPET": 0.5, "mean": 0.6}, "mean"), "PSNR better here"),
        (({"LPET": -7.0, "coarse": -0.4}, {"LPET": 1.0, "mean": 0.6}, "mean"), "PSNR worse here"),
    ],
    "contrast": [((0.45, 0.6, 0.4), "not converged"), ((0.45, 0.46, 0.6), "lost to the resolution")],
    "marks": [((28.0, 28.3, 16.0, 26.0), "no upper bound"), ((28.0, 25.0, 27.0, 26.0), "1.00 dB above the best LPET")],
    "fit": [
        ((0.98, 0.05), "tells the right MR"),
        ((0.98, 0.9), "does **not** tell"),
        ((0.3, 0.1), "does **not** tell"),
    ],
    "similarity": [((0.18, 0.14), "is firmer with"), ((0.14, 0.18), "**not** firmer")],
    "mr": [
        ((1.0, {"other": 0.1}), "Both halves of the promise"),
        ((1.0, {"other": -0.4, "shifted": 0.2}), "other harms: 0.40 dB below"),
        ((-0.2, {"other": 0.1}), "does **not** help"),
    ],
    "leak": [((0.01,), "a faint trace"), ((0.18,), "easily seen"), ((0.5,), "a false lesion")],
    "texture": [((1.1, 0.7), "sample is nearer"), ((1.5, 1.0), "mean is nearer")],
    "start": [
        ((0.69, 0.78, 0.99), "it *helps*"),
        ((0.78, 0.69, 0.99), "costs spread"),
        ((0.7, 0.7, 0.99), "no difference"),
    ],
    "steps": [(([-0.2, 0.0], [4, 200]), "few steps cost"), (([0.1, 0.0], [4, 200]), "do not cost")],
    "conditions": [
        (({("feature", "zeros"): [0.5, 0.1, 0.1], ("lpet", "zeros"): [0.01, 0.0, 0.0]}), "leans on F (up to 50%)"),
        (({("feature", "zeros"): [0.01, 0.0, 0.0], ("lpet", "zeros"): [0.5, 0.1, 0.1]}), "leans on the LPET"),
        (({("dose_reduction", "DRF 4"): [-0.01, 0.0, 0.0]}), "even better (the dose: DRF 4)"),
    ],
    "dose": [((-2.0, 5.0), "believes what"), ((-0.2, 5.0), "a little"), ((-0.01, 5.0), "hardly listens")],
    "parts": [
        (([1.0, 1.1, 0.9], [1.0, 0.9, 0.8]), "The rest gained more. On the way the smooth part got worse"),
        (([1.0, 0.9, 0.5], [1.0, 0.9, 0.8]), "The smooth part gained more. Neither"),
    ],
    "run": [
        (({"lpet": 15.9, "coarse": 25.2}, {"lpet": 12.6, "coarse": 23.2}), "do not compare"),
        (({"lpet": 15.9, "coarse": 25.2}, {"lpet": 15.9, "coarse": 25.5}), "0.30 dB above the run before"),
        (({"lpet": 15.9, "coarse": 25.2}, {"lpet": 15.9, "coarse": 25.1}), "0.10 dB below the run before"),
    ],
    "average": [(([0.1],), "was ahead"), (([-0.1],), "lagged behind"), (([0.0],), "No difference")],
    "gap": [
        ((0.5, 0.2, {"split": 0.25}), "`split` 50%"),
        ((0.05, 0.01, {"split": 0.03}), "no gap worth speaking of"),
        ((0.5, -0.1, {"split": 0.25}), "no gap worth speaking of"),
    ],
    "stored": [((1.0, 1.2), "it pays to adapt"), ((-0.2, 1.2), "does **not** pay")],
    "price": [((0.2,), "no price here"), ((-0.2,), "the price of"), ((0.0,), "next to nothing")],
    "reach": [((0.5,), "belong to this shift"), ((0.0,), "next to nothing")],
    "precision": [((0.999,), "the same way"), ((0.8,), "too much")],
    "machine": [(([CPU, CPU],), "No run on a GPU"), (([CPU, GPU],), "a machine with a GPU build")],
    "progress": [((25.5, 27.8, 40, 7000), "2.30 dB below"), ((27.9, 27.8, 40, 7000), "as far as these")],
    "slices": [((11.2, 15.9), "not their height"), ((15.9, 15.9), "on the same slices")],
    "references": [((5.0, 1.0), "lie close together"), ((5.0, 5.0), "does not hide")],
    "patients": [((3,), "**not** intervals"), ((12,), "come near")],
    "stage": [((np.array([0.2, 0.3]),), "the best single image better"), ((np.array([-0.1, 0.0]),), "buys nothing")],
    "rulers": [
        ((2.0, {"own": 0.0}, {"air": 6.0}), "hardly see it: own"),
        ((2.0, {"own": 2.0}, {"air": 0.2}), "Every ruler here sees it"),
    ],
    "scale": [
        (({"maximum": 4.0, "brain mean": 1.02},), "stays within 10 %"),
        (({"maximum": 1.1, "brain mean": 2.0},), "The brain mean is 2.0 times"),
    ],
    "split": [
        ((BEST_OTHER | {("b", "same head"): 2},), "the split decides"),
        ((BEST_OTHER | {("b", "same head"): 0},), "choose the same"),
    ],
    "audit": [
        ((0.0, 0.0), "**Passes.**"),
        ((-0.5, 0.1), "does harm and the MR leaks"),
        ((-0.5, 0.0), "wrong MR does harm."),
    ],
    "window": [((0.06, 0.02), "noise, not uptake"), ((0.02, 0.02), "no more of them")],
    "factor": [((2.0, 1.5), "too close together"), ((1.5, 1.5), "small K explains")],
}


def conclusions() -> dict[str, list]:
    """Every function conclude_... of the notebooks, as itself."""
    found = {}
    for path in NOTEBOOKS:
        for cell in cells_of(path):
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and "def conclude_" in source:
                for node in ast.parse("\n".join(x for x in source.splitlines() if x[:1] != "%")).body:
                    if isinstance(node, ast.FunctionDef) and node.name.startswith("conclude_"):
                        held = dict(KNOWN)
                        exec(compile(ast.Module([node], []), path.name, "exec"), held)
                        found.setdefault(node.name.removeprefix("conclude_"), []).append(held[node.name])
    return found


def test_every_conclusion_is_turned_round():
    assert set(conclusions()) == set(CONCLUSIONS)


@pytest.mark.parametrize("name", CONCLUSIONS)
def test_a_conclusion_follows_the_value(name):
    for function in conclusions()[name]:
        said = []
        for arguments, words in CONCLUSIONS[name]:
            text = function(*(arguments if isinstance(arguments, tuple) else (arguments,)))
            assert words in text, text
            said.append(words)
        assert len(set(said)) > 1


def test_all_runs_behind_weights_count():
    first = {"steps": 6500}
    second = {"steps": 700, "started_from": {"card": first}}
    assert [run["steps"] for run in training_runs(second)] == [6500, 700] and training_runs(first) == [first]


def test_the_stored_adaptation_is_of_the_shipped_weights():
    """Notebook 06 shows it at once; new weights need a new one."""
    with safe_open(ROOT / "notebooks" / "06_stage2.safetensors", "pt") as stored:
        about, names = stored.metadata(), set(stored.keys())
    model = load_pretrained("cpu")
    assert about["parent"] == model.fingerprint, "run 'python benchmarks/adaptation.py --only store'"
    assert names < set(model.state_dict()) and about["shift"] == "amyloid+t2-mr" and int(about["steps"]) > 0
