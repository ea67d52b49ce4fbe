"""What a notebook of the course does first, after its cell of parameters: `start_notebook`."""

from __future__ import annotations

import ast
import difflib
import os

import comm
from IPython import get_ipython

INJECTED = "# Parameters\n"  # how papermill begins the cell that it puts behind the notebook's own parameters
LIVE = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")  # set where a person sits in front of widgets


def start_notebook() -> None:
    """Make a run by papermill what it looks like; in a notebook that a person runs, nothing happens.

    papermill only warns of a parameter that the notebook does not have, and the run goes on with the default: here it
    is refused (ValueError). And what papermill stores of widgets makes pages that are empty without a network: here
    widgets stand for themselves as the pictures that they bring along.
    """
    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell else []
    runs = [(own, given) for own, given in zip(cells, cells[1:], strict=False) if given.startswith(INJECTED)]
    for own, given in runs:
        declared = _assigned(own)
        for name in _assigned(given):
            if name not in declared:
                close = difflib.get_close_matches(name, declared, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(declared)}"
                raise ValueError(f"parameters: expected one that the notebook has, found '{name}'; {hint}")
    if runs and not any(name in os.environ for name in LIVE):
        comm.create_comm = lambda *args, **kwargs: comm.DummyComm(*args, **kwargs)


def _assigned(cell: str) -> list[str]:
    """Names that a cell assigns at its top level, in order."""
    nodes = ast.parse(cell).body
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
