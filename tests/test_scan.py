"""One case on one grid: what comes in, what is refused and in which words, and the way to the model's grid and back."""

import dataclasses
import gzip
import re
import threading
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from mfdiff_lite.files import load_scan, load_volume, save_volume, whole_file
from mfdiff_lite.phantom import virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner
from mfdiff_lite.view import ActivityScale, ModelView, WorkingGrid, neighbours, scale_mr

SHAPE = (40, 44, 18)


def head(shape=SHAPE, seed=0):
    """A noisy ellipsoid of activity about 4 with a warm core: enough of a head for a grid."""
    grid = np.meshgrid(*(np.linspace(-1.25, 1.25, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(g**2 for g in grid))
    noise = np.random.default_rng(seed).gamma(20, 1 / 20, shape)
    return ((4 * (radius < 1) + 4 * (radius < 0.5)) * noise).astype(np.float32)


def affine_of(codes, voxel, shape, centre=(3.0, -5.0, 11.0)):
    """Voxel -> mm for axes that point to `codes`, the middle of the volume at `centre` [mm]."""
    turn = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), shape)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis in range(3):
        column = np.sign(np.linalg.inv(turn)[:3, axis])
        affine[:3, axis] = column * np.broadcast_to(voxel, 3)[axis]
    affine[:3, 3] = np.array(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def blob(shape, affine, centre, sigma, amplitude=5.0):
    """A Gaussian at a place in mm, sampled on a grid."""
    mm = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return (amplitude * np.exp(-((mm - centre) ** 2).sum(-1) / (2 * sigma**2))).astype(np.float32)


def gravity(volume, affine):
    return nib.affines.apply_affine(affine, ndimage.center_of_mass(volume))


def write(path, data, affine=None):
    nib.Nifti1Image(
        np.asarray(data), affine_of("RAS", 2.0, np.shape(data)[:3]) if affine is None else affine
    ).to_filename(path)
    return path


def sentence(error):
    """The message, after checking that it is one line that says what was expected, what was found and what to do."""
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and 20 < len(text) < 400
    assert "expected" in text and "found" in text
    return text


def test_affine_of_is_right():
    for codes in ("RAS", "LAS", "LPI", "PSR", "IRP"):
        affine = affine_of(codes, (1.0, 2.0, 3.0), SHAPE)
        assert "".join(nib.aff2axcodes(affine)) == codes
        np.testing.assert_allclose(nib.affines.voxel_sizes(affine), (1, 2, 3))


# ---- Scan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torchy", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
def test_any_array_comes_in_and_goes_back(torchy, flat, dtype):
    values = (head()[..., 9] if flat else head()).astype(dtype)
    given = torch.from_numpy(values) if torchy else values
    scan = Scan(given, mr=given, voxel_size=2.0)
    assert scan.lpet.shape == ((40, 44, 1) if flat else SHAPE) and scan.lpet.dtype == np.float32
    np.testing.assert_array_equal(scan.lpet.reshape(values.shape), values.astype(np.float32))
    back = scan.like_input(2 * scan.lpet)
    assert isinstance(back, torch.Tensor) == torchy
    assert tuple(back.shape) == values.shape
    np.testing.assert_array_equal(np.asarray(back), 2 * values.astype(np.float32))
    stack = scan.like_input(np.stack([scan.lpet, scan.lpet]))
    assert tuple(stack.shape) == (2, *values.shape)


def test_voxel_size_becomes_an_affine_and_back():
    np.testing.assert_array_equal(Scan(head(), voxel_size=1.5).affine, np.diag([1.5, 1.5, 1.5, 1]))
    assert Scan(head(), voxel_size=(1, 2, 3)).voxel_size == (1, 2, 3)
    oblique = np.eye(4)
    oblique[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) * 2
    assert Scan(head(), affine=oblique).voxel_size == pytest.approx((2, 2, 2))


def test_masks_and_labels_keep_their_kind():
    labels = (head() > 3).astype(float) * 3
    scan = Scan(head(), mask=labels, tissues=labels, lesions=labels)
    assert scan.mask.dtype == bool and scan.tissues.dtype == np.uint8 and set(np.unique(scan.lesions)) == {0, 3}


def test_rounding_below_zero_is_clipped_and_inputs_are_left_alone():
    values = head()
    values[0, 0, 0] = -1e-5 * values.max()
    before = values.copy()
    scan = Scan(values)
    assert scan.lpet[0, 0, 0] == 0
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(scan.lpet[1:], before[1:])


def test_negative_mr_is_fine():
    assert Scan(head(), mr=head() - 2).mr.min() == -2


def spoiled(value):
    array = head()
    array[3, 4, 5] = value
    return array


BAD = {
    "1-D": (dict(lpet=np.ones(5)), r"LPET: expected one 3-D volume, found shape \(5,\)"),
    "4-D": (
        dict(lpet=np.ones((*SHAPE, 2))),
        r"LPET: expected one 3-D volume, found shape \(40, 44, 18, 2\); extract one time frame",
    ),
    "4-D torch": (dict(lpet=torch.ones(*SHAPE, 2)), "LPET: expected one 3-D volume"),
    "NaN": (
        dict(lpet=spoiled(np.nan)),
        r"LPET: expected finite values, found 1 NaN voxels \(0.00%\) near voxel \[3, 4, 5\]",
    ),
    "inf": (dict(lpet=spoiled(np.inf)), "LPET: expected finite values, found 1 NaN or infinite voxels"),
    "too large for float32": (dict(lpet=spoiled(0).astype(float) * 1e300), "LPET: expected finite values"),
    "zeros": (dict(lpet=np.zeros(SHAPE)), "LPET: expected an image, found only zeros; check the export"),
    "negative": (dict(lpet=head() - 1), "LPET: expected activity of at least 0, found -1 and .*; undo any offset"),
    "all negative": (dict(lpet=-head() - 1), "LPET: expected activity of at least 0"),
    "complex": (dict(lpet=head().astype(complex)), "LPET: expected real numbers, found complex128"),
    "objects": (dict(lpet=np.full(SHAPE, None)), "LPET: expected real numbers, found object"),
    "MR shape": (
        dict(lpet=head(), mr=head()[:-1]),
        r"MR: expected the LPET's grid \(40, 44, 18\), found \(39, 44, 18\)",
    ),
    "MR NaN": (dict(lpet=head(), mr=spoiled(np.nan)), "MR: expected finite values"),
    "MR zeros": (dict(lpet=head(), mr=np.zeros(SHAPE)), "MR: expected an image, found only zeros.*mr=None"),
    "SPET shape": (dict(lpet=head(), spet=head()[..., :-1]), "SPET: expected the LPET's grid"),
    "SPET negative": (dict(lpet=head(), spet=head() - 1), "SPET: expected activity of at least 0"),
    "mask shape": (dict(lpet=head(), mask=np.ones((2, 2, 2))), "mask: expected the LPET's grid"),
    "tiny voxels": (
        dict(lpet=head(), voxel_size=0.002),
        r"LPET: expected voxels of 0.4 to 10.0 mm, found \[0.002, 0.002, 0.002\] mm; correct",
    ),
    "huge voxels": (dict(lpet=head(), voxel_size=(2, 2, 2000)), "LPET: expected voxels of"),
    "NaN affine": (dict(lpet=head(), affine=np.full((4, 4), np.nan)), "LPET: expected"),
    "singular affine": (
        dict(lpet=head(), affine=np.array([[2.0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])),
        "LPET: expected an affine",
    ),
    "3 x 3 affine": (dict(lpet=head(), affine=np.eye(3)), "LPET: expected an affine"),
    "flat zero voxel": (dict(lpet=head()[..., 9], voxel_size=0), "LPET: expected"),
    "dose below 1": (
        dict(lpet=head(), dose_reduction=0.5),
        "dose_reduction: expected SPET counts / LPET counts, .*found 0.5",
    ),
    "dose inf": (dict(lpet=head(), dose_reduction=float("inf")), "dose_reduction: .*found inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_scan_refuses(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        Scan(**arguments)
    sentence(error)


def test_a_named_file_stands_in_the_message():
    with pytest.raises(ValueError, match="^/data/mr.nii: expected the LPET's grid"):
        Scan(head(), mr=head()[1:], sources={"mr": "/data/mr.nii"})


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "lpet.nii.gz", head()), write(tmp_path / "mr.nii.gz", head(seed=1) * 40)


def test_load_scan_reads_what_is_there(files):
    scan = load_scan(*files, spet_path=files[0], dose_reduction=10, mask_path=files[0])
    np.testing.assert_allclose(scan.lpet, head(), rtol=1e-6)
    np.testing.assert_allclose(scan.mr, head(seed=1) * 40, rtol=1e-6)
    np.testing.assert_array_equal(scan.spet, scan.lpet)
    np.testing.assert_array_equal(scan.mask, head() > 0.5)
    np.testing.assert_allclose(scan.affine, affine_of("RAS", 2.0, SHAPE))
    assert (scan.dose_reduction, scan.name, scan.unit) == (10, "lpet", "input unit")
    assert scan.sources["lpet"] == str(files[0])


def test_integers_with_a_slope_are_read_in_their_unit(tmp_path):
    image = nib.Nifti1Image(head(), affine_of("RAS", 2.0, SHAPE))
    image.set_data_dtype(np.int16)  # nibabel picks slope and intercept
    image.to_filename(tmp_path / "scaled.nii")
    np.testing.assert_allclose(
        load_scan(tmp_path / "scaled.nii", dose_reduction=20).lpet, head(), atol=head().max() / 2**15
    )


def test_a_trailing_axis_of_one_is_no_fourth_dimension(tmp_path):
    path = write(tmp_path / "one_frame.nii.gz", head()[..., None])
    assert load_scan(path, dose_reduction=20).lpet.shape == SHAPE


def cut(path, share):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    return path


def broken(tmp_path, case):
    """A file that will not do -> its path, the exception, and what the sentence says beside the path."""
    path = tmp_path / "pet.nii.gz"
    bad_affine = {"tiny voxels": np.diag([1e-3, 1e-3, 1e-3, 1]), "huge voxels": np.diag([50.0, 2, 2, 1])}
    data = {
        "4-D": np.ones((8, 8, 8, 3), np.float32),
        "1-D": np.ones(8, np.float32),
        "NaN": spoiled(np.nan),
        "inf": spoiled(-np.inf),
        "zeros": np.zeros(SHAPE, np.float32),
        "negative": head() - 2,
        "complex": head().astype(np.complex64),
    }
    if case in data:
        found = {
            "4-D": r"\(8, 8, 8, 3\)",
            "1-D": r"\(8,\)",
            "NaN": "1 NaN",
            "inf": "1 NaN or infinite",
            "zeros": "only zeros",
            "negative": "-2",
            "complex": "complex64",
        }
        return write(path, data[case], np.diag([2.0, 2, 2, 1])), ValueError, "found .*" + found[case]
    if case in bad_affine:
        return write(path, head(), bad_affine[case]), ValueError, "expected voxels of 0.4 to 10.0 mm"
    if case == "singular affine":
        image = nib.Nifti1Image(head(), None)
        image.header["sform_code"], image.header["srow_x"] = 1, [2, 2, 0, 0]
        image.header["srow_y"], image.header["srow_z"] = [0, 0, 0, 0], [0, 0, 2, 0]
        raw = bytearray(image.to_bytes())
        raw[:348] = image.header.binaryblock
        path = tmp_path / "pet.nii"
        path.write_bytes(raw)
        return path, ValueError, "expected an affine that maps voxels to mm, found a singular one; repair"
    if case == "missing":
        return path, OSError, "expected a NIfTI file, found nothing; check the path"
    if case == "folder":
        path.mkdir()
        return path, OSError, "expected a NIfTI file, found a folder; check the path"
    if case == "truncated .nii.gz":
        return cut(write(path, head()), 0.6), OSError, "expected a whole NIfTI file, found a truncated or damaged one"
    if case == "truncated .nii":
        return cut(write(tmp_path / "pet.nii", head()), 0.6), OSError, "expected a whole NIfTI file, found a truncated"
    if case == "truncated in its header":
        return cut(write(tmp_path / "pet.nii", head()), 0.002), OSError, "expected a (whole )?NIfTI file"
    if case == "flipped bytes":
        raw = bytearray(write(path, head()).read_bytes())
        raw[len(raw) // 2 : len(raw) // 2 + 64] = bytes(64)
        path.write_bytes(raw)
        return path, OSError, "expected a whole NIfTI file, found a truncated or damaged one"
    if case == "damaged header":
        raw = bytearray(gzip.decompress(write(path, head()).read_bytes()))
        raw[70:72] = (9999).to_bytes(2, "little")  # datatype
        path.write_bytes(gzip.compress(bytes(raw)))
        return path, OSError, "expected a whole NIfTI file, found a truncated or damaged one"
    text = {"empty": b"", "text": b"not an image\n" * 100, "picture": b"\x89PNG\r\n\x1a\n" + bytes(500)}
    path = tmp_path / ("pet.png" if case == "picture" else "pet.nii.gz")
    path.write_bytes(text[case])
    return path, OSError, "expected a (whole )?NIfTI file"


BROKEN = [
    "4-D",
    "1-D",
    "NaN",
    "inf",
    "zeros",
    "negative",
    "complex",
    "tiny voxels",
    "huge voxels",
    "singular affine",
    "missing",
    "folder",
    "truncated .nii.gz",
    "truncated .nii",
    "truncated in its header",
    "flipped bytes",
    "damaged header",
    "empty",
    "text",
    "picture",
]


@pytest.mark.parametrize("case", BROKEN)
def test_load_scan_refuses(tmp_path, case):
    path, kind, message = broken(tmp_path, case)
    with pytest.raises(kind, match=f"{re.escape(str(path))}: .*{message}") as error:
        load_scan(path, dose_reduction=20)
    sentence(error)


@pytest.mark.parametrize("case", [c for c in BROKEN if c not in ("negative", "tiny voxels", "huge voxels")])
def test_load_scan_refuses_the_same_of_the_mr(tmp_path, files, case):
    (tmp_path / "other").mkdir()
    path, kind, message = broken(tmp_path / "other", case)
    if case in ("NaN", "inf", "zeros"):  # of the PET's grid, so that the content is what is wrong
        write(path, nib.load(path).get_fdata().astype(np.float32))
    with pytest.raises(kind, match=f"{re.escape(str(path))}: .*{message}") as error:
        load_scan(files[0], path, dose_reduction=20)
    sentence(error)


def test_a_bad_mr_on_another_grid_is_found_before_interpolation_spreads_it(tmp_path, files):
    path = write(tmp_path / "other.nii.gz", spoiled(np.nan), affine_of("LAS", 2.0, SHAPE))
    with pytest.raises(ValueError, match="other.nii.gz: expected finite values"):
        load_scan(files[0], path, dose_reduction=20)


@pytest.mark.parametrize("offset", [(300.0, 0, 0), (0, 0, -200.0), (60.0, 30.0, 0)])
def test_mr_elsewhere(tmp_path, files, offset):
    affine = affine_of("RAS", 2.0, SHAPE)
    affine[:3, 3] += offset
    path = write(tmp_path / "elsewhere.nii.gz", head(), affine)
    with pytest.raises(
        ValueError,
        match="elsewhere.nii.gz: expected an MR that covers the head in .*lpet.nii.gz, found .*%.*register the MR",
    ) as error:
        load_scan(files[0], path, dose_reduction=20)
    sentence(error)


@pytest.mark.parametrize("role", ["spet", "mask"])
def test_spet_and_mask_must_lie_on_the_lpets_grid(tmp_path, files, role):
    """The same matrix is not the same grid: a mirrored SPET would be compared voxel by voxel with the wrong side."""
    path = write(tmp_path / "mirrored.nii.gz", head(), affine_of("LAS", 2.0, SHAPE))
    with pytest.raises(
        ValueError, match=f"mirrored.nii.gz: expected the grid of {re.escape(str(files[0]))}.*another affine"
    ) as error:
        load_scan(files[0], **{f"{role}_path": path}, dose_reduction=20)
    sentence(error)
    shorter = write(tmp_path / "shorter.nii.gz", head()[..., 1:])
    with pytest.raises(ValueError, match="shorter.nii.gz: expected the (LPET's grid|grid of)"):
        load_scan(files[0], **{f"{role}_path": shorter}, dose_reduction=20)


def test_load_volume_shares_the_checks(tmp_path, files):
    volume, affine = load_volume(files[1])
    np.testing.assert_allclose(volume, head(seed=1) * 40, rtol=1e-6)
    np.testing.assert_allclose(affine, affine_of("RAS", 2.0, SHAPE))
    with pytest.raises(OSError, match="found nothing"):
        load_volume(tmp_path / "none.nii")


# ---- MR on another grid --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "voxel", "shape"),
    [
        ("RAS", 1.0, (90, 96, 60)),
        ("LAS", 1.0, (100, 90, 50)),
        ("PSR", (1.0, 1.2, 0.8), (90, 50, 120)),
        ("RAS", 3.0, (30, 32, 16)),
    ],
)
def test_mr_is_resampled_by_the_affines(tmp_path, files, codes, voxel, shape):
    """A blob at a known place in mm on the MR's grid is there on the PET's grid, with its height and width."""
    affine, place, sigma = affine_of(codes, voxel, shape, centre=(5.0, -4.0, 10.0)), np.array([9.0, -12.0, 6.0]), 8.0
    path = write(tmp_path / "other.nii.gz", blob(shape, affine, place, sigma) + np.float32(0), affine)
    scan = load_scan(files[0], path, dose_reduction=20)
    expected = blob(SHAPE, scan.affine, place, sigma)
    expected *= scan.mr > 0  # a smaller field of view is filled with zeros
    np.testing.assert_allclose(gravity(scan.mr, scan.affine), gravity(expected, scan.affine), atol=0.3)
    # Low-pass to 2 mm voxels and linear interpolation widen 8 mm to at most 8.3 mm: 5 % of the height.
    assert np.abs(scan.mr - expected).max() < 0.06 * 5.0


def test_mr_on_the_pets_grid_is_not_touched(files):
    np.testing.assert_array_equal(
        load_scan(*files, dose_reduction=20).mr, np.asarray(nib.load(files[1]).dataobj, np.float32)
    )


def test_fine_mr_noise_is_averaged_not_picked(tmp_path, files):
    """1 mm noise on 2 mm voxels: without a low-pass each voxel would keep all of it."""
    shape = (96, 100, 56)
    noise = np.random.default_rng(0).normal(100, 10, shape).astype(np.float32)
    mr = load_scan(
        files[0], write(tmp_path / "noise.nii.gz", noise, affine_of("RAS", 1.0, shape)), dose_reduction=20
    ).mr
    inner = mr[4:-4, 4:-4, 4:-4]
    assert inner.mean() == pytest.approx(100, rel=0.01)
    assert inner.std() < 0.45 * 10  # the mean of 8 voxels has 0.35


# ---- working grid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "PSR", "IRP", "ASL"])
@pytest.mark.parametrize("shape", [(40, 44, 18), (33, 51, 20), (64, 64, 16)])
def test_two_millimetre_grids_come_back_bit_for_bit(codes, shape):
    affine = affine_of(codes, 2.0, shape)
    values = head(shape)
    grid = WorkingGrid(Scan(values, affine=affine))
    other = np.random.default_rng(0).random(shape, np.float32)
    box = grid.to(other)
    assert box.shape[0] % 16 == 0 and box.shape[1] % 16 == 0 and not grid.resampled
    np.testing.assert_array_equal(grid.back(box, other), other)
    # Inside the head it is the box that comes back, not `outside`.
    back = grid.back(box, np.full(shape, -1, np.float32))
    inside = back >= 0
    np.testing.assert_array_equal(back[inside], other[inside])
    assert inside[values > 0].all()


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "PSR"])
def test_a_bright_voxel_keeps_its_place_in_mm(codes):
    affine = affine_of(codes, 2.0, SHAPE)
    values = head()
    values[25, 13, 11] = 100
    grid = WorkingGrid(Scan(values, affine=affine))
    box = grid.to(values)
    at = np.array(np.unravel_index(box.argmax(), box.shape))
    at = at - [low for low, _ in grid.pad] + [s.start or 0 for s in grid.box]
    np.testing.assert_allclose(
        nib.affines.apply_affine(grid.affine, at), nib.affines.apply_affine(affine, (25, 13, 11)), atol=1e-4
    )
    assert nib.aff2axcodes(grid.affine) == ("R", "A", "S")


def test_the_model_sees_the_same_head_however_the_file_is_stored():
    boxes = []
    for codes in ("RAS", "LPI", "PSR"):
        image = nib.Nifti1Image(head(), affine_of("RAS", 2.0, SHAPE))
        ornt = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
        )
        stored = image.as_reoriented(ornt)
        scan = Scan(np.asarray(stored.dataobj), affine=stored.affine)
        boxes.append(WorkingGrid(scan).to(scan.lpet))
    np.testing.assert_array_equal(boxes[0], boxes[1])
    np.testing.assert_array_equal(boxes[0], boxes[2])


