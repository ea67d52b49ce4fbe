"""The command line: good files give whole results; bad ones one sentence, exit status 2 and nothing written."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
from nibabel.processing import resample_from_to
from scipy import ndimage
from skimage.metrics import structural_similarity
from test_scan import BROKEN, affine_of, broken, head, write
from typer.testing import CliRunner

from mfdiff_lite import __main__ as cli
from mfdiff_lite import stage2
from mfdiff_lite.config import Adaptation, load_profile
from mfdiff_lite.files import load_scan
from mfdiff_lite.model import MFdiff, load_model, save_model
from mfdiff_lite.readers.cases import find_cases

NAMES = ("lpet", "spet", "mr", "activity", "mask", "tissues", "lesions", "half_a", "half_b")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def process(*arguments, **environment):
    """The command in a process of its own: exit status, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "mfdiff_lite", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def tree(folder):
    """Every file and folder below, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(result, *parts):
    """Exit status 2 and one line on stderr that says all the parts."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("drawing the patient")]
    assert len(lines) == 1 and lines[0].startswith("mfdiff_lite: "), result.stderr
    assert "Traceback" not in result.output
    for part in parts:
        assert re.search(part, lines[0]), (part, lines[0])
    return lines[0]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """An untrained model of the smallest size."""
    return save_model(
        MFdiff.from_profile(load_profile("smoke")),
        tmp_path_factory.mktemp("weights") / "tiny.safetensors",
        {"revision": "test", "steps": 0},
    )


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """A simulated case of four slices, made by the command."""
    folder = tmp_path_factory.mktemp("case") / "new" / "folder"
    result = run(
        "simulate", "--out", folder, "--anatomy", "ahba-15697", "--seed", 3, "--slices", 4, "--dose-reduction", 10
    )
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def restored(case, weights, tmp_path_factory):
    """The case restored with all outputs."""
    out = tmp_path_factory.mktemp("restored")
    result = run(
        "restore",
        "--lpet",
        case / "lpet.nii.gz",
        "--mr",
        case / "mr.nii.gz",
        "--out",
        out / "restored.nii.gz",
        "--std",
        out / "std.nii.gz",
        "--report",
        out / "report.html",
        "--samples",
        2,
        "--dose-reduction",
        10,
        "--weights",
        weights,
    )
    assert result.exit_code == 0, result.output
    return out, result


@pytest.fixture
def files(tmp_path):
    """A PET and an MR in a folder of their own, and an empty folder for results."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return (
        write(tmp_path / "in" / "lpet.nii.gz", head()),
        write(tmp_path / "in" / "mr.nii.gz", head(seed=1)),
        tmp_path / "out",
    )


def restore(lpet, mr, out, weights, *more):
    return run(
        "restore", "--lpet", lpet, "--mr", mr, "--out", out, "--weights", weights, "--samples", 1, "--steps", 1, *more
    )


# ---- the good road -------------------------------------------------------------------------------------------------


def test_version_says_which_code_it_is():
    done = run("--version")
    assert done.exit_code == 0 and re.fullmatch(r"mfdiff_lite \S+ \(revision \S+\)", done.stdout.strip())


def test_restore_without_an_mr_is_from_pet_alone(tmp_path, files, weights):
    """Today's fault: --mr was required, though the library can do without."""
    lpet, _, out = files
    target = out / "alone.nii.gz"
    done = run("restore", "--lpet", lpet, "--out", target, "--weights", weights, "--samples", 1, "--dose-reduction", 20)
    assert done.exit_code == 0, done.output
    alone = load_model(weights, "cpu").restore(load_scan(lpet, dose_reduction=20), 1).mean
    np.testing.assert_allclose(nib.load(target).get_fdata(), alone, atol=1e-4)
    assert "MR" not in done.stderr  # what the checks say of so plain a head is another matter


def test_a_dose_that_is_not_given_is_assumed_aloud(files, weights):
    lpet, mr, out = files
    done = restore(lpet, mr, out / "out.nii.gz", weights)
    assert done.exit_code == 0 and "mfdiff_lite: warning: " in done.stderr
    assert re.search(
        "expected its dose-reduction factor, found none given; 20 is assumed.*--dose-reduction", done.stderr
    )
    told = restore(lpet, mr, out / "told.nii.gz", weights, "--dose-reduction", 20)
    assert told.exit_code == 0 and "none given" not in told.stderr


