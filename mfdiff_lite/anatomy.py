"""A head: tissue and region labels on a 1 mm grid. Seven ship with the package; `readers.brainweb` knows twenty more.

Volumes are (X, Y, Z) uint8, RAS+, 1 mm. Labels: 0 outside, 1-82 Desikan-Killiany region (grey matter), 90 grey matter
without a named region, 100 white matter, 101 CSF. For the embedded heads `mfdiff_lite/anatomies/NOTICE.md` gives
sources, licences and limits, and `data/build_anatomies.py` rebuilds the files. The anatomy is real, every image made
from it is simulated.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

GRAY_UNNAMED, WHITE, CSF = 90, 100, 101


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A head, read-only.

    name: as in `list_anatomies()`.
    labels: (X, Y, Z) uint8, 1 mm RAS+, values as in the module's head.
    affine: (4, 4) float64, voxel -> mm RAS; donors keep the space of their source file, icbm152 is in MNI space.
    regions: label -> name of every label present, e.g. {1: "L bankssts", 100: "white matter", 101: "CSF"}.
    t1: (X, Y, Z) uint8, real skull-stripped T1 average in arbitrary units on the same grid, for icbm152 only; None for
        the donors, whose MR is not public in the wheel, and for BrainWeb.
    """

    name: str
    labels: np.ndarray
    affine: np.ndarray
    regions: dict[int, str]
    t1: np.ndarray | None = None

    @property
    def gray(self) -> np.ndarray:
        """(X, Y, Z) bool, cortex and deep grey nuclei."""
        return (self.labels > 0) & (self.labels <= GRAY_UNNAMED)

    @property
    def white(self) -> np.ndarray:
        """(X, Y, Z) bool, white matter."""
        return self.labels == WHITE

    @property
    def csf(self) -> np.ndarray:
        """(X, Y, Z) bool, ventricles and the fluid around the brain."""
        return self.labels == CSF


def _folder():
    return resources.files("mfdiff_lite") / "anatomies"


def embedded_anatomies() -> list[str]:
    """Names of the anatomies that ship: icbm152 (population average), then the individuals by donor number."""
    names = [entry.name.removesuffix(".npz") for entry in _folder().iterdir() if entry.name.endswith(".npz")]
    return sorted(names, key=lambda name: (name != "icbm152", len(name), name))


def region_names(labels: np.ndarray) -> dict[int, str]:
    """Label -> name of every label in `labels`."""
    table = json.loads((_folder() / "regions.json").read_text(encoding="utf-8"))
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[1:]) + 1
    side = {"L": "L ", "R": "R ", "B": ""}
    return {int(i): side[table[str(i)]["hemisphere"]] + table[str(i)]["label"] for i in present}


@cache
def embedded_anatomy(name: str) -> Anatomy:
    """One of the anatomies that ship, "icbm152", "ahba-9861" ...; the same object on every call, its arrays read-only
    (copy before changing them). Raises ValueError, naming those there are, for another name."""
    if name not in embedded_anatomies():
        raise ValueError(f"anatomy: expected one of {', '.join(embedded_anatomies())}, found {name!r}")
    with (_folder() / f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive}
    for array in arrays.values():
        array.setflags(write=False)
    return Anatomy(name=name, regions=region_names(arrays["labels"]), **arrays)