@pytest.mark.parametrize(
    ("codes", "voxel", "shape"),
    [
        ("RAS", 1.0, (96, 100, 50)),
        ("LAS", 1.5, (64, 66, 34)),
        ("RAS", 3.0, (32, 36, 20)),
        ("LPI", (1.2, 1.2, 3.0), (80, 84, 20)),
        ("PSR", (2.0, 2.5, 1.0), (50, 24, 96)),
    ],
)
def test_other_voxels_survive_the_way_there_and_back(codes, voxel, shape):
    """A blob (sigma 9 mm): total activity within 2 %, voxels within 6 % of the height, its place within 0.2 mm."""
    affine = affine_of(codes, voxel, shape)
    values = blob(shape, affine, (3.0, -5.0, 11.0), 9.0)
    scan = Scan(values, affine=affine)
    grid = WorkingGrid(scan)
    box = grid.to(values)
    back = grid.back(box, values)
    assert grid.resampled and grid.voxel_size == (2, 2, 2) and back.shape == values.shape and back.dtype == np.float32
    volume = np.prod(np.broadcast_to(voxel, 3))
    assert box.sum() * 8 == pytest.approx(values.sum() * volume, rel=0.03)
    assert back.sum() == pytest.approx(values.sum(), rel=0.02)
    assert np.abs(back - values).max() < 0.06 * values.max()
    np.testing.assert_allclose(gravity(back, affine), gravity(values, affine), atol=0.2)
    assert back.min() >= 0


