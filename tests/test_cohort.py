"""Cohorts: split by anatomy, cached under a key of all that made them, and the same batch for the same step."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mfdiff_lite import cohort as module
from mfdiff_lite.cohort import SCANNER_RANGES, Cohort, SliceDataset, cache_folder, make_cohort, random_scanner
from mfdiff_lite.config import TRAIN_ANATOMIES, VALIDATION_ANATOMIES, load_profile
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scanner import Scanner
from mfdiff_lite.view import ActivityScale

TINY = load_profile("smoke", patients=2, slab=3, doses=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder of this module's own."""
    folder = tmp_path_factory.mktemp("cohorts")
    before = os.environ.get("MFDIFF_CACHE")
    os.environ["MFDIFF_CACHE"] = str(folder)
    yield folder
    os.environ.pop("MFDIFF_CACHE") if before is None else os.environ.update(MFDIFF_CACHE=before)


@pytest.fixture(scope="module")
def tiny(cache):
    return make_cohort(TINY)


def same(a, b):
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Cohort) if f.name != "key"
    )


def painted(patients=7, slices=9):
    """A cohort in which every voxel says where it comes from: patient + slice / 100; no simulation."""
    where = np.arange(patients)[:, None] + np.arange(slices)[None, :] / 128 + 1
    volume = np.broadcast_to(where[..., None, None], (patients, slices, 128, 128)).astype(np.float16)
    weight = np.zeros(volume.shape, np.uint8)
    weight[..., 40:90, 40:90], weight[..., 60:64, 60:64], weight[:, 4, 70:74, 70:74] = 1, 2, 3
    doses = np.stack([np.full(patients, 4.0), np.full(patients, 64.0)], 1).astype(np.float32)
    height = np.arange(patients, dtype=np.float32)[:, None]
    images = np.stack([volume, volume], 1), -volume, np.stack([volume, volume], 1) * 2
    return Cohort(*images, weight, doses, height, "painted")


# ---- what is made --------------------------------------------------------------------------------------------------


def test_parts_never_share_an_anatomy(cache, monkeypatch):
    """Not only by name: the jobs that make the cohorts are looked at."""
    made = {"train": set(), "validation": set()}
    monkeypatch.setattr(module, "_make_patient", lambda job: made[job.settings["part"]].add(job.anatomy))
    monkeypatch.setattr(module, "_together", lambda *_: [[]] * len(module.ARRAYS))
    profile = dataclasses.replace(TINY, seed=77, patients=7, validation_patients=2)
    make_cohort(profile, "train", workers=1)
    make_cohort(profile, "validation")
    assert made == {"train": set(TRAIN_ANATOMIES), "validation": set(VALIDATION_ANATOMIES)}
    assert not made["train"] & made["validation"]


def test_content_is_in_units_of_the_lpets_brain_mean(tiny):
    assert (
        tiny.lpet.shape == (2, 2, 3, 128, 128)
        and tiny.spet.shape == tiny.lpet.shape
        and tiny.mr.shape == (2, 3, 128, 128)
    )
    assert tiny.lpet.dtype == np.float16 and tiny.weight.dtype == np.uint8
    low, high = TINY.dose_range
    assert (tiny.dose >= low).all() and (tiny.dose <= high).all() and len(set(tiny.dose.ravel().tolist())) == 4
    assert set(np.unique(tiny.weight)) <= {0, 1, 2, 3}
    for patient in range(2):
        for dose in range(2):
            volume = np.moveaxis(tiny.lpet[patient, dose].astype(np.float32), 0, -1)
            assert ActivityScale(volume, (2.0, 2.0, 2.0)).value == pytest.approx(1, abs=0.002)
            brain = tiny.weight[patient] > 0
            lpet, spet = (getattr(tiny, k)[patient, dose].astype(float)[brain] for k in ("lpet", "spet"))
            assert lpet.mean() == pytest.approx(spet.mean(), rel=0.03)  # the same activity, in the same unit
            assert np.corrcoef(lpet, spet)[0, 1] > 0.2
    # One SPET in two units: their ratio is one number.
    a, b = (tiny.spet[0, d].astype(float) for d in (0, 1))
    bright = a > 0.5
    np.testing.assert_allclose(a[bright] / b[bright], np.median(a[bright] / b[bright]), rtol=2e-3)