def test_simulate_writes_a_whole_case(case):
    assert sorted(p.name for p in case.iterdir()) == sorted([*(f"{n}.nii.gz" for n in NAMES), "scan.json"])
    images = {name: nib.load(case / f"{name}.nii.gz") for name in NAMES}
    volumes = {name: image.get_fdata() for name, image in images.items()}
    note = json.loads((case / "scan.json").read_text())
    for image in images.values():
        assert image.shape == (128, 128, 4)
        np.testing.assert_array_equal(image.affine, images["lpet"].affine)
    assert (note["anatomy"], note["seed"], note["dose_reduction"], note["shift"], note["unit"]) == (
        "ahba-15697",
        3,
        10,
        None,
        "kBq/mL",
    )
    assert {"psf_fwhm", "trues_per_mm3"} <= set(note["scanner"]) and "simulated" in note["note"]
    mask = volumes["mask"] > 0
    assert volumes["lpet"][mask].mean() == pytest.approx(volumes["spet"][mask].mean(), rel=0.02)
    assert {one["label"] for one in note["lesions"]} == set(np.unique(volumes["lesions"])) - {0}
    white = volumes["activity"][ndimage.binary_erosion(volumes["tissues"] == 2) & (volumes["lesions"] == 0)]
    assert np.median(white) == pytest.approx(note["truth"]["white"], rel=0.15)
    # LPET noise against SPET noise: sqrt(10) in counts; in images of both against the truth at least well above.
    error = {k: np.std((volumes[k] - ndimage.gaussian_filter(volumes["activity"], 1))[mask]) for k in ("lpet", "spet")}
    assert error["lpet"] > 1.8 * error["spet"]


def test_simulate_is_reproducible_and_shifts(case, tmp_path):
    same = ["--anatomy", "ahba-15697", "--seed", 3, "--slices", 4, "--dose-reduction", 10]
    assert run("simulate", "--out", tmp_path / "same", *same).exit_code == 0
    assert run("simulate", "--out", tmp_path / "shifted", *same, "--shift", "edge-scanner").exit_code == 0
    for name in NAMES:
        a, b, c = (
            np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj)
            for folder in (case, tmp_path / "same", tmp_path / "shifted")
        )
        np.testing.assert_array_equal(a, b)
        assert np.array_equal(a, c) == (name not in ("lpet", "spet", "half_a", "half_b"))
    assert json.loads((tmp_path / "shifted" / "scan.json").read_text())["scanner"]["psf_fwhm"] == 6.2


def test_restore_writes_on_the_grid_of_the_lpet(case, restored):
    out, result = restored
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "restored.json", "restored.nii.gz", "std.nii.gz"]
    lpet = nib.load(case / "lpet.nii.gz")
    for name in ("restored", "std"):
        image = nib.load(out / f"{name}.nii.gz")
        volume = np.asarray(image.dataobj)
        assert image.shape == lpet.shape and image.get_data_dtype() == np.float32
        np.testing.assert_array_equal(image.affine, lpet.affine)
        assert np.isfinite(volume).all() and volume.min() >= 0 and volume.max() > 0
        assert f"wrote {out / f'{name}.nii.gz'}" in result.stdout
    assert "revision test, 0 steps" in result.stdout and "(128, 128, 4)" in result.stdout


def test_report_is_one_page_that_needs_nothing_else(restored, case):
    page = (restored[0] / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>") and "</html>" in page
    assert "data:image/jpeg;base64," in page and str(case / "lpet.nii.gz") in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", page)
    digest = hashlib.sha256((case / "lpet.nii.gz").read_bytes()).hexdigest()
    assert digest[:32] in page and "not a medical device" in page
    assert "revision test, 0 steps" in page and "possible images that were drawn" in page


def test_view_writes_a_page_of_any_images(case, tmp_path):
    paths = case / "lpet.nii.gz", case / "mr.nii.gz"
    result = run("view", *paths, "--out", tmp_path / "v.html")
    assert result.exit_code == 0 and f"file://{tmp_path}/v.html" in result.stdout
    page = (tmp_path / "v.html").read_text("utf-8")
    assert "LPET, MR; axial slice" in page and "</html>" in page
    refused(run("view", *paths, "--out", tmp_path / "v.html"), "exists already")
    refused(run("view", paths[0], paths[0], "--out", tmp_path / "w.html"), "expected files of different names")


def test_same_seed_same_result(case, restored, weights, tmp_path):
    arguments = [
        "--lpet",
        case / "lpet.nii.gz",
        "--mr",
        case / "mr.nii.gz",
        "--samples",
        2,
        "--dose-reduction",
        10,
        "--weights",
        weights,
    ]
    for seed, equal in ((0, True), (1, False)):
        assert run("restore", "--out", tmp_path / f"{seed}.nii", *arguments, "--seed", seed).exit_code == 0
        a, b = (
            np.asarray(nib.load(path).dataobj) for path in (tmp_path / f"{seed}.nii", restored[0] / "restored.nii.gz")
        )
        assert np.array_equal(a, b) == equal


def test_evaluate_prints_and_writes_the_right_numbers(case, restored, tmp_path):
    """The JSON against metrics written out again here."""
    path = tmp_path / "numbers.json"
    result = run(
        "evaluate",
        "--lpet",
        case / "lpet.nii.gz",
        "--spet",
        case / "spet.nii.gz",
        "--restored",
        restored[0] / "restored.nii.gz",
        "--mask",
        case / "mask.nii.gz",
        "--json",
        path,
    )
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    lpet, spet, mask = (nib.load(case / f"{n}.nii.gz").get_fdata() for n in ("lpet", "spet", "mask"))
    mask = mask > 0.5
    sd = 4.5 / (2 * np.sqrt(2 * np.log(2))) / 2.0
    images = {
        "LPET": lpet,
        "Gaussian": ndimage.gaussian_filter(lpet, sd, mode="nearest"),
        "restored": nib.load(restored[0] / "restored.nii.gz").get_fdata(),
    }
    assert found["against"] == "spet" and set(found["images"]) == set(images)
    top = np.percentile(spet[mask], 99.9)
    for name, image in images.items():
        error = (image - spet)[mask]
        maps = [
            structural_similarity(
                image[..., z],
                spet[..., z],
                data_range=top,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                full=True,
            )[1]
            for z in range(4)
        ]
        expected = {
            "psnr": 10 * np.log10(top**2 / np.mean(error**2)),
            "nrmse": np.sqrt(np.sum(error**2) / np.sum(spet[mask] ** 2)),
            "activity_bias": image[mask].sum() / spet[mask].sum() - 1,
            "ssim": np.stack(maps, -1)[mask].mean(),
        }
        assert set(found["images"][name]) == set(expected)
        for key, value in expected.items():
            assert found["images"][name][key] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, key)
        assert f"{found['images'][name]['psnr']:.2f}" in result.stdout