def test_outside_the_box_stands_what_was_given():
    shape, affine = (128, 128, 10), affine_of("RAS", 2.0, (128, 128, 10))
    values = np.zeros(shape, np.float32)
    values[40:80, 50:100] = head((40, 50, 10))
    grid = WorkingGrid(Scan(values, affine=affine))
    assert grid.to(values).shape[0] < 96
    outside = np.full(shape, 7.0, np.float32)
    back = grid.back(np.zeros_like(grid.to(values)), outside)
    assert set(np.unique(back)) == {0.0, 7.0}
    assert (back[values > 0] == 0).all() and (back[:20] == 7).all()
    # The rim of air belongs to the outside: at its edge a convolution sees padding.
    extent = np.ptp(np.argwhere(back == 0), axis=0)[:2] + 1
    assert (extent == np.array(grid.to(values).shape[:2]) - 2 * WorkingGrid.RIM).all()


def test_a_slice_is_a_volume_of_one():
    values = head((60, 70, 9))[..., 4]
    scan = Scan(values, voxel_size=2.0)
    grid = WorkingGrid(scan)
    assert grid.to(scan.lpet).shape[2] == 1
    np.testing.assert_array_equal(scan.like_input(grid.back(grid.to(scan.lpet), scan.lpet)), values)


# ---- scales --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doses():
    """One patient at DRF 4 and at DRF 100."""
    patient = virtual_patient(load_anatomy("ahba-9861"), 2, slices=6)
    return [Scanner().scan(patient, dose) for dose in (4, 100)]