def test_random_scanners_stay_in_their_ranges():
    scanners = [random_scanner(np.random.default_rng(s)) for s in range(300)]
    for key, (low, high) in SCANNER_RANGES.items():
        values = np.array([getattr(s, key) for s in scanners])
        if key == "post_filter":
            assert np.mean(values == 0) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(300))
            values = values[values > 0]
        assert values.min() >= (low if key != "iterations" else 2) and values.max() <= (
            high if key != "iterations" else 6
        )
        assert np.ptp(values) > 0.8 * (high - low) - (1 if key == "iterations" else 0)
    assert np.mean([not s.model_psf for s in scanners]) == pytest.approx(0.2, abs=5 * 0.4 / np.sqrt(300))
    shifted = Scanner.shifted("edge-scanner")  # at the edge of the ranges, not beyond
    for key, (low, high) in SCANNER_RANGES.items():
        assert low <= getattr(shifted, key) <= high


# ---- the cache -----------------------------------------------------------------------------------------------------


def folder_of(made):
    """Where a cohort lies."""
    return cache_folder() / f"cohort-{made.key}"


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_files_are_reused_and_kept_once(tiny):
    """Of all patients together; the files of single ones are gone, which held the same again."""
    before = times(folder_of(tiny))
    assert sorted(before) == sorted([*(f"{name}-2.npy" for name in module.ARRAYS), "settings.json"])
    again = make_cohort(TINY)
    assert again.key == tiny.key and same(again, tiny)
    assert times(folder_of(tiny)) == before


def test_a_complete_cohort_serves_who_may_only_read(tiny):
    """Today's fault: every call wrote settings.json, so the second user of a shared cache was locked out. As another
    user, in a process of its own."""
    with tempfile.TemporaryDirectory() as shared:  # not below the tests' own folder, which only their user may enter
        copy = shutil.copytree(folder_of(tiny), Path(shared, folder_of(tiny).name))
        for path in (Path(shared), copy, *copy.iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
        code = f"{IMPORTS}; os.geteuid() or os.setuid(65534); {CALL}"  # first the imports, which only root may read
        env = os.environ | {"MFDIFF_CACHE": shared}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=env)
        for path in (Path(shared), copy):
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(2, 2, 3, 128, 128)"


IMPORTS = "import os; from mfdiff_lite.cohort import make_cohort; from mfdiff_lite.config import load_profile"
CALL = "print(make_cohort(load_profile('smoke', patients=2, slab=3, doses=2)).lpet.shape)"


@pytest.mark.skipif(os.name != "posix", reason="permissions of a group are POSIX")
def test_what_is_written_is_open_to_whom_the_cache_is_open(tmp_path, monkeypatch):
    cache = tmp_path / "shared"
    cache.mkdir()
    cache.chmod(0o2775)
    monkeypatch.setenv("MFDIFF_CACHE", str(cache))
    folder = folder_of(make_cohort(dataclasses.replace(TINY, patients=1, doses=1)))
    assert folder.stat().st_mode & 0o7777 == 0o2775
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o664}