def test_evaluate_without_a_mask_uses_the_lpets(case, restored, tmp_path):
    arguments = ["--lpet", case / "lpet.nii.gz", "--spet", case / "spet.nii.gz", "--json", tmp_path / "n.json"]
    assert run("evaluate", *arguments, "--restored", restored[0] / "restored.nii.gz").exit_code == 0
    assert json.loads((tmp_path / "n.json").read_text())["mask"] == "rough, from the LPET"
    # A perfect result: infinite PSNR, which JSON cannot say.
    assert run("evaluate", *arguments, "--restored", case / "spet.nii.gz", "--force").exit_code == 0
    row = json.loads((tmp_path / "n.json").read_text(), parse_constant=pytest.fail)["images"]["restored"]
    assert row["psnr"] is None and row["nrmse"] == 0


def test_real_world_grids(case, weights, tmp_path):
    """LPET in LAS at 1.5 mm, MR in RAS at 1 mm with another field of view: the result lies where the LPET lies."""
    pet, mr = nib.load(case / "lpet.nii.gz"), nib.load(case / "mr.nii.gz")
    middle = nib.affines.apply_affine(pet.affine, (np.array(pet.shape) - 1) / 2)
    shape, mr_shape = (110, 130, 5), (170, 190, 9)
    las = resample_from_to(pet, (shape, affine_of("LAS", 1.5, shape, middle)), order=1)
    fine = resample_from_to(mr, (mr_shape, affine_of("RAS", 1.0, mr_shape, middle + [3, -4, 0])), order=1)
    las.set_data_dtype(np.float32)
    las.to_filename(tmp_path / "lpet.nii.gz")
    fine.to_filename(tmp_path / "mr.nii.gz")
    result = run(
        "restore",
        "--lpet",
        tmp_path / "lpet.nii.gz",
        "--mr",
        tmp_path / "mr.nii.gz",
        "--out",
        tmp_path / "out.nii.gz",
        "--weights",
        weights,
        "--samples",
        2,
        "--std",
        tmp_path / "std.nii",
        "--fidelity",
        1,
    )
    assert result.exit_code == 0, result.output
    lpet = nib.load(tmp_path / "lpet.nii.gz")
    for name in ("out.nii.gz", "std.nii"):
        image = nib.load(tmp_path / name)
        assert (
            image.shape == shape
            and image.get_data_dtype() == np.float32
            and nib.aff2axcodes(image.affine) == ("L", "A", "S")
        )
        np.testing.assert_allclose(image.affine, lpet.affine, atol=1e-5)
    out, given = np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj), np.asarray(lpet.dataobj)
    smooth = ndimage.gaussian_filter(given, 2)
    assert np.corrcoef(ndimage.gaussian_filter(out, 2).ravel(), smooth.ravel())[0, 1] > 0.95
    assert (
        np.corrcoef(ndimage.gaussian_filter(out, 2)[::-1].ravel(), smooth.ravel())[0, 1] < 0.95
    )  # mirrored it would not fit
    shift = np.subtract(ndimage.center_of_mass(out), ndimage.center_of_mass(given)) * 1.5
    assert np.abs(shift).max() < 1.0  # mm


# ---- bad images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BROKEN)
def test_restore_refuses_a_bad_lpet(tmp_path, files, weights, bad):
    _, mr, out = files
    path, _, message = broken(tmp_path, bad)
    before = tree(tmp_path)
    refused(restore(path, mr, out / "out.nii.gz", weights), re.escape(str(path)), message, ";")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("bad", ["4-D", "missing", "truncated .nii.gz", "text", "complex", "singular affine"])
def test_restore_refuses_a_bad_mr(tmp_path, files, weights, bad):
    lpet, _, out = files
    path, _, message = broken(tmp_path, bad)
    before = tree(tmp_path)
    refused(restore(lpet, path, out / "out.nii.gz", weights), re.escape(str(path)), message)
    assert tree(tmp_path) == before


