"""From images to tables: one case (`compare`), or a model on many patients with confidence intervals (`evaluate`).

Two references, never mixed: "SPET" (what a scanner would have shown, itself noisy) and "truth" (the phantom's activity,
which even a perfect scanner blurs). All numbers are on the brain mask, in activity units.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage

from . import metrics
from .anatomy import embedded_anatomy
from .baselines import gaussian
from .phantom import virtual_patient
from .scan import Scan
from .view import brain_mask

REFERENCES = {"spet": "spet", "truth": "activity"}  # what "against" means -> the image of the scan
COLUMNS = {
    "psnr": "PSNR [dB]",
    "ssim": "SSIM",
    "nrmse": "NRMSE",
    "activity_bias": "activity bias",
    "contrast_kept": "PET-only contrast kept",
    "mr_leak": "MR leak",
}


@dataclass
class Table:
    """Rows of numbers: image -> column -> value. Prints as text, shows as HTML in a notebook."""

    title: str
    rows: dict[str, dict[str, float]]

    def _cells(self) -> list[list[str]]:
        keys = [key for key in COLUMNS if any(key in row for row in self.rows.values())]
        lines = [[self.title, *(COLUMNS[key] for key in keys)]]
        for name, row in self.rows.items():
            lines.append([name, *(written(key, row.get(key, float("nan"))) for key in keys)])
        return lines

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        text = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:]])

    def _repr_html_(self) -> str:
        head, *body = ([html.escape(c) for c in line] for line in self._cells())
        rows = "".join(
            "<tr>"
            + f"<th style='text-align:left'>{line[0]}</th>"
            + "".join(f"<td>{c}</td>" for c in line[1:])
            + "</tr>"
            for line in body
        )
        return "<table><tr>" + "".join(f"<th>{c}</th>" for c in head) + f"</tr>{rows}</table>"


def beside(difference: float, unit: str = "dB", margin: float = 0.05) -> str:
    """A signed difference in words: "0.31 dB above", "0.31 dB below", or "within 0.05 dB of" where it is not larger
    than the margin."""
    if abs(difference) <= margin:
        return f"within {margin:g} {unit} of"
    return f"{abs(difference):.2f} {unit} {'above' if difference > 0 else 'below'}"


def written(key: str, value: float) -> str:
    """A value of the column `key` as text, with its unit where the column's title has none."""
    if not np.isfinite(value):
        return "-" if np.isnan(value) else "inf"
    return {"psnr": f"{value:.2f}", "activity_bias": f"{100 * value:+.1f} %"}.get(key, f"{value:.3f}")


def score(x: np.ndarray, reference: np.ndarray, mask: np.ndarray, scan: Scan | None = None) -> dict[str, float]:
    """All metrics of one image against one reference; lesion metrics if the scan knows its lesions."""
    row = {name: getattr(metrics, name)(x, reference, mask) for name in ("psnr", "ssim", "nrmse", "activity_bias")}
    if scan is not None and scan.lesion_table and scan.lesions is not None and scan.tissues is not None:
        known = (x, reference, scan.lesions, scan.lesion_table, scan.tissues > 0)
        row["contrast_kept"] = metrics.contrast_kept(*known, voxel_size=scan.voxel_size)
        row["mr_leak"] = metrics.mr_leak(*known, voxel_size=scan.voxel_size)
    return row


@dataclass(frozen=True)
class Judge:
    """What images of a scan are judged against: the one door for `compare`, `evaluate` and `audit_mr`.

    against: "spet" or "truth". Raises ValueError if the scan lacks that reference, or shows no brain to judge in.
    """

    scan: Scan
    against: str = "spet"

    def __post_init__(self) -> None:
        if self.against not in REFERENCES:
            raise ValueError(f"against: expected one of {', '.join(REFERENCES)}, found {self.against!r}")
        if self.reference is None:
            raise ValueError(
                f"{self.scan.name}: expected a scan with its {self.against}, found none; load it with spet_path, or "
                "simulate a patient"
            )
        if not self.mask.any():
            raise ValueError(f"{self.scan.name}: expected a brain mask, found no voxel in it; check mask and LPET")

    @property
    def reference(self) -> Any:
        """(X, Y, Z), what images are compared with."""
        return getattr(self.scan, REFERENCES[self.against])

    @cached_property
    def mask(self) -> np.ndarray:
        """(X, Y, Z) bool, where."""
        return brain_mask(self.scan)

    @property
    def title(self) -> str:
        """For tables."""
        dose = "" if math.isnan(self.scan.dose_reduction) else f", DRF {self.scan.dose_reduction:g}"
        return f"{self.scan.name}{dose}, against {'SPET' if self.against == 'spet' else 'truth'}"

    def __call__(self, image: Any, called: str = "image") -> dict[str, float]:
        """All metrics of an image: (X, Y, Z), or a slice of a scan of one; NumPy or torch."""
        return score(self.scan.on_grid(image, called), self.reference, self.mask, self.scan)