def test_cohorts_of_older_versions_are_removed_and_newer_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path))
    version = module.DATA_VERSION
    for name in ("cohort-0123456789ab", f"cohort-v{version - 1}-x", f"cohort-v{version + 1}-x", f"cohort-v{version}-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine").mkdir()
    made = make_cohort(dataclasses.replace(TINY, patients=1, doses=1))
    kept = {f"cohort-v{version + 1}-x", f"cohort-v{version}-x", f"cohort-{made.key}", "mine"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_images_stay_on_disk(tiny):
    """Training maps them: a cohort may be larger than the memory."""
    again = make_cohort(TINY)
    for name in module.ARRAYS:
        array = getattr(again, name)
        assert isinstance(array, np.memmap) and not array.flags.writeable
    assert again.lpet.shape[:3] == (2, 2, 3) and again.lpet.dtype == np.float16


def test_a_full_disk_leaves_no_half_of_the_images(cache, monkeypatch):
    """While the images are put together: one sentence, nothing half-written, and the next call goes on."""

    def full(*_):
        raise OSError(28, "No space left on device")

    profile = dataclasses.replace(TINY, seed=9, doses=1)
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(OSError, match="could not be written .No space left on device.; check space"):
            make_cohort(profile)
    folder = cache_folder() / f"cohort-{key(monkeypatch, cache, seed=9, doses=1)}"
    assert sorted(path.name for path in folder.iterdir()) == ["patient-00000.npz", "patient-00001.npz", "settings.json"]
    assert len(make_cohort(profile).lpet) == 2


def test_more_patients_reuse_the_first_ones_and_fewer_are_a_part(cache, monkeypatch):
    profile = dataclasses.replace(TINY, seed=8, doses=1)
    two = make_cohort(profile)
    first, calls = np.array(two.lpet), []
    make = module._make_patient
    monkeypatch.setattr(module, "_make_patient", lambda job: calls.append(job.number) or make(job))
    three = make_cohort(dataclasses.replace(profile, patients=3))
    one = make_cohort(dataclasses.replace(profile, patients=1))
    assert calls == [2] and three.key == two.key == one.key
    np.testing.assert_array_equal(three.lpet[:2], first)
    np.testing.assert_array_equal(one.lpet, first[:1])


def key(monkeypatch, cache, part="train", **changes):
    """The folder that a profile leads to, without making anything."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_mapped", lambda jobs, workers: iter(()))
        patch.setattr(module, "_together", lambda *_: [[]] * len(module.ARRAYS))
        return make_cohort(dataclasses.replace(TINY, **changes), part).key


def test_every_setting_that_makes_data_is_in_the_key(monkeypatch, cache):
    plain = key(monkeypatch, cache)
    changes = [dict(slab=5), dict(doses=1), dict(dose_range=(4.0, 50.0)), dict(seed=1)]
    folders = [key(monkeypatch, cache, **c) for c in changes] + [key(monkeypatch, cache, "validation")]
    assert len({plain, *folders}) == len(folders) + 1
    # What does not change the data keeps the key: a longer training needs no new patients.
    for harmless in (
        dict(steps=7),
        dict(batch=2),
        dict(learning_rate=0.1),
        dict(no_mr=0.5),
        dict(fusion_widths=(8, 8, 16)),
        dict(patients=9),
    ):
        assert key(monkeypatch, cache, **harmless) == plain


def test_other_anatomies_are_another_key(monkeypatch, cache):
    plain = key(monkeypatch, cache)
    monkeypatch.setattr(module, "TRAIN_ANATOMIES", TRAIN_ANATOMIES[1:])
    assert key(monkeypatch, cache) != plain


def test_the_key_is_a_version_and_not_source_text(monkeypatch, tmp_path):
    """Today's fault: a changed docstring rebuilt every patient."""
    plain = key(monkeypatch, tmp_path)
    assert plain.startswith(f"v{module.DATA_VERSION}-")
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path))  # what is older is removed there
    monkeypatch.setattr(module, "DATA_VERSION", module.DATA_VERSION + 1)
    assert key(monkeypatch, tmp_path) != plain


MEANS = {"lpet": 0.208100, "spet": 0.207794, "mr": -2.230225, "weight": 0.176473}


def test_the_version_is_raised_when_the_data_change(tmp_path):
    """The means of one patient as `DATA_VERSION` makes it; where they change on purpose, raise the version."""
    settings = {"part": "train", "slab": 3, "doses": 1, "dose_range": (20.0, 20.0), "seed": 0}
    module._make_patient(job := module.Job(tmp_path / "one.npz", "ahba-10021", 2, settings))
    with np.load(job.path) as stored:
        means = {name: float(stored[name].astype(float).mean()) for name in ("lpet", "spet", "mr", "weight")}
    assert module.DATA_VERSION == 3
    assert means == pytest.approx(MEANS, rel=1e-3)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_made_again(tiny, damage):
    before = np.array(tiny.mr)
    damaged = folder_of(tiny) / "mr-2.npy"
    whole = damaged.read_bytes()
    damaged.unlink()  # the mapped file stays what it was
    damaged.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an archive"}[damage])
    again = make_cohort(TINY)
    assert same(again, tiny)
    np.testing.assert_array_equal(again.mr, before)
    assert not [path.name for path in folder_of(tiny).iterdir() if "part-" in path.name]