def test_restore_refuses_an_mr_that_is_elsewhere(tmp_path, files, weights):
    affine = affine_of("RAS", 2.0, head().shape)
    affine[:3, 3] += 500
    far = write(tmp_path / "in" / "far.nii.gz", head(), affine)
    before = tree(tmp_path)
    refused(
        restore(files[0], far, files[2] / "out.nii.gz", weights),
        "far.nii.gz: expected an MR that covers the head in .*lpet.nii.gz, found 0%",
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("role", "bad"),
    [
        (role, bad)
        for role in ("lpet", "spet", "restored", "mask")
        for bad in ("missing", "truncated .nii.gz", "NaN", "4-D", "mirrored", "cropped")
        if (role, bad) != ("mask", "NaN")  # NaN is not above 0.5: outside the mask
    ],
)
def test_evaluate_refuses(tmp_path, files, role, bad):
    if bad == "mirrored":
        path, message = write(tmp_path / "pet.nii.gz", head(), affine_of("LAS", 2.0, head().shape)), "another affine"
    elif bad == "cropped":
        path, message = write(tmp_path / "pet.nii.gz", head()[1:]), r"\(39, 44, 18\)"
    else:
        path, _, message = broken(tmp_path, bad)
    if bad == "NaN":  # on the grid of the others, so that the content is what is wrong
        write(path, nib.load(path).get_fdata().astype(np.float32))
        message = "expected finite values, found .*NaN"
    paths = {"lpet": files[0], "spet": files[0], "restored": files[0], role: path}
    before = tree(tmp_path)
    arguments = [part for key, value in paths.items() for part in (f"--{key}", value)]
    line = refused(run("evaluate", *arguments, "--json", files[2] / "n.json"), message)
    assert str(path) in line
    assert tree(tmp_path) == before


def test_evaluate_refuses_an_empty_mask(tmp_path, files):
    empty = write(tmp_path / "empty.nii.gz", np.zeros_like(head()))
    refused(
        run("evaluate", "--lpet", files[0], "--spet", files[0], "--restored", files[0], "--mask", empty),
        "empty.nii.gz: expected a brain mask",
    )


# ---- bad weights, settings and places ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["missing", "truncated", "text", "empty", "no card", "other sizes", "folder"])
def test_restore_refuses_bad_weights(tmp_path, files, weights, bad):
    from safetensors.torch import load_file, save_file

    path, raw = tmp_path / "w.safetensors", weights.read_bytes()
    if bad == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif bad in ("text", "empty"):
        path.write_bytes(b"weights " * 100 if bad == "text" else b"")
    elif bad == "folder":
        path.mkdir()
    elif bad != "missing":
        card = {"model": {"fusion_widths": [8, 16, 32], "denoiser_widths": [16, 32, 64], "context": 3}}
        save_file(load_file(weights), path, metadata=None if bad == "no card" else {"card": json.dumps(card)})
    before = tree(tmp_path)
    refused(
        restore(*files[:2], files[2] / "out.nii.gz", path),
        re.escape(str(path)) + ": expected (a weights file|weights saved by this package), found",
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dose-reduction", "0.5"], "dose_reduction: expected .* 1 to 200 .*found 0.5"),
        (["--dose-reduction", "nan"], "dose_reduction: .*found nan"),
        (["--samples", "-1"], "n_samples: expected 0 to 1000, found -1"),
        (["--quality", "best"], "--quality: expected one of fast, standard, full, found 'best'"),
        (["--steps", "0"], "steps"),
        (["--fidelity", "1.5"], "fidelity: expected 0 to 1, found 1.5"),
        (["--seed", "-1"], "--seed: expected 0 to 4294967295, found -1"),
        (["--device", "abacus"], "device: expected one that this machine has, found 'abacus'"),
        (["--std", "{out}/std.nii.gz"], "--std: expected --samples of at least 2, found 1"),
        (["--std", "{out}/std.img", "--samples", "2"], "std.img: expected a name that ends in .nii.gz or .nii"),
        (["--std", "{out}/out.nii.gz", "--samples", "2"], "out.nii.gz: expected outputs that differ"),
    ],
)
def test_restore_refuses_bad_settings(tmp_path, files, weights, arguments, message):
    before = tree(tmp_path)
    arguments = [a.format(out=files[2]) for a in arguments]
    refused(restore(*files[:2], files[2] / "out.nii.gz", weights, *arguments), message)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("arguments", [["--samples", "many"], ["--colour", "red"], ["--dose-reduction"]])
def test_bad_usage_is_status_2(files, weights, arguments):
    result = restore(*files[:2], files[2] / "out.nii.gz", weights, *arguments)
    assert result.exit_code == 2 and arguments[0] in result.stderr and "Traceback" not in result.stderr


