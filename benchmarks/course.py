"""Cost of the course (the notebooks, the book), and what its notebooks ask and say. (Of the viewer: viewer.py.)

    make course-targets              # half an hour on 2 idle cores, most of it for the book
    python benchmarks/course.py --reading     # counts of questions, answers and sentences: a second
    make course-targets ARGS=--assignments    # what the assignments' checks are worth: minutes

The assignments: which wrong solutions of notebooks/assignments/mutants.py lose points, and which right ones keep them
all. Writes the rows of group "course" in results/targets.json.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from results import Targets

ROOT = Path(__file__).resolve().parents[1]
GOALS = {
    "notebook": ("slowest notebook at the smoke profile, alone on the machine", "s", "<=", 45.0, None),
    "book_minutes": ("make book, all notebooks at the cpu profile", "min", "<=", 20.0, None),
    "book_size": ("the book's size", "MB", "<=", 40.0, None),
}
READING_GOALS = {
    "questions": ("questions with a collapsed answer in the notebooks", "", ">=", 30, 40),
    "worked": ("notebooks whose exercise has a worked solution", "", ">=", 10, 10),
    "hard_wired": ("sentences of code cells that say more or less without asking the value", "", "<=", 0, 0),
    "undefined": ("terms of the glossary that a notebook uses earlier and without a link", "", "<=", 0, 0),
    "readme_lines": ("lines of the README", "", "<=", 180, 150),
}
# Words that compare. A string with one of them belongs into a function conclude_..., which asks the value; what follows
# from arithmetic or from how a picture is drawn is listed with its reason.
COMPARING = re.compile(
    r"\b(better|worse|higher|lower|sharper|smoother|noisier|calmer|hardly|nearly|mostly|barely|far (?:more|less)|"
    r"falls?|rises?|grows?|improves?|wins?|gains?|loses?|too (?:small|large)|strongest|weaker|resembles?|no more than|"
    r"steepest)\b"
)
ALLOWED = {
    "An ideal single sample loses": "3.01 dB by arithmetic",
    "the perfect one loses": "arithmetic; ours are numbers",
    "Five small maps in columns, the first and four others": "another gain is the word for a factor",
    "The best Gaussian gains": "a list of signed numbers",
    "the share of signal variance falls in a long S": "the two schedules are closed forms",
    "both axes logarithmic: an error of": "closed form, errors of a known denoiser",
    "after one step all samples stand": "closed form: one step returns the mean",
    "the error of the guess that is kept falls to zero": "closed form of the warm start",
    "Time grows with steps": "steps times samples",
    "whose pixels grow downwards": "how a U-Net is drawn",
    "whose memory grows follows early": "toy of moving averages, seeded",
    "the memory of the average, which grows": "a schedule",
    "the mean loses": "a signed number",
    "nearly everywhere": "the window is a percentile of the picture",
    "same NRMSE, two kinds of noise; gain by": "a label",
    "which gains {": "a signed number",
    "| ours minus ... |": "the head of a column that counts patients",
    "the smoother the image, the flatter": "what blur does to contrast",
}
CHECKS = {
    "mutants": ("wrong solutions that the assignments' checks are tried on", "", ">=", 20.0, 30.0),
    "mutants_caught": ("wrong solutions that lose points", "%", ">=", 95.0, 100.0),
    "unusual_full": ("right but unusual solutions that score full", "%", ">=", 100.0, None),
}


def notebooks(targets: Targets) -> None:
    """Seconds of each at the smoke profile, one after the other."""
    spent = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        began = time.monotonic()
        command = [sys.executable, "notebooks/run.py", "--out", "runs/course-targets", path.stem]
        subprocess.run(command, cwd=ROOT, check=True)
        spent[path.stem] = time.monotonic() - began
    print({name: round(seconds) for name, seconds in spent.items()})
    targets.add("notebook", max(spent.values()))


def book(targets: Targets) -> None:
    """Minutes of `make book`, and the size of what it makes."""
    began = time.monotonic()
    subprocess.run(["make", "book"], cwd=ROOT, check=True)
    targets.add("book_minutes", (time.monotonic() - began) / 60)
    files = (ROOT / "runs" / "book" / "html").rglob("*")
    targets.add("book_size", sum(file.stat().st_size for file in files if file.is_file()) / 1e6)


def assignments() -> None:
    """Every wrong and every unusual solution through all checks of its assignment."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "notebooks" / "assignments" / "mutants.py")
    sys.modules["mutants"] = mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    wrong, right = mutants.measure()
    print(*(f"full marks for a wrong solution: {name}" for name, failed in wrong.items() if not failed), sep="\n")
    print(*(f"points lost by a right solution: {name}" for name, failed in right.items() if failed), sep="\n")
    targets = Targets("course", CHECKS, "make course-targets ARGS=--assignments")
    targets.add("mutants", len(wrong))
    targets.add("mutants_caught", 100 * np.mean([bool(failed) for failed in wrong.values()]))
    targets.add("unusual_full", 100 * np.mean([not failed for failed in right.values()]))
    targets.write()
    targets.show()


