"""BrainWeb's twenty normal heads (Aubert-Broche et al., IEEE Trans Med Imaging 25:1410, 2006), read from where
`data/download.py brainweb` put them, beside the heads that ship.

BrainWeb's files themselves were never read here: the code was tried on made-up ones of the documented format.
"""

from __future__ import annotations

import gzip
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from einops import rearrange

from ..anatomy import CSF, GRAY_UNNAMED, WHITE, Anatomy, embedded_anatomies, embedded_anatomy, region_names

BRAINWEB = tuple(f"brainweb-{subject}" for subject in ("04", "05", "06", "18", "20", "38", *range(41, 55)))
BRAINWEB_SHAPE = (362, 434, 362)  # (Z, Y, X), 0.5 mm; x to the right, y to the front, z up, as in BrainWeb's raw format
BRAINWEB_START = (-90.0, -126.0, -72.0)  # mm (X, Y, Z), first voxel of BrainWeb's 1 mm grid
BRAINWEB_CLASSES = 12  # background, CSF, grey, white, fat, muscle, skin, skull, vessels, around fat, dura, marrow
BRAINWEB_STRAY = 0.001  # share of voxels that may lie outside the classes, as in data/download.py


def data_folder() -> Path:
    """Where `data/download.py` puts what it fetches: $MFDIFF_DATA; data/downloads of a checkout; else the user's
    data folder."""
    checkout = Path(__file__).resolve().parents[2] / "data"
    if (checkout / "download.py").is_file():
        default = checkout / "downloads"
    else:  # an installed package: never a folder of the environment's
        default = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "mfdiff_lite"
    return Path(os.environ.get("MFDIFF_DATA") or default)


def _brainweb_file(name: str) -> Path:
    return data_folder() / "brainweb" / f"subject{name[-2:]}_crisp.raws.gz"


def list_anatomies() -> list[str]:
    """Names of the anatomies there are: those that ship, then those of BrainWeb's heads that have been fetched."""
    return embedded_anatomies() + [name for name in BRAINWEB if _brainweb_file(name).is_file()]


def load_anatomy(name: str) -> Anatomy:
    """Load an anatomy by name, "icbm152", "ahba-9861", "brainweb-04" ...; the same object on every call, its arrays
    read-only (copy before changing them).

    Raises ValueError, naming the anatomies there are, if `name` is not one of them, and if a BrainWeb file is not in
    BrainWeb's format; OSError if that file is missing or damaged.
    """
    if name in BRAINWEB:
        return _brainweb(name)
    if name not in embedded_anatomies():
        names = ", ".join([*embedded_anatomies(), *BRAINWEB])
        raise ValueError(f"Anatomy {name!r} is not known; expected one of {names}.")
    return embedded_anatomy(name)


def _brainweb_values(path: Path) -> np.ndarray:
    """(Z, Y, X) uint16 of a fetched file, whole and plausible."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected BrainWeb's labels, found no such file; fetch them with `python data/download.py "
            "brainweb` of the repository, or set MFDIFF_DATA to the folder that was given to it as --dir."
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


@cache
def _brainweb(name: str) -> Anatomy:
    affine = np.eye(4)
    affine[:3, 3] = BRAINWEB_START  # of the 1 mm grid: no file states the origin of the 0.5 mm one
    path = _brainweb_file(name)
    labels = _brainweb_labels(_brainweb_values(path))
    if not {GRAY_UNNAMED, WHITE} <= set(np.unique(labels).tolist()):
        raise ValueError(f"{path}: expected a head, found no grey or no white matter; fetch it again.")
    for array in (labels, affine):
        array.setflags(write=False)
    return Anatomy(name=name, labels=labels, affine=affine, regions=region_names(labels))