def test_existing_outputs_need_force(tmp_path, files, weights):
    lpet, mr, out = files
    target = out / "out.nii.gz"
    target.write_bytes(b"precious")
    before = tree(tmp_path)
    refused(restore(lpet, mr, target, weights), "out.nii.gz: exists already; choose another name or pass --force")
    assert tree(tmp_path) == before
    result = restore(lpet, mr, target, weights, "--force")
    assert result.exit_code == 0, result.output
    assert nib.load(target).shape == head().shape
    assert sorted(p.name for p in out.iterdir()) == ["out.json", "out.nii.gz"]


def test_simulate_and_evaluate_need_force_too(case, tmp_path):
    before = tree(case)
    refused(
        run("simulate", "--out", case, "--slices", 2),
        "lpet.nii.gz: exists already; choose another --out or pass --force",
    )
    path = tmp_path / "n.json"
    path.write_text("precious")
    lpet, spet = case / "lpet.nii.gz", case / "spet.nii.gz"
    refused(
        run("evaluate", "--lpet", lpet, "--spet", spet, "--restored", spet, "--json", path), "n.json: exists already"
    )
    assert tree(case) == before and path.read_text() == "precious"


def test_an_output_is_never_an_input(tmp_path, files, weights):
    lpet, mr, _ = files
    link = tmp_path / "link.nii.gz"
    link.symlink_to(lpet)
    before = tree(tmp_path)
    for target in (lpet, mr, link, lpet.parent / ".." / "in" / "lpet.nii.gz"):
        refused(
            restore(lpet, mr, target, weights, "--force"),
            "expected outputs that differ from each other and from the inputs",
        )
    refused(
        restore(lpet, mr, tmp_path / "o.nii", weights, "--force", "--report", weights), "expected outputs that differ"
    )
    refused(
        run("evaluate", "--lpet", lpet, "--spet", mr, "--restored", mr, "--json", lpet, "--force"),
        "expected outputs that differ",
    )
    assert tree(tmp_path) == before and weights.stat().st_size > 1e5


@pytest.mark.parametrize("place", ["below a file", "no such folder", "a folder"])
def test_restore_refuses_a_place_it_cannot_write(tmp_path, files, weights, place):
    # Root may write anywhere: a path below a regular file stops even root.
    target = {
        "below a file": files[0] / "out.nii.gz",
        "no such folder": tmp_path / "none" / "out.nii.gz",
        "a folder": tmp_path / "folder.nii.gz",
    }[place]
    if place == "a folder":
        target.mkdir()
    before = tree(tmp_path)
    refused(restore(*files[:2], target, weights, "--force"), "expected a (folder|file|place) to write", "; ")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["simulate", "train"])
@pytest.mark.parametrize("below", [False, True])
def test_folders_that_cannot_be_made(tmp_path, command, below):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "folder" if below else tmp_path / "file"
    before = tree(tmp_path)
    refused(
        run(command, "--out", target),
        re.escape(str(target)) + ": expected a folder to write into, found a file at .*file; choose another --out",
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slices", "0"], "--slices: expected 1 to 500, found 0"),
        (["--seed", "-1"], "--seed: expected 0 to 4294967295, found -1"),
        (["--anatomy", "atlantis"], "'atlantis' is not known; expected one of icbm152"),
        (["--shift", "winter"], "shift: expected one of edge-scanner, low-contrast, amyloid, .*, found 'winter'"),
        (["--dose-reduction", "0.2", "--slices", "1"], "dose_reduction: .*found 0.2"),
        (["--dose-reduction", "inf", "--slices", "1"], "dose_reduction: .*found inf"),
    ],
)
def test_simulate_refuses(tmp_path, arguments, message):
    refused(run("simulate", "--out", tmp_path / "new", *arguments), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepps=3"], "unknown key 'stepps'; known keys are .*steps"),
        (["name=mine"], "unknown key 'name'"),
        (["=3"], "unknown key ''"),
        (["steps"], "steps: expected key=value, found no '='"),
        (["steps=many"], "steps: expected int, found 'many'"),
        (["steps=0"], "steps: expected 1 to 10000000, found 0"),
        (["dose_range=20"], "dose_range: expected"),
        (["--profile", "huge"], "profile: expected one of smoke, cpu, gpu, found 'huge'"),
        (["--device", "abacus"], "device: expected"),
    ],
)
def test_train_refuses(tmp_path, arguments, message):
    refused(run("train", "--out", tmp_path / "run", "--profile", "smoke", *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_an_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path / "file" / "cache"))
    refused(
        run("train", "--out", tmp_path / "run", "--profile", "smoke"),
        "file/cache/.*: expected a writable cache, found .*; set MFDIFF_CACHE",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- what may still go wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; nothing half-written"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("a\nb"), 1, r"internal fault \(RuntimeError: a b\); set MFDIFF_DEBUG=1"),
    ],
)
def test_faults_have_their_status_and_no_traceback(files, weights, monkeypatch, fault, status, message):
    def fail(*args, **kwargs):
        raise fault

    monkeypatch.delenv("MFDIFF_DEBUG", raising=False)
    monkeypatch.setattr(MFdiff, "restore", fail)
    result = restore(*files[:2], files[2] / "out.nii.gz", weights)
    assert result.exit_code == status and re.search(message, result.stderr) and len(result.stderr.splitlines()) == 1
    assert list(files[2].iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, files, weights, monkeypatch):
    """The write fails half-way: exit 2, the file is named, no partial file stays."""

    def full(self, name, *args, **kwargs):
        with open(name, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    before = tree(tmp_path)
    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full)
    refused(
        restore(*files[:2], files[2] / "out.nii.gz", weights),
        "out.nii.gz: could not be written .No space left on device.; check space",
    )
    assert tree(tmp_path) == before