def test_a_damaged_patient_of_a_cut_build_is_made_again(cache, monkeypatch):
    folder = cache_folder() / f"cohort-{key(monkeypatch, cache, seed=7, doses=1)}"
    assert [path.name for path in folder.iterdir()] == ["settings.json"]
    (folder / "patient-00001.npz").write_bytes(b"half of an archive")
    assert len(make_cohort(dataclasses.replace(TINY, seed=7, doses=1)).lpet) == 2


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_whole_files_and_goes_on(cache, monkeypatch, fault):
    """The second patient is cut off in the middle of its file."""
    profile = dataclasses.replace(TINY, seed=5 if fault is KeyboardInterrupt else 6, doses=1)
    original, calls = np.savez_compressed, []

    def second_fails(stream, **arrays):
        calls.append(1)
        if len(calls) == 2:
            stream.write(b"half of an archive")
            raise fault
        original(stream, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", second_fails)
        with pytest.raises((KeyboardInterrupt, OSError)):
            make_cohort(profile)
    folder = cache_folder() / f"cohort-{key(monkeypatch, cache, seed=profile.seed, doses=1)}"
    assert sorted(p.name for p in folder.iterdir()) == ["patient-00000.npz", "settings.json"]
    calls, make = [], module._make_patient
    monkeypatch.setattr(module, "_make_patient", lambda job: calls.append(job.number) or make(job))
    assert len(make_cohort(profile).lpet) == 2 and calls == [1]


def test_an_unwritable_cache_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        OSError, match="expected a writable cache, found .*; set MFDIFF_CACHE to a folder you can write"
    ) as error:
        make_cohort(TINY)
    assert str(tmp_path / "file" / "cache") in str(error.value) and "\n" not in str(error.value)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MFDIFF_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MFDIFF_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "mfdiff_lite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "mfdiff_lite")


def test_patients_do_not_depend_on_who_makes_them(cache, tiny):
    """The same files from worker processes as from this one: nothing depends on order or on a shared random state."""
    settings = {"part": "train", "slab": 3, "doses": 2, "dose_range": TINY.dose_range, "seed": 0}
    job = module.Job(cache / "again.npz", TRAIN_ANATOMIES[1], 1, settings)
    load_anatomy(TRAIN_ANATOMIES[1])
    np.random.seed(1234)  # a global state that must not matter
    module._make_patient(job)
    with np.load(job.path) as stored:
        for name in ("lpet", "mr", "spet", "weight", "dose"):
            np.testing.assert_array_equal(stored[name], getattr(tiny, name)[1])


# ---- batches -------------------------------------------------------------------------------------------------------


def batches_equal(a, b):
    return all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a)


def test_batches_depend_on_seed_and_step_alone(tiny):
    data = SliceDataset(tiny, TINY)
    first = data.batch(3)
    data.batch(0), data.batch(8)  # what was drawn before does not matter
    assert batches_equal(data.batch(3), first) and batches_equal(SliceDataset(tiny, TINY).batch(3), first)
    assert not batches_equal(data.batch(4), first)
    assert not batches_equal(SliceDataset(tiny, dataclasses.replace(TINY, seed=1)).batch(3), first)


def test_batch_layout(tiny):
    batch = SliceDataset(tiny, TINY).batch(0)
    crop, context = TINY.crop, TINY.context
    shapes = {k: tuple(v.shape) for k, v in batch.items()}
    assert shapes == {
        "lpet": (4, context, crop, crop),
        "mr": (4, context, crop, crop),
        "spet": (4, 1, crop, crop),
        "weight": (4, 1, crop, crop),
        "dose": (4,),
        "fits": (4,),
    }
    assert {str(v.dtype) for v in batch.values()} == {"torch.float32"}


def test_slices_belong_together():
    """Without augmentation: the target is the middle slice, its neighbours beside it, MR of the same patient."""
    cohort = painted()
    batch = SliceDataset(cohort, dataclasses.replace(TINY, slab=9), augment=False).batch(0, 64)
    lpet, mr, spet = (batch[k][..., 50, 50].numpy() for k in ("lpet", "mr", "spet"))
    np.testing.assert_allclose(spet[:, 0], 2 * lpet[:, 1], rtol=2e-3)
    np.testing.assert_array_equal(mr, -lpet)
    np.testing.assert_allclose(np.diff(lpet, axis=1), 1 / 128, atol=5e-3)
    assert set(batch["dose"].tolist()) == {4.0, 64.0}
    middle = np.unique(np.round((lpet[:, 1] % 1) * 128))
    assert middle.min() >= 1 and middle.max() <= 7  # never without a neighbour


def test_augmentation_moves_all_images_together(tiny):
    """Gain, flip and crop act on LPET and SPET alike: a target equal to its input stays equal."""
    twin, profile = dataclasses.replace(tiny, spet=tiny.lpet), dataclasses.replace(TINY, other_noise=0.0)
    batch = SliceDataset(twin, profile).batch(1, 32)
    np.testing.assert_array_equal(batch["spet"][:, 0].numpy(), batch["lpet"][:, 1].numpy())
    plain = SliceDataset(twin, profile, augment=False).batch(1, 32)
    assert not batches_equal(batch, plain)


