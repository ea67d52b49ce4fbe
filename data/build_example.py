"""Restore one whole simulated head and keep it, small, in mfdiff_lite/example: what notebooks 00 and 09 open at once.

    python data/build_example.py            # minutes; again whenever the shipped weights change

Images are NIfTI, rounded to a hundredth of what the brain holds, so that they stay small; fine enough to look at, too
coarse to measure with. example.json says what they were made from.
"""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from tqdm import tqdm

import mfdiff_lite as mf
from mfdiff_lite.revision import code_revision

FOLDER = Path(__file__).resolve().parents[1] / "mfdiff_lite" / "example"
ANATOMY, SEED, DOSE, SAMPLES = "ahba-15697", 0, 20.0, 4


def write(path: Path, volume: np.ndarray, affine: np.ndarray, step: float) -> None:
    """A volume in steps, as int16 with a slope."""
    image = nib.Nifti1Image(np.round(volume / step).astype(np.int16), affine)
    image.header.set_slope_inter(step, 0)
    path.write_bytes(gzip.compress(image.to_bytes(), 9, mtime=0))  # the same bytes every time


def main(samples: Annotated[int, typer.Option(help="samples to average")] = SAMPLES) -> None:
    """Simulate, restore, write."""
    patient = mf.virtual_patient(mf.load_anatomy(ANATOMY), SEED)
    scan = mf.Scanner().scan(patient, DOSE)
    model = mf.load_pretrained()
    restored = model.restore(scan, samples, progress=lambda it, **kw: tqdm(it, desc="restoring", **kw))
    FOLDER.mkdir(exist_ok=True)
    step = float(np.percentile(scan.spet[scan.mask], 98)) / 100
    mr = float(np.percentile(scan.mr[scan.mask], 98)) / 100
    pet = {"lpet": scan.lpet, "spet": scan.spet, "restored": restored.mean}
    for name, image in pet.items():
        write(FOLDER / f"{name}.nii.gz", image, scan.affine, step)
    write(FOLDER / "sd.nii.gz", restored.std, scan.affine, float(np.percentile(restored.std, 99.5)) / 60)
    write(FOLDER / "mr.nii.gz", scan.mr, scan.affine, mr)
    write(FOLDER / "gate.nii.gz", restored.gate, scan.affine, 0.02)
    for name in ("mask", "tissues", "lesions"):
        write(FOLDER / f"{name}.nii.gz", getattr(scan, name), scan.affine, 1.0)
    card = {
        "anatomy": ANATOMY,
        "seed": SEED,
        "dose_reduction": DOSE,
        "samples": samples,
        "unit": scan.unit,
        "revision": code_revision(),
        "weights": {key: model.card.get(key) for key in ("revision", "steps")},
        "lesions": [dataclasses.asdict(one) for one in scan.lesion_table],
    }
    (FOLDER / "example.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in FOLDER.iterdir()) / 1e6
    print(f"wrote {FOLDER}, {size:.2f} MB")


if __name__ == "__main__":
    typer.run(main)
