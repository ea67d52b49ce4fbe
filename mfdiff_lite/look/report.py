"""A page about one restoration, to send: the viewer, what was made from what, and what to be careful about."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .page import document, registration, still
from .viewer import explore

if TYPE_CHECKING:
    from ..scan import Scan

WORDS = {  # of the settings of `restore`, a line each
    "dose reduction": "standard-dose counts / counts of the low-dose PET, as it was stated",
    "n_samples": "possible images that were drawn; the restored image is their mean, the SD says where they disagree",
    "steps": "steps from noise to image in each sample; the model is asked once in each",
    "start": "share of the way from image to noise at which a sample begins, at the coarse estimate; 1 is noise alone",
    "method": "the sampler: dpm++ and ddim go from noise to image without new noise, ddpm draws some in every step",
    "fidelity": "pull towards the measured low-dose PET, 0 to 1: more lesion contrast, more noise",
    "MR fit": "whether the MR shows the head in the PET, as the model sees it, 0 to 1; near 0 it does without the MR",
    "seed": "number from which the samples' noise is drawn; the same seed gives the same image",
}
WARNING = (
    "<p><strong>Teaching and research only; not a medical device.</strong> The model has seen simulated heads only: "
    "what it shows is a hypothesis to be checked, never a finding.</p>"
)


def checksum(path: str | Path) -> str:
    """The first half of a file's SHA-256, enough to recognise it."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]


def report_html(
    scan: Scan,
    restored: Any,
    lines: Mapping[str, Any],
    table: Any = None,
    hints: Iterable[str] = (),
    registered: Any = None,
) -> str:
    """A page that stands alone and needs no network. lines: what -> value, shown as a table with a line of explanation
    where `WORDS` has one. table: of `compare`. hints: what the checks of the input noticed. registered: what `register`
    gave for its MR."""
    parts = [WARNING, explore(scan, restored).html()]
    if table is not None:
        parts.append(f'<h2>Against the standard-dose PET</h2><div style="overflow-x:auto">{table._repr_html_()}</div>')
    if registered is not None and scan.mr is not None:
        said = f"It was moved by {registered.distance:.1f} mm and {registered.angle:.1f} degrees."
        parts += [f"<h2>Where the MR lies</h2><p>{said} Its contours follow those of the PET if that is right.</p>"]
        for plane, fig in registration(scan.lpet, registered.before, scan.mr, scan.affine).items():
            alt = f"Contours of the MR over the low-dose PET, {plane}, left before and right after it was moved. {said}"
            parts.append(still(fig, alt))
    noticed = "".join(f"<li>{html.escape(hint)}</li>" for hint in hints)
    parts.append(f"<h2>What the checks of the input noticed</h2><ul>{noticed or '<li>nothing</li>'}</ul>")
    cells = ((html.escape(str(what)), html.escape(str(value)), WORDS.get(what)) for what, value in lines.items())
    rows = "".join(
        f'<tr><th scope="row">{what}</th><td>{value}{f"<br><small>{words}</small>" if words else ""}</td></tr>'
        for what, value, words in cells
    )
    parts.append(f'<h2>How it was made</h2><table style="overflow-wrap:anywhere">{rows}</table>')
    return document(f"{scan.name}: PET restoration", "\n".join(parts))
