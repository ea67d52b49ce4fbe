"""Look at a case: linked panes with sliders (`explore`), figures (`figure`, `panel`), a page to send (`report_html`).

    volumes --panes--> {name: Pane}, upright, square pixels --> render: (H, W, 3) uint8 | montage: matplotlib Figure

Volumes are (X, Y, Z) on one RAS+ grid. All PET panes share one window in activity units over all slices; the
difference is centred on 0. Radiological display has the patient's left (sagittal: posterior) on the right of the
picture, neurological display the other way round. Every colour map keeps its order in grey and for colour-blind eyes.
"""

from .explorer import SliceExplorer, explore
from .page import figure, panel, report_html, show
from .panes import PLANES, Pane, State, panes, render  # from now on `look.panes` is the function

__all__ = [
    "PLANES", "Pane", "SliceExplorer", "State", "explore", "figure", "panel", "panes", "render", "report_html", "show",
]  # fmt: skip