def test_activity_scale_is_linear():
    one = ActivityScale(head(), (2.0, 2.0, 2.0))
    for factor in (0.01, 3.0, 1e4):
        scaled = ActivityScale(head() * np.float32(factor), (2.0, 2.0, 2.0))
        assert scaled.value == pytest.approx(factor * one.value, rel=1e-5)
        np.testing.assert_array_equal(scaled.mask, one.mask)
    assert one.apply(head())[one.mask].mean() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(one.invert(one.apply(head())), head(), rtol=1e-5)
    assert one.invert(np.array([-0.5]))[0] == 0  # activity is never negative


def test_activity_scale_does_not_depend_on_the_dose(doses):
    low, high = (ActivityScale(scan.lpet, scan.voxel_size) for scan in doses)
    assert low.value == pytest.approx(high.value, rel=0.03)
    assert low.value == pytest.approx(ActivityScale(doses[0].spet, (2.0, 2.0, 2.0)).value, rel=0.03)
    for scale, scan in zip((low, high), doses, strict=True):
        assert (
            2 * np.count_nonzero(scale.mask & scan.mask) / (np.count_nonzero(scale.mask) + np.count_nonzero(scan.mask))
            > 0.8
        )  # Dice; the rough mask keeps the ventricles


def test_mr_scale_is_blind_to_gain_and_inside_to_offset(doses):
    mr, brain = doses[0].mr, doses[0].mask
    scaled = scale_mr(mr, brain)
    inside = brain & (np.abs(scaled) < 2.9) & (mr > 0)
    assert scaled[inside].std() == pytest.approx(1, rel=0.1) and abs(scaled[inside].mean()) < 0.1
    np.testing.assert_allclose(scale_mr(7.5 * mr, brain), scaled, atol=1e-4)
    np.testing.assert_allclose(scale_mr(mr + 50, brain)[inside], scaled[inside], atol=1e-4)
    np.testing.assert_allclose(scaled[inside], ((mr - mr[brain].mean()) / mr[brain].std())[inside], atol=1e-4)
    assert scaled.min() >= -3 and scaled.max() <= 4 and not scaled[mr == 0].any()


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_no_mr_signal_is_all_zeros(value):
    brain = head() > 2
    scaled = scale_mr(np.full(SHAPE, value, np.float32), brain)
    np.testing.assert_array_equal(scaled, np.zeros(SHAPE))