def test_help_names_every_option_with_its_meaning():
    commands = {
        "restore": cli.restore,
        "restore-all": cli.restore_all,
        "simulate": cli.simulate,
        "evaluate": cli.evaluate,
        "view": cli.view,
        "train": cli.train,
        "adapt": cli.adapt,
        "info": cli.info,
    }
    units = {
        "restore": [
            "3-D NIfTI",
            "any orientation",
            "dose-reduction factor: standard-dose counts / counts of the LPET",
            "SD of the samples",
            "0 to 1",
            "HTML",
        ],
        "restore-all": ["CSV table", "BIDS", "i/n", "skipped"],
        "simulate": ["axial slices", "dose-reduction factor", "(.nii.gz)", "edge-scanner"],
        "adapt": ["two count halves", "an SPET", "key=value", "half of the LPET's counts"],
        "view": ["NIfTI files", "unit of the images"],
        "evaluate": ["on the LPET's grid", "PSNR, SSIM, NRMSE", "brain mask"],
        "train": ["key=value", "smoke (seconds), cpu", "checkpoint"],
        "info": ["Check the environment", "weights"],
    }
    overview = run("--help").stdout
    for name, function in commands.items():
        text = " ".join(run(name, "--help").stdout.split())
        for parameter in inspect.signature(function).parameters:
            option = {
                "json_out": "--json",
                "settings": "[settings]",
                "adapt_first": "--adapt",
                "images": "{images}",
                "cases": "cases",
            }.get(parameter, "--" + parameter.replace("_", "-"))
            assert option in text.lower(), (name, option)  # some typers shout the names of arguments
        for words in units[name]:
            assert words in text, (name, words)
        assert name in overview
    assert "not a medical device" in " ".join(overview.split())


# ---- many cases ----------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, files):
    """Three cases, the second one damaged."""
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"nothing")
    rows = ["lpet,mr,dose_reduction,name", "lpet.nii.gz,mr.nii.gz,20,a", "bad.nii.gz,,,b", "lpet.nii.gz,,4,c"]
    path = tmp_path / "in" / "cases.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_many_cases_go_on_after_a_failure_and_skip_what_is_done(tmp_path, table, weights):
    out = tmp_path / "many"
    arguments = ["restore-all", table, "--out", out, "--quality", "fast", "--weights", weights]
    result = run(*arguments)
    assert result.exit_code == 2 and sorted(p.name for p in out.glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]
    assert "2 restored into" in result.stdout and "0 there already, 1 failed" in result.stdout
    assert f"{table}: expected to restore every case, failed on b" in result.stderr
    assert "bad.nii.gz: expected a NIfTI file" in result.stderr
    (tmp_path / "in" / "bad.nii.gz").write_bytes((tmp_path / "in" / "lpet.nii.gz").read_bytes())
    before = (out / "a.nii.gz").stat().st_mtime_ns
    again = run(*arguments, "--dose-reduction", 20)
    assert again.exit_code == 0 and "1 restored into" in again.stdout and "2 there already, 0 failed" in again.stdout
    assert (out / "a.nii.gz").stat().st_mtime_ns == before


def test_two_processes_share_the_cases(tmp_path, weights, files):
    folder = tmp_path / "cohort"
    for name in "abc":
        (folder / name).mkdir(parents=True)
        (folder / name / "lpet.nii.gz").write_bytes(Path(files[0]).read_bytes())
    out = tmp_path / "many"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mfdiff_lite", "restore-all", folder, "--out", out, "--quality", "fast"]
    command += ["--dose-reduction", "20", "--weights", weights, "--share"]
    both = [subprocess.Popen([*map(str, command), f"{i}/2"], env=environment, text=True, stdout=-1) for i in (0, 1)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert ["2 restored" in said[0], "1 restored" in said[1]] == [True, True]
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_bids_cases_take_the_mr_of_their_subject(tmp_path):
    for path in ("sub-1/ses-a/pet/sub-1_ses-a_pet.nii.gz", "sub-1/anat/sub-1_T1w.nii.gz", "sub-2/pet/sub-2_pet.nii.gz"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    one, two = find_cases(tmp_path)
    assert (one.name, one.mr) == ("sub-1_ses-a_pet", tmp_path / "sub-1/anat/sub-1_T1w.nii.gz")
    assert (two.name, two.mr, two.dose_reduction) == ("sub-2_pet", None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pet\na.nii\n", "expected a column lpet, found pet"),
        ("lpet\n", "found no case"),
        ("lpet,mr\n,b.nii\n", "line 2: expected a path in the column lpet"),
        ("lpet,name\na.nii,x\nb.nii,x\n", "found x twice"),
        ("lpet,name\na.nii,../x\n", "line 2: expected a name without folders"),
        ("lpet,dose_reduction\na.nii,low\n", "line 2: expected a number, found dose_reduction 'low'"),
        (None, "expected a folder or a CSV table of cases, found nothing"),
    ],
)
def test_tables_of_cases_that_cannot_be_used_are_refused(tmp_path, text, message):
    path = tmp_path / "cases.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    refused(run("restore-all", path, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", ["2/2", "1", "a/b", "-1/2"])
