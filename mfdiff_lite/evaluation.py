"""From images to tables: one case (`compare`), or a model on many patients with confidence intervals (`evaluate`).

Two references, never mixed: "SPET" (what a scanner would have shown, itself noisy) and "truth" (the phantom's activity,
which even a perfect scanner blurs). All numbers are on the brain mask, in activity units.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_from_to
from scipy import ndimage

from . import metrics
from .anatomy import load_anatomy
from .baselines import gaussian
from .phantom import virtual_patient
from .scan import ActivityScale, Scan

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


def written(key: str, value: float) -> str:
    """A value of the column `key` as text, with its unit where the column's title has none."""
    if not np.isfinite(value):
        return "-" if np.isnan(value) else "inf"
    return {"psnr": f"{value:.2f}", "activity_bias": f"{100 * value:+.1f} %"}.get(key, f"{value:.3f}")


def score(x: np.ndarray, reference: np.ndarray, mask: np.ndarray, scan: Scan | None = None) -> dict[str, float]:
    """All metrics of one image against one reference; lesion metrics if the scan knows its lesions."""
    row = {name: getattr(metrics, name)(x, reference, mask) for name in ("psnr", "ssim", "nrmse", "activity_bias")}
    if scan is not None and scan.lesion_table and scan.tissues is not None:
        brain = scan.tissues > 0
        row["contrast_kept"] = metrics.contrast_kept(x, reference, scan.lesions, scan.lesion_table, brain)
        row["mr_leak"] = metrics.mr_leak(x, reference, scan.lesions, scan.lesion_table, brain)
    return row


def brain_mask(scan: Scan) -> np.ndarray:
    """The scan's own mask, or a rough one from its LPET (never from the SPET or the result)."""
    return scan.mask if scan.mask is not None else ActivityScale(scan.lpet, scan.voxel_size).mask


def compare(scan: Scan, restored: Any, against: str = "spet") -> Table:
    """One case as a table: LPET, Gaussian, and the restoration's coarse estimate, first sample and mean.

    restored: a `Restoration`, or a dict name -> image. against: "spet" or "truth". Raises ValueError if the scan lacks
    that reference.
    """
    reference = {"spet": scan.spet, "truth": scan.activity}.get(against)
    if reference is None:
        raise ValueError(
            f"compare: expected a scan with its {against}, found none; load it with spet_path, or simulate a patient"
        )
    images = {"LPET": scan.lpet, "Gaussian": gaussian(scan)}
    images |= restored if isinstance(restored, dict) else _images(restored)
    mask = brain_mask(scan)
    dose = f"{scan.name}, DRF {scan.dose_reduction:g}, against {'SPET' if against == 'spet' else 'truth'}"
    return Table(dose, {name: score(_as_volume(image), reference, mask, scan) for name, image in images.items()})


def _images(restored: Any) -> dict[str, Any]:
    k = restored.settings["n_samples"]
    images = {"coarse": restored.coarse, "one sample": restored.samples[0]}
    return images | ({f"mean of {k} samples": restored.mean} if k > 1 else {})


def _as_volume(image: Any) -> np.ndarray:
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def evaluate(methods: dict[str, Callable[[Scan], np.ndarray]], scans: Iterable[Scan]) -> dict[str, Any]:
    """Methods on many scans: {"patients": [per patient {against: {method: metrics}}], "summary": {against: {method:
    {metric: mean and ci95}}}}.

    methods: name -> function of a scan that returns an image. The confidence interval is over patients.
    """
    patients = []
    for scan in scans:
        images = {"LPET": scan.lpet, **{name: method(scan) for name, method in methods.items()}}
        references = {"spet": scan.spet, "truth": scan.activity}
        patients.append(
            {"name": scan.name}
            | {
                key: {n: score(x, ref, scan.mask, scan) for n, x in images.items()}
                for key, ref in references.items()
                if ref is not None
            }
        )
    return {
        "patients": patients,
        "summary": {key: summarise([p[key] for p in patients]) for key in ("spet", "truth") if key in patients[0]},
    }


def audit_mr(
    method: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
    scan: Scan,
    other_mr: np.ndarray | None = None,
    against: str = "spet",
) -> Table:
    """What a method makes of an MR that is right, misregistered, another patient's, or missing: one row each.

    method: any callable (lpet, mr) -> pet on the scan's grid; for "no MR" it gets `mr=None`. other_mr: (X, Y, Z), the
    MR of another head, default `another_mr`. A method that degrades safely falls back to its own "no MR" row, however
    wrong the MR.
    """
    reference = scan.spet if against == "spet" else scan.activity
    title = f"{scan.name}, DRF {scan.dose_reduction:g}, against {'SPET' if against == 'spet' else 'truth'}"
    rows = {
        name: score(_as_volume(method(scan.lpet, mr)), reference, brain_mask(scan), scan)
        for name, mr in mr_conditions(scan, other_mr).items()
    }
    return Table(title, rows)


def another_mr(scan: Scan, anatomy: str = "icbm152", seed: int = 1) -> np.ndarray:
    """The MR of another virtual patient in the place of the scan's own, at the same height on the grid: (X, Y, Z).
    Heads differ and are posed at random, so anatomical levels agree only roughly."""
    other = virtual_patient(load_anatomy(anatomy), seed)
    whole_head = nib.Nifti1Image(other.mr, other.affine)
    return resample_from_to(whole_head, (scan.lpet.shape, scan.affine), order=1).get_fdata(dtype=np.float32)


def mr_conditions(scan: Scan, other_mr: np.ndarray | None = None) -> dict[str, np.ndarray | None]:
    """The MRs of the audit by name. Shifts go along the first axis."""
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