def test_a_bright_skull_does_not_move_the_mr_scale(doses):
    mr, brain = doses[0].mr, doses[0].mask
    skull = np.where(brain, mr, 30 * mr.max()).astype(np.float32)
    np.testing.assert_allclose(scale_mr(skull, brain)[brain], scale_mr(mr, brain)[brain], atol=1e-5)


# ---- writing -------------------------------------------------------------------------------------------------------


def test_save_volume_round_trip(tmp_path, files):
    scan = load_scan(*files, dose_reduction=20)
    for name in ("out.nii.gz", "out.nii"):
        path = save_volume(tmp_path / name, 1.5 * scan.lpet, scan)
        image = nib.load(path)
        assert image.get_data_dtype() == np.float32 and image.header.get_slope_inter() in ((1, 0), (None, None))
        np.testing.assert_array_equal(np.asarray(image.dataobj), 1.5 * scan.lpet)
        np.testing.assert_array_equal(image.affine, scan.affine)
        assert image.header.get_xyzt_units()[0] == nib.load(files[0]).header.get_xyzt_units()[0]


def test_save_volume_of_an_integer_file_is_not_rounded(tmp_path):
    image = nib.Nifti1Image(head(), affine_of("LAS", 1.5, SHAPE))
    image.set_data_dtype(np.int16)
    image.to_filename(tmp_path / "int.nii.gz")
    scan = load_scan(tmp_path / "int.nii.gz", dose_reduction=20)
    path = save_volume(tmp_path / "out.nii.gz", scan.lpet / 3, scan)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), scan.lpet / 3)
    np.testing.assert_allclose(nib.load(path).affine, affine_of("LAS", 1.5, SHAPE), atol=1e-4)