# ---- what a reader meets -----------------------------------------------------------------------------------------


def course() -> dict[str, list[dict]]:
    """The cells of every notebook, in the order of the course."""
    paths = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in paths}


def prose(cells: list[dict]) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def questions(cells: list[dict]) -> list[tuple[str, str]]:
    """Question and answer of every box; an empty answer where there is none."""
    found = []
    for text in prose(cells):
        asked = re.match(r"> \*\*(?:Predict|Spot the mistake)\.\*\* (.+?)\n\n(.*)", text, re.DOTALL)
        if asked:
            answer = re.search(r"<details><summary>Answer</summary>\n\n(.+?)\n\n</details>", asked[2], re.DOTALL)
            found.append((asked[1], answer[1] if answer else ""))
    return found


def worked(cells: list[dict]) -> list[str]:
    """The code of the worked solutions under the exercise."""
    parts = re.findall(r"<summary>Worked solution</summary>(.*?)</details>", prose(cells)[-1], re.DOTALL)
    return [code for part in parts for code in re.findall(r"```python\n(.*?)```", part, re.DOTALL)]


def hard_wired(source: str) -> list[str]:
    """Strings of a cell that compare and are not chosen by a value."""
    plain = "\n".join("" if line.startswith("%") else line for line in source.splitlines())
    return [
        text for text in _strings(ast.parse(plain)) if COMPARING.search(text) and not any(a in text for a in ALLOWED)
    ]


def _strings(node: ast.AST) -> list[str]:
    """Texts with values in them, and long ones; without docstrings, and without what a condition chooses."""
    if isinstance(node, ast.FunctionDef):
        if node.name.startswith("conclude_"):
            return []
        return [text for part in node.body[ast.get_docstring(node) is not None :] for text in _strings(part)]
    if isinstance(node, ast.IfExp):
        return []
    if isinstance(node, ast.JoinedStr):
        return ["".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) and len(node.value) > 80 else []
    return [text for part in ast.iter_child_nodes(node) for text in _strings(part)]


def undefined() -> list[str]:
    """Terms that a notebook uses before the one that explains them, in a cell without a link to it or the glossary."""
    entries = re.findall(r"^\*\*(.+?)\*\* –(.+?)(?=\n\n|\Z)", (ROOT / "docs/glossary.md").read_text(), re.DOTALL | re.M)
    texts, found = {stem: prose(cells) for stem, cells in course().items()}, []
    for names, about in entries:
        home = min(re.findall(r"\[(\d\d)]", about))
        for name in names.split(", "):
            term = re.compile(rf"(?<![\w`-]){re.escape(name)}(?:s|es)?(?![\w`-])")
            early = [(stem, text) for stem in texts if stem[:2] < home for text in texts[stem] if term.search(text)]
            if early and not re.search(rf"glossary\.md|\({home}_", early[0][1]):
                found.append(f"{name}: {early[0][0]}, explained in {home}")
    return found


def reading(targets: Targets) -> None:
    """Counts of what the notebooks ask, answer and say."""
    cells = course()
    asked = [answer for part in cells.values() for _, answer in questions(part) if answer]
    targets.add("questions", len(asked))
    targets.add("worked", sum(bool(worked(part)) for part in cells.values()))
    code = ["".join(c["source"]) for part in cells.values() for c in part if c["cell_type"] == "code"]
    targets.add("hard_wired", sum(len(hard_wired(source)) for source in code))
    targets.add("undefined", len(undefined()))
    targets.add("readme_lines", len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()))


def main(
    only_reading: Annotated[
        bool, typer.Option("--reading", help="count questions, answers, sentences: a second")
    ] = False,
    only_assignments: Annotated[bool, typer.Option("--assignments", help="the assignments' checks alone")] = False,
) -> None:
    """Measure what the course costs a reader's machine, what its checks are worth, what its notebooks ask."""
    if not only_assignments:
        counted = Targets("course", READING_GOALS, "python benchmarks/course.py --reading")
        reading(counted)
        counted.show()
        counted.write()
    if not only_reading:
        assignments()
    if only_assignments or only_reading:
        return
    targets = Targets("course", GOALS, "make course-targets")
    notebooks(targets)
    book(targets)
    targets.write()
    targets.show()


if __name__ == "__main__":
    typer.run(main)