def test_shares_of_missing_and_wrong_mr():
    """Within five binomial SD: no MR, another patient's, the own one out of place; and what is said of whether it fits
    is true of each."""
    profile = dataclasses.replace(TINY, slab=9, no_mr=0.08, wrong_mr=0.12, crop=32)
    cohort, rng, n = painted(), np.random.default_rng(0), 4000
    small = dataclasses.replace(cohort, mr=cohort.mr[..., 32:64, 32:64])
    data, own = SliceDataset(small, profile), small.mr[2, 3:6].astype(np.float32)
    found = {"missing": 0, "another": 0, "misplaced": 0, "shifted or own": 0}
    for _ in range(n):
        mr, fits = data._disturbed(own, 2, np.arange(3, 6), rng)
        assert mr.shape == own.shape
        if not mr.any():
            kind, truth = "missing", {-1.0}
        elif int(-mr[1, 16, 16]) != int(-own[1, 16, 16]) and mr.min() == mr.max() - np.ptp(mr[:, 16, 16]):
            kind, truth = "another", {0.0}
        elif (mr == 0).any():
            kind, truth = "misplaced", {0.0}
        else:
            kind, truth = "shifted or own", {1.0, -1.0}  # a shift does not show in a painted slice
        assert fits in truth, kind
        found[kind] += 1
    for kind, share in (("missing", 0.08), ("another", 0.08), ("misplaced", 0.04)):
        assert abs(found[kind] / n - share) < 5 * np.sqrt(share * (1 - share) / n), kind


def test_another_patients_mr_comes_from_the_same_height_half_of_the_time():
    """Heights of the painted patients lie 1 mm apart, slices 2 mm: the nearest of those drawn is a neighbour."""
    cohort, rng, n = painted(), np.random.default_rng(0), 1000
    data, near = SliceDataset(cohort, dataclasses.replace(TINY, slab=9)), np.arange(3, 6)
    level = []
    for _ in range(n):
        mr = data._another(3, near, rng)[:, 0, 0]
        patient = round(float(np.floor(-mr[0]))) - 1
        assert patient != 3
        first = (-mr[0] - 1 - patient) * 128
        level.append(abs(patient - 3) == 1 and abs(first - 3) < 1.5)
    assert 0.5 < np.mean(level) < 0.75


def test_a_misplaced_mr_is_far_out_of_place():
    rng, spots = np.random.default_rng(0), np.zeros((3, 64, 64), np.float32)
    spots[:, 12:15, 31:34] = 1
    for _ in range(50):
        x, y = np.argwhere(module.misplaced(spots, rng)[1] > 0.4).mean(0)
        assert np.hypot(x - 13, y - 32) > 2.4  # 18 voxels from the middle, at 8 degrees


def test_made_up_noise_has_the_level_and_correlation_that_are_drawn():
    """On a flat image: unbiased, SD within 8 to 60 %, and neighbouring slices go together as far as voxels in plane
    do."""
    flat, near = np.full((9, 64, 64), 1.0, np.float16), np.arange(2, 7)
    for seed in range(12):
        noisy = module.made_up_noise(flat, near, np.random.default_rng(seed))
        noise = noisy - 1
        assert noisy.shape == (5, 64, 64) and 0.06 < noise.std() < 0.65
        in_plane = np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]
        axial = np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]
        assert abs(in_plane - axial) < 0.12
    repeated = module.made_up_noise(flat, np.array([4, 4, 4, 5, 5]), np.random.default_rng(0))
    np.testing.assert_array_equal(repeated[0], repeated[2])


def test_every_other_slice_is_chosen_for_its_small_lesions():
    """Of 7 slices one shows them: picked by chance in 1/7, as the better of two in 1 - (6/7)^2."""
    profile = dataclasses.replace(TINY, slab=9, thin=0.0)
    data, rng, n = SliceDataset(painted(), profile), np.random.default_rng(0), 4000
    share = (1 / 7 + 1 - (6 / 7) ** 2) / 2
    found = np.mean([data._near(rng, data.cohort.weight[0])[0] == 4 for _ in range(n)])
    assert abs(found - share) < 5 * np.sqrt(share * (1 - share) / n)