def test_a_share_is_one_of_n(tmp_path, table, share):
    refused(run("restore-all", table, "--out", tmp_path / "many", f"--share={share}"), "--share: expected i/n")


# ---- as a process of its own ---------------------------------------------------------------------------------------


def one_sentence(outcome, message):
    status, stdout, stderr = outcome
    assert status == 2 and stdout == "" and "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1 and re.match(f"mfdiff_lite: .*{message}", stderr), stderr


def test_process_damaged_header(tmp_path, files, weights):
    # nibabel would print a line of its own here.
    path, _, message = broken(tmp_path, "damaged header")
    before = tree(tmp_path)
    outcome = process("restore", "--lpet", path, "--mr", files[1], "--out", files[2] / "o.nii.gz", "--weights", weights)
    one_sentence(outcome, re.escape(str(path)) + ": " + message)
    assert tree(tmp_path) == before


def test_process_corrupted_weights(tmp_path, files):
    (tmp_path / "w.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      garbage")
    before = tree(tmp_path)
    outcome = process(
        "restore",
        "--lpet",
        files[0],
        "--mr",
        files[1],
        "--out",
        files[2] / "o.nii.gz",
        "--weights",
        tmp_path / "w.safetensors",
    )
    one_sentence(outcome, "w.safetensors: expected weights saved by this package")
    assert tree(tmp_path) == before


def test_process_existing_output(tmp_path, files):
    before = tree(tmp_path)
    one_sentence(
        process("restore", "--lpet", files[0], "--mr", files[1], "--out", files[1].with_name("mr.nii.gz")),
        "expected outputs that differ",
    )
    assert tree(tmp_path) == before


def test_process_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("in the way")
    outcome = process(
        "train", "--out", tmp_path / "run", "--profile", "smoke", MFDIFF_CACHE=str(tmp_path / "file" / "cache")
    )
    one_sentence(outcome, "expected a writable cache")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_process_good(tmp_path, files, weights):
    status, stdout, stderr = process(
        "restore",
        "--lpet",
        files[0],
        "--mr",
        files[1],
        "--out",
        tmp_path / "o.nii.gz",
        "--weights",
        weights,
        "--samples",
        1,
        "--steps",
        1,
    )
    assert status == 0 and "Traceback" not in stderr and f"wrote {tmp_path / 'o.nii.gz'}" in stdout
    assert nib.load(tmp_path / "o.nii.gz").shape == head().shape


# --- adapt -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    """A case of six slices on another scanner, with its count halves."""
    folder = tmp_path_factory.mktemp("target") / "case"
    result = run("simulate", "--out", folder, "--seed", 4, "--slices", 6, "--shift", "wide-psf+scatter")
    assert result.exit_code == 0, result.output
    return folder


def adapting(target, weights, out, *more, halves=True):
    files = [f"--half-{h}={target / f'half_{h}.nii.gz'}" for h in "ab"] if halves else []
    options = [
        "--lpet",
        target / "lpet.nii.gz",
        "--mr",
        target / "mr.nii.gz",
        "--weights",
        weights,
        "--out",
        out,
        *files,
    ]
    return ["adapt", *options, "steps=2", "batch=2", "rehearsal_patients=1", "validate_every=1", *more]


def test_halves_add_up_to_the_lpet(target):
    a, b, lpet = (nib.load(target / f"{name}.nii.gz").get_fdata() for name in ("half_a", "half_b", "lpet"))
    assert ((a + b) / 2).sum() == pytest.approx(lpet.sum(), rel=0.01)
    assert not np.allclose(a, b)


def test_adapt_writes_weights_that_restore_and_say_where_they_come_from(target, weights, tmp_path):
    out = tmp_path / "adapted.safetensors"
    result = run(*adapting(target, weights, out, "--objective", "split"))
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {"adapted.safetensors", "adapted.json"}
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["parent"]["fingerprint"] == load_model(weights, "cpu").fingerprint and card["target"] == ["lpet"]
    files = ["--lpet", target / "lpet.nii.gz", "--mr", target / "mr.nii.gz", "--out", tmp_path / "r.nii.gz"]
    restored = run("restore", *files, "--weights", out, "--samples", 1)
    assert restored.exit_code == 0 and "stage 2 by 'split' on lpet" in restored.stdout
    again = run(*adapting(target, weights, out, "--objective", "split"))
    refused(again, "exists already", "--force")