def test_save_volume_of_arrays_and_slices(tmp_path):
    scan = Scan(head()[..., 9], voxel_size=(2, 2, 4))
    image = nib.load(save_volume(tmp_path / "slice.nii.gz", scan.like_input(scan.lpet), scan))
    assert image.shape == (40, 44, 1)
    np.testing.assert_allclose(image.header.get_zooms(), (2, 2, 4))


def test_save_volume_never_overwrites_unless_told(tmp_path):
    path, scan = tmp_path / "out.nii.gz", Scan(head())
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="out.nii.gz: exists already; choose another name or pass --force"):
        save_volume(path, scan.lpet, scan)
    assert path.read_bytes() == b"precious"
    save_volume(path, scan.lpet, scan, force=True)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), scan.lpet)
    assert [p.name for p in tmp_path.iterdir()] == ["out.nii.gz"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("cut"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, fault):
    """The writer puts half of the file down and fails: no half file, no partial file, and what was there stays."""
    path, scan = tmp_path / "out.nii.gz", Scan(head())
    save_volume(path, scan.lpet, scan)
    before = path.read_bytes()

    def half(self, name, *args, **kwargs):
        with open(name, "wb") as stream:
            stream.write(before[: len(before) // 2])
        raise fault

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", half)
    for target in (path, tmp_path / "new.nii.gz"):
        with pytest.raises(type(fault)) as error:
            save_volume(target, scan.lpet, scan, force=True)
        if isinstance(fault, OSError):
            assert str(target) in str(error.value) and "No space left" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out.nii.gz"] and path.read_bytes() == before


def test_save_volume_wants_a_name_and_a_folder(tmp_path):
    scan = Scan(head())
    with pytest.raises(ValueError, match="out.img: expected a name that ends in .nii.gz or .nii"):
        save_volume(tmp_path / "out.img", scan.lpet, scan)
    with pytest.raises(
        FileNotFoundError, match="none: expected a folder to write out.nii into, found none; create it first"
    ):
        save_volume(tmp_path / "none" / "out.nii", scan.lpet, scan)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_replaced_by_a_file(tmp_path):
    (tmp_path / "out.nii.gz").mkdir()
    with pytest.raises(OSError, match="out.nii.gz: expected a file to write, found a folder"):
        save_volume(tmp_path / "out.nii.gz", head(), Scan(head()), force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.nii.gz"] and list((tmp_path / "out.nii.gz").iterdir()) == []


def test_whole_file_appears_only_at_the_end(tmp_path):
    path = tmp_path / "note.txt"
    with whole_file(path) as partial:
        partial.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it" and list(tmp_path.iterdir()) == [path]


def test_no_warning_on_good_files(files):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WorkingGrid(load_scan(*files, dose_reduction=20))


# ---- count halves --------------------------------------------------------------------------------------------------


def test_halves_are_checked_like_the_lpet(tmp_path):
    lpet = head()
    scan = Scan(lpet, halves=[lpet * 0.9, lpet * 1.1])
    assert [h.dtype for h in scan.halves] == [np.float32] * 2
    with pytest.raises(ValueError, match="expected two images"):
        Scan(lpet, halves=[lpet])
    with pytest.raises(ValueError, match="halves: expected the LPET's grid"):
        Scan(lpet, halves=[lpet, lpet[:-1]])
    with pytest.raises(ValueError, match="halves: expected finite"):
        Scan(lpet, halves=[lpet, np.where(lpet > 0, np.nan, 0)])


def test_halves_are_read_from_files_on_the_lpets_grid(files, tmp_path):
    scan = load_scan(*files, dose_reduction=20, half_paths=(files[0], files[0]))
    np.testing.assert_array_equal(scan.halves[1], scan.lpet)
    other = write(tmp_path / "other.nii.gz", head()[:-1], affine_of("RAS", 2.0, head()[:-1].shape))
    with pytest.raises(ValueError, match="other.nii.gz: expected the grid of"):
        load_scan(*files, dose_reduction=20, half_paths=(files[0], other))


# ---- what came in goes back, and what is not said is said ----------------------------------------------------------


def test_replace_keeps_the_kind_and_the_dimension_that_came_in():
    """Today's fault: a torch slice, replaced, gave (X, Y, 1) NumPy back."""
    slice_of = torch.from_numpy(head()[..., 5])
    scan = dataclasses.replace(Scan(slice_of, voxel_size=2.5), dose_reduction=4.0)
    back = scan.like_input(scan.lpet)
    assert isinstance(back, torch.Tensor) and back.shape == slice_of.shape
    assert scan.voxel_size == (2.5, 2.5, 2.5) and scan.dose_reduction == 4.0


def test_a_scan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scan(head()).second = head()


def test_files_do_not_say_their_dose_and_a_guess_is_not_silent(files):
    with pytest.warns(UserWarning, match="lpet.nii.gz: expected its dose-reduction factor, .*20 is assumed"):
        assert load_scan(*files).dose_reduction == 20
    unknown = load_scan(*files, dose_reduction=float("nan"))
    with pytest.raises(ValueError, match="lpet: expected its dose-reduction factor, found it unknown"):
        ModelView(unknown, context=3)


@pytest.mark.parametrize(
    ("context", "depth", "z", "expected"),
    [(5, 1, 0, [0, 0, 0, 0, 0]), (5, 3, 0, [0, 0, 0, 1, 2]), (5, 3, 2, [0, 1, 2, 2, 2]), (3, 9, 4, [3, 4, 5])],
)
def test_the_edge_rule_repeats_the_end_slices(context, depth, z, expected):
    assert neighbours(z, context, 0, depth - 1).tolist() == expected
    view = ModelView(Scan(head()[..., 4 : 4 + depth]), context)
    slices = view.slices(np.array([z]))["lpet"][0]
    np.testing.assert_array_equal(view.cut(slices), np.moveaxis(view.lpet[..., expected], -1, 0))


def test_threads_that_write_one_file_do_not_share_its_partial(tmp_path):
    """Today's fault: the partial was named after the process alone."""
    gate, names = threading.Barrier(2), []

    def write_one(text):
        with whole_file(tmp_path / "one.txt") as partial:
            partial.write_text(text)
            names.append(partial.name)
            gate.wait(10)

    threads = [threading.Thread(target=write_one, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 2 and (tmp_path / "one.txt").read_text() in "ab"
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]