def test_shifted_mr_moves_by_at_most_two_voxels():
    profile = dataclasses.replace(TINY, slab=9, no_mr=0.0, wrong_mr=0.0)
    data, rng = SliceDataset(painted(), profile), np.random.default_rng(0)
    point = np.zeros((3, 32, 32), np.float32)
    point[:, 16, 16] = 1
    places = np.array([np.argwhere(data._disturbed(point, 0, np.arange(3), rng)[0][1])[0] - 16 for _ in range(2000)])
    moved = np.any(places != 0, axis=1).mean()
    share = 0.1 * 24 / 25
    assert abs(moved - share) < 5 * np.sqrt(share * (1 - share) / 2000)
    assert np.abs(places).max() == 2


def test_no_disturbance_without_augmentation():
    profile = dataclasses.replace(TINY, slab=9, no_mr=1.0, wrong_mr=0.0)
    assert SliceDataset(painted(), profile, augment=False).batch(0)["mr"].abs().min() > 0
    assert SliceDataset(painted(), profile).batch(0)["mr"].abs().max() == 0


@pytest.mark.parametrize("lesion_weight", [0.0, 4.0])
def test_loss_weights(lesion_weight):
    """Air 0.2, brain 1, lesions 1 + lesion_weight, small ones twice that much more."""
    data = SliceDataset(
        painted(), dataclasses.replace(TINY, slab=9, lesion_weight=lesion_weight, crop=128), augment=False
    )
    weight = data._loss_weight(data.cohort.weight[0, 4])
    found = (weight[0, 0], weight[50, 50], weight[61, 61], weight[71, 71])
    assert found == (pytest.approx(0.2), 1.0, 1.0 + lesion_weight, 1.0 + 2 * lesion_weight)
    assert np.count_nonzero(weight == weight[0, 0]) == 128**2 - 50**2


def test_lesions_of_every_kind_weigh_more(cache):
    """Also those in MR alone, or leaving them out would be as cheap as any other error."""
    index, settings = 1, {"part": "train", "slab": 6, "doses": 1, "dose_range": (20.0, 20.0), "seed": 2}
    seed = int(np.random.default_rng([2, index, True]).integers(2**31))
    patient = module.virtual_patient(load_anatomy("ahba-12876"), seed, slices=6, randomisation=module.TRAINING)
    path = cache / "weights.npz"
    module._make_patient(module.Job(path, "ahba-12876", index, settings))
    with np.load(path) as stored:
        weight = np.moveaxis(stored["weight"], 0, -1).astype(int)
    lesions = patient.lesions > 0
    assert {one.kind for one in patient.lesion_table} >= {"mr-only", "pet-only"}
    for one in patient.lesion_table:
        small = one.kind != "mr-only" and one.radius < 5
        assert set(weight[patient.lesions == one.label].tolist()) == {3 if small else 2}
    assert (weight[patient.mask & ~lesions] == 1).all()
    assert not weight[~patient.mask & ~lesions].any()


def test_thin_slabs_repeat_their_ends_as_restoring_does():
    """In a share `thin` of the slices, down to one slice in the place of all its neighbours; images and MR alike."""
    profile = dataclasses.replace(TINY, slab=9, context=5, thin=0.4, no_mr=0.0, wrong_mr=0.0, crop=32)
    data, rng, n = SliceDataset(painted(), profile), np.random.default_rng(0), 4000
    draws = [data._near(rng, data.cohort.weight[0]) for _ in range(n)]
    depths = np.array([len(set(near.tolist())) for _, near in draws])
    share = np.mean(depths < 5)
    assert abs(share - 0.4) < 5 * np.sqrt(0.4 * 0.6 / n)
    assert set(depths.tolist()) == {1, 2, 3, 4, 5}
    for z, near in draws:
        assert near[2] == z and (np.diff(near) >= 0).all() and near.min() >= 0 and near.max() < 9
        np.testing.assert_array_equal(near, np.clip(np.arange(z - 2, z + 3), near.min(), near.max()))
    batch = data.batch(0, 256)
    single = [i for i, x in enumerate(batch["lpet"]) if all(torch.equal(x[0], x[k]) for k in range(5))]
    assert single and any(torch.equal(batch["mr"][i][0], batch["mr"][i][4]) for i in single)
    whole = SliceDataset(painted(), profile, augment=False)
    assert all(len(set(whole._near(rng, whole.cohort.weight[0])[1].tolist())) == 5 for _ in range(200))
