"""Look at a case: a viewer for notebook and page (`explore`, `knobs`), figures (`figure`, `panel`), a page to send.

    volumes --Case--> viewer.py: quantised volumes, a still --> viewer.js: canvases in the browser
            --panes--> {name: Pane}, upright, square pixels --> montage: matplotlib Figure

Volumes are (X, Y, Z) on one RAS+ grid. All PET panes share one window in activity units over all slices; the
difference is centred on 0. Radiological display has the patient's left (sagittal: posterior) on the right of the
picture, neurological display the other way round. Every colour map keeps its order in grey and for colour-blind eyes.
"""

from .page import document, figure, panel, show
from .panes import PLANES, Pane, State, panes, render  # from now on `look.panes` is the function
from .report import report_html
from .viewer import Viewer, explore, knobs

__all__ = [
    "PLANES", "Pane", "State", "Viewer", "document", "explore", "figure", "knobs", "panel", "panes", "render",
    "report_html", "show",
]  # fmt: skip