@pytest.mark.parametrize(
    ("shift", "words"), [(None, "adapted by 'sure'|nothing on this target"), ("old-reconstruction", "refused: ")]
)
def test_restore_adapts_first_or_says_why_not(tmp_path, weights, monkeypatch, shift, words):
    """Both stages in one command, for who has nothing but the scan; a guard that refuses still gives an image."""
    folder, short = tmp_path / "case", Adaptation(steps=2, batch=2, validate_every=1, rehearsal=0.0)
    assert run("simulate", "--out", folder, "--slices", 14, *(["--shift", shift] if shift else [])).exit_code == 0
    monkeypatch.setattr(stage2, "Adaptation", lambda: short)
    arguments = ["--lpet", folder / "lpet.nii.gz", "--mr", folder / "mr.nii.gz", "--dose-reduction", 20, "--adapt"]
    arguments += ["--weights", weights, "--samples", 1, "--steps", 1]
    done = run("restore", *arguments, "--out", folder / "out.nii.gz")
    assert done.exit_code == 0 and re.search(words, done.stdout), done.output
    assert (folder / "out.nii.gz").exists() and not list(tmp_path.glob("**/*.run"))


def test_adapt_resumes_after_ctrl_c(target, weights, tmp_path, monkeypatch):
    """Cut after its first step: a `.run` folder holds it, --resume ends where an uncut run ends."""
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run(*adapting(target, weights, whole, "--objective", "split")).exit_code == 0
    genuine = stage2.train_stage2

    def one_step(*args, **kwargs):
        yield next(genuine(*args, **kwargs))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage2, "train_stage2", one_step)
        stopped = run(*adapting(target, weights, cut, "--objective", "split"))
    assert stopped.exit_code == 130, (stopped.output, stopped.exception)
    assert "--resume" in stopped.stderr and not cut.exists()
    refused(run(*adapting(target, weights, cut, "--objective", "split")), "holds a training run already")
    assert run(*adapting(target, weights, cut, "--objective", "split", "--resume")).exit_code == 0
    assert load_model(cut, "cpu").fingerprint == load_model(whole, "cpu").fingerprint
    assert not cut.with_suffix(".run").exists()


@pytest.mark.parametrize(
    "more, halves, parts",
    [
        (["--objective", "split"], False, ["expected count halves", "'sure'"]),
        (["--objective", "sure"], False, ["at least 12 slices", "cannot be measured"]),
        (["--objective", "paired"], True, ["expected the SPET"]),
        (["--objective", "best"], True, ["objective: expected one of auto, split, sure, paired, found 'best'"]),
        (["--objective", "split", "speed=3"], True, ["unknown key 'speed'", "learning_rate"]),
        (["--objective", "split", "steps"], True, ["expected key=value"]),
        (["--objective", "sure", "--half-a", "a.nii.gz"], False, ["expected both halves or none"]),
    ],
)
def test_adapt_refuses(target, weights, tmp_path, more, halves, parts):
    refused(run(*adapting(target, weights, tmp_path / "w.safetensors", *more, halves=halves)), *parts)
    assert not list(tmp_path.iterdir())


def test_adapt_wants_the_right_ending_and_the_lpets_grid(target, case, weights, tmp_path):
    refused(run(*adapting(target, weights, tmp_path / "w.pt", "--objective", "split")), "ends in .safetensors")
    files = [f"--half-a={case / 'half_a.nii.gz'}", f"--half-b={case / 'half_b.nii.gz'}"]
    arguments = adapting(target, weights, tmp_path / "w.safetensors", "--objective", "split", *files, halves=False)
    refused(run(*arguments), "half_a.nii.gz: expected the grid of .*lpet.nii.gz")


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_finds_the_environment_complete(capsys):
    cli.info()
    out = capsys.readouterr().out
    assert "environment: complete" in out and f"torch {torch.__version__}" in out and "shipped weights" in out
    assert len(out.splitlines()) < 70, "a page, not the history of the weights"
    assert "ahba-15697" in out and "shifts: edge-scanner, low-contrast" in out


@pytest.mark.parametrize(
    ("found", "sentence"),
    [("1.20", "numpy: expected >=1.26, found 1.20; run: pip install 'numpy>=1.26'"), (None, "numpy: .* found none")],
)
def test_info_says_what_the_environment_lacks(found, sentence, monkeypatch, capsys):
    def other(name):
        if name != "numpy":
            return "2.6"
        if found is None:
            raise cli.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(cli, "version", other)
    monkeypatch.setattr(cli, "requires", lambda name: ["torch<2.14,>=2.6", "numpy>=1.26", 'ruff>=9; extra == "dev"'])
    with pytest.raises(typer.Exit) as stopped:
        cli.info()
    errors = capsys.readouterr().err
    assert stopped.value.exit_code == 2 and re.search(sentence, errors) and "ruff" not in errors


def test_info_refuses_a_cache_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(typer.Exit) as stopped:
        cli.info()
    assert stopped.value.exit_code == 2 and "set MFDIFF_CACHE" in capsys.readouterr().err
