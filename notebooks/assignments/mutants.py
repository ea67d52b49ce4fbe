"""Wrong solutions that must lose points, and right but unusual ones that must not: what the checks are worth.

    python notebooks/assignments/mutants.py             # a table: which checks each of them fails

Each is the course's own solution with pieces of its exercises replaced. They run in this process, without a kernel and
without the pictures. `lost` names checks that must fail; others may fail with them. Change a check of a private copy,
and run this again.
"""

import contextlib
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parent))
import course


@dataclass(frozen=True)
class Variant:
    """A solution that differs from the course's: `changes` old -> new text; every old text occurs once."""

    assignment: str
    what: str
    changes: dict[str, str]
    lost: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """For tables and tests."""
        return f"{self.assignment[:2]}: {self.what}"


class Bench:
    """One assignment in this process: the given cells run once, then exercises and checks for each variant."""

    def __init__(self, name: str):
        import matplotlib

        matplotlib.use("Agg")
        self.source = course.solution_copy(course.sources([name])[name])
        code = [cell for cell in self.source.cells if cell.cell_type == "code"]
        self.exercises = [cell for cell in code if course.tagged(cell, "exercise")]
        self.checks = {course.number(cell): cell for cell in code if course.tagged(cell, "check", "hidden")}
        self.given: dict[str, Any] = {"__name__": name}
        for cell in code:
            if not course.tagged(cell, "exercise", "check", "hidden", "look", "picture"):
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(cell.source, self.given)

    def failed(self, changes: dict[str, str], only: Iterable[int] | None = None) -> dict[int, str]:
        """Number -> message of the checks that fail, of all or of `only`. Raises ValueError for a text not there."""
        space = dict(self.given)
        text = "\n".join(cell.source for cell in self.exercises)
        for old, new in changes.items():
            if text.count(old) != 1:
                raise ValueError(f"{self.given['__name__']}: expected {old!r} once in the exercises, found {text.count(old)}")
            text = text.replace(old, new)
        exec(text, space)
        found = {}
        for number in self.checks if only is None else sorted(only):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(self.checks[number].source, space)
            except Exception as error:  # whatever a wrong solution comes to
                found[number] = f"{type(error).__name__}: {error}"
        return found


def cell_text(cell: NotebookNode) -> str:
    """Source of a cell without the marks of solutions."""
    return course.MARKS.sub("", cell.source)


def _wrong(assignment: str, what: str, lost: set[int], changes: dict[str, str]) -> Variant:
    return Variant(assignment, what, changes, frozenset(lost))


COUNTS, GATE, DDIM, TRAINING, SHIFT, TABLE = "01_counts", "02_gate", "03_ddim", "04_training", "05_shift", "06_table"