def compare(scan: Scan, restored: Any, against: str = "spet") -> Table:
    """One case as a table: LPET, Gaussian, and what was made of it.

    restored: a `Restoration` (its coarse estimate, first sample and mean), an image, or a dict name -> image; images as
    arrays or tensors on the scan's grid. against: "spet" or "truth". Raises ValueError if the scan lacks that
    reference, or if an image has another shape.
    """
    judge = Judge(scan, against)
    images = {"LPET": scan.lpet, "Gaussian": gaussian(scan)} | named_images(restored)
    return Table(judge.title, {name: judge(image, name) for name, image in images.items()})


def named_images(restored: Any) -> dict[str, Any]:
    """Name -> image of a `Restoration`, of one image, or of a dict of them."""
    if isinstance(restored, dict):
        return restored
    if not hasattr(restored, "coarse"):
        return {"restored": restored}
    k = restored.settings["n_samples"]
    images = {"coarse": restored.coarse} | ({"one sample": restored.samples[0]} if k else {})
    return images | ({f"mean of {k} samples": restored.mean} if k > 1 else {})


def evaluate(methods: dict[str, Callable[[Scan], np.ndarray]], scans: Iterable[Scan]) -> dict[str, Any]:
    """Methods on many scans: {"patients": [per patient {against: {method: metrics}}], "summary": {against: {method:
    {metric: mean and ci95}}}}.

    methods: name -> function of a scan that returns an image. The confidence interval is over patients; an `against` is
    summarised if every scan has it. Raises ValueError for no scans, and for a scan with neither SPET nor truth.
    """
    patients: list[dict[str, Any]] = []
    for scan in scans:
        known = [key for key, name in REFERENCES.items() if getattr(scan, name) is not None]
        judges = {key: Judge(scan, key) for key in known or ["spet"]}
        images = {"LPET": scan.lpet, **{name: method(scan) for name, method in methods.items()}}
        rows = {key: {name: judge(image, name) for name, image in images.items()} for key, judge in judges.items()}
        patients.append({"name": scan.name} | rows)
    if not patients:
        raise ValueError("evaluate: expected at least one scan, found none; pass scans with SPET or truth")
    shared = [key for key in REFERENCES if all(key in patient for patient in patients)]
    return {"patients": patients, "summary": {key: summarise([p[key] for p in patients]) for key in shared}}


def audit_mr(
    method: Callable[[np.ndarray, np.ndarray | None], Any],
    scan: Scan,
    other_mr: np.ndarray | None = None,
    against: str = "spet",
) -> Table:
    """What a method makes of an MR that is right, misregistered, another patient's, or missing: one row each.

    method: any callable (lpet, mr) -> pet on the scan's grid; for "no MR" it gets `mr=None`. other_mr: (X, Y, Z), the
    MR of another head, default `another_mr`. A method that degrades safely falls back to its own "no MR" row, however
    wrong the MR. Raises ValueError for a scan without MR or without the reference.
    """
    judge = Judge(scan, against)
    conditions = mr_conditions(scan, other_mr)
    return Table(judge.title, {name: judge(method(scan.lpet, mr), name) for name, mr in conditions.items()})


def another_mr(scan: Scan, anatomy: str | None = None, seed: int = 1) -> np.ndarray:
    """The MR of another virtual patient in the place of the scan's own, at the same height on the grid: (X, Y, Z).
    Heads differ and are posed at random, so anatomical levels agree only roughly. anatomy: default icbm152, or another
    head for a scan of that one. Raises ValueError if that patient is the scan's own."""
    anatomy = anatomy or ("ahba-9861" if scan.name.startswith("icbm152") else "icbm152")
    other = virtual_patient(embedded_anatomy(anatomy), seed)
    if other.name == scan.name:
        raise ValueError(f"another_mr: expected another patient than {scan.name}, found the same; choose another seed")
    whole_head = nib.Nifti1Image(other.mr, other.affine)
    return resample_from_to(whole_head, (scan.lpet.shape, scan.affine), order=1).get_fdata(dtype=np.float32)


def mr_conditions(scan: Scan, other_mr: np.ndarray | None = None) -> dict[str, np.ndarray | None]:
    """The MRs of the audit by name. Shifts go along the first axis. Raises ValueError for a scan without MR."""
    if scan.mr is None:
        raise ValueError(f"{scan.name}: expected a scan with MR to audit what it does, found none")
    other_mr = another_mr(scan) if other_mr is None else other_mr
    shifts = {
        f"MR shifted by {mm} mm": ndimage.shift(scan.mr, (mm / scan.voxel_size[0], 0, 0), order=1, mode="nearest")
        for mm in (2, 4)
    }
    return {"right MR": scan.mr, **shifts, "another patient's MR": other_mr, "no MR": None}


def summarise(patients: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per patient {method: {metric: value}} -> {method: {metric: {"mean", "ci95", "n"}}}."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for method in patients[0]:
        table[method] = {}
        for metric in patients[0][method]:
            values = [p[method][metric] for p in patients]
            if np.isfinite(values).any():
                mean, ci = metrics.mean_ci(values)
                table[method][metric] = {"mean": mean, "ci95": ci, "n": int(np.isfinite(values).sum())}
    return table
