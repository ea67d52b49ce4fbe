"""A head: tissue and region labels on a 1 mm grid. Seven ship with the package; twenty more, BrainWeb's normal heads
(Aubert-Broche et al., IEEE Trans Med Imaging 25:1410, 2006), are read from where `data/download.py brainweb` put them.

Volumes are (X, Y, Z) uint8, RAS+, 1 mm. Labels: 0 outside, 1-82 Desikan-Killiany region (grey matter), 90 grey matter
without a named region, 100 white matter, 101 CSF. For the embedded heads `mfdiff_lite/anatomies/NOTICE.md` gives
sources, licences and limits, and `data/build_anatomies.py` rebuilds the files. The anatomy is real, every image made
from it is simulated.
"""

import gzip
import json
import os
import zlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from einops import rearrange

GRAY_UNNAMED, WHITE, CSF = 90, 100, 101

BRAINWEB = tuple(f"brainweb-{subject}" for subject in ("04", "05", "06", "18", "20", "38", *range(41, 55)))
BRAINWEB_SHAPE = (362, 434, 362)  # (Z, Y, X), 0.5 mm; x to the right, y to the front, z up, as in BrainWeb's raw format
BRAINWEB_START = (-90.0, -126.0, -72.0)  # mm (X, Y, Z), first voxel of BrainWeb's 1 mm grid
BRAINWEB_CLASSES = 12  # background, CSF, grey, white, fat, muscle, skin, skull, vessels, around fat, dura, marrow
BRAINWEB_STRAY = 0.001  # share of voxels that may lie outside the classes, as in data/download.py


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A head, read-only.

    name: as in `list_anatomies()`.
    labels: (X, Y, Z) uint8, 1 mm RAS+, values as in the module's head.
    affine: (4, 4) float64, voxel -> mm RAS; donors keep the space of their source file, icbm152 is in MNI space; for
        BrainWeb the origin of its 1 mm grid is taken, which no file states for the 0.5 mm one.
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


def data_folder() -> Path:
    """Where `data/download.py` puts what it fetches: $MFDIFF_DATA, or data/downloads of the checkout."""
    return Path(os.environ.get("MFDIFF_DATA") or Path(__file__).resolve().parents[1] / "data" / "downloads")


def _brainweb_file(name: str) -> Path:
    return data_folder() / "brainweb" / f"subject{name[-2:]}_crisp.raws.gz"


def _embedded() -> list[str]:
    names = [entry.name.removesuffix(".npz") for entry in _folder().iterdir() if entry.name.endswith(".npz")]
    return sorted(names, key=lambda name: (name != "icbm152", len(name), name))


def list_anatomies() -> list[str]:
    """Names of the anatomies there are: icbm152 (population average), the embedded individuals by donor number, then
    those of BrainWeb's heads that have been fetched."""
    return _embedded() + [name for name in BRAINWEB if _brainweb_file(name).is_file()]


def _region_names(labels: np.ndarray) -> dict[int, str]:
    table = json.loads((_folder() / "regions.json").read_text(encoding="utf-8"))
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[1:]) + 1
    side = {"L": "L ", "R": "R ", "B": ""}
    return {int(i): side[table[str(i)]["hemisphere"]] + table[str(i)]["label"] for i in present}


def _brainweb_values(path: Path) -> np.ndarray:
    """(Z, Y, X) uint16 of a fetched file, whole and plausible."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected BrainWeb's labels, found no such file; fetch them with `python data/download.py "
            "brainweb`, or set MFDIFF_DATA to the folder that was given to it as --dir."
        )
    again = "delete the file and run `python data/download.py brainweb` again."
    expected = 2 * int(np.prod(BRAINWEB_SHAPE))
    try:
        with gzip.open(path) as stream:
            content = stream.read(expected + 1)
    except (EOFError, OSError, zlib.error) as error:
        reason = str(error).rstrip(".")
        raise OSError(f"{path}: expected a whole gzip file, found a broken one ({reason}); {again}") from None
    if len(content) != expected:
        found = "more" if len(content) > expected else f"{len(content):,}"
        raise ValueError(f"{path}: expected {expected:,} bytes after gunzip, found {found}; {again}")
    values = np.frombuffer(content, "<u2").reshape(BRAINWEB_SHAPE)
    stray = np.count_nonzero(values >= BRAINWEB_CLASSES << 4)
    if stray > BRAINWEB_STRAY * values.size:
        raise ValueError(
            f"{path}: expected classes 0 to {BRAINWEB_CLASSES - 1} (value >> 4), found {stray:,} voxels with others; "
            + again
        )
    return values


def _brainweb_labels(values: np.ndarray) -> np.ndarray:
    """(Z, Y, X) BrainWeb values at 0.5 mm -> (X, Y, Z) labels at 1 mm; what is not grey, white or CSF becomes 0.

    Each voxel takes the label that most of its 2 x 2 x 2 have, which outvotes stray bits too. In a tie it takes that of
    the first of the eight rather than a preferred tissue, so that no tissue grows at a smooth border. What is thinner
    than a voxel, such as a narrow sulcus, may be lost.
    """
    label_of = np.zeros(2**12, np.uint8)  # by class, value >> 4
    label_of[[1, 2, 3]] = CSF, GRAY_UNNAMED, WHITE
    eighths = rearrange(label_of[values >> 4], "(z k) (y j) (x i) -> (k j i) z y x", k=2, j=2, i=2)
    labels = np.array([0, GRAY_UNNAMED, WHITE, CSF], np.uint8)
    votes = [2 * np.sum(eighths == label, axis=0, dtype=np.uint8) + (eighths[0] == label) for label in labels]
    return np.ascontiguousarray(labels[np.argmax(votes, axis=0)].T)


def _brainweb(name: str) -> dict[str, np.ndarray]:
    affine = np.eye(4)
    affine[:3, 3] = BRAINWEB_START
    path = _brainweb_file(name)
    labels = _brainweb_labels(_brainweb_values(path))
    if not {GRAY_UNNAMED, WHITE} <= set(np.unique(labels).tolist()):
        raise ValueError(f"{path}: expected a head, found no grey or no white matter; fetch it again.")
    return {"labels": labels, "affine": affine}


@cache
def load_anatomy(name: str) -> Anatomy:
    """Load an anatomy by name, "icbm152", "ahba-9861", "brainweb-04" ...; the same object on every call, its arrays
    read-only (copy before changing them).

    Raises ValueError, naming the anatomies there are, if `name` is not one of them, and if a BrainWeb file is not in
    BrainWeb's format; OSError if that file is missing or damaged. BrainWeb's files themselves were never read here: the
    code was tried on made-up ones of the documented format.
    """
    if name in BRAINWEB:
        arrays = _brainweb(name)
    elif name in _embedded():
        with (_folder() / f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive}
    else:
        raise ValueError(f"Anatomy {name!r} is not known; expected one of {', '.join([*_embedded(), *BRAINWEB])}.")
    for array in arrays.values():
        array.setflags(write=False)
    return Anatomy(name=name, regions=_region_names(arrays["labels"]), **arrays)
