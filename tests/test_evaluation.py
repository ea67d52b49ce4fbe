"""Tables: the right numbers in the right rows, intervals over patients, and stored results that agree."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio

from mfdiff_lite import metrics
from mfdiff_lite.config import load_profile
from mfdiff_lite.evaluation import Table, another_mr, audit_mr, compare, evaluate, summarise
from mfdiff_lite.model import MFdiff
from mfdiff_lite.noise import NoiseModel
from mfdiff_lite.phantom import Lesion, virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scan import Scan
from mfdiff_lite.view import brain_mask

ROOT = Path(__file__).parents[1]


def case(seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    spet = np.full((32, 32, 6), 5.0)
    spet[:16] = 10
    lpet = np.clip(spet + noise * rng.standard_normal(spet.shape), 0, None)
    mask = np.zeros(spet.shape, bool)
    mask[4:28, 4:28] = True
    return Scan(lpet, None, spet, activity=spet * 1.1, mask=mask, name=f"case-{seed}")


def restoration(scan, mean):
    return SimpleNamespace(mean=mean, coarse=scan.spet + 2, samples=[scan.spet + 1], settings={"n_samples": 4})


def test_compare_scores_each_image_against_the_reference_it_names():
    scan = case()
    rows = compare(scan, restoration(scan, scan.spet + 0.5)).rows
    assert list(rows) == ["LPET", "Gaussian", "coarse", "one sample", "mean of 4 samples"]
    for name, offset in (("coarse", 2), ("one sample", 1), ("mean of 4 samples", 0.5)):
        assert rows[name]["psnr"] == pytest.approx(20 * np.log10(10 / offset), abs=1e-4)
    inside = scan.mask
    expected = peak_signal_noise_ratio(scan.spet[inside], scan.lpet[inside], data_range=10)
    assert rows["LPET"]["psnr"] == pytest.approx(expected, abs=1e-4)
    truth = compare(scan, {"x": scan.activity}, against="truth").rows
    assert truth["x"]["psnr"] == np.inf and truth["x"]["ssim"] == pytest.approx(1)


def test_compare_refuses_what_it_cannot_do():
    scan = case()
    scan = dataclasses.replace(scan, spet=None)
    with pytest.raises(ValueError, match="spet"):
        compare(scan, {"x": scan.lpet})


def test_lesion_columns_appear_only_with_known_lesions():
    scan = case()
    assert "contrast_kept" not in compare(scan, {}).rows["LPET"]
    lesions = np.zeros(scan.lpet.shape, np.uint8)
    lesions[8:11, 14:17, 2:4] = 1
    table = (Lesion(1, "pet-only", True, 3.0),)
    scan = dataclasses.replace(scan, tissues=scan.mask.astype(np.uint8), lesions=lesions, lesion_table=table)
    scan.spet[scan.lesions == 1] = 20
    rows = compare(scan, {"same": scan.spet}).rows
    assert rows["same"]["contrast_kept"] == pytest.approx(1)
    assert 0 < rows["Gaussian"]["contrast_kept"] < 0.8


def test_the_table_prints_units_and_signs_and_escapes_names():
    table = Table("t", {"<b>": {"psnr": 20.0, "activity_bias": -0.015}, "b": {"psnr": float("nan")}})
    assert "20.00" in str(table) and "-1.5 %" in str(table) and "PSNR [dB]" in str(table)
    assert "&lt;b&gt;" in table._repr_html_() and "<b>" not in table._repr_html_()


def test_evaluate_averages_over_patients_not_over_voxels():
    scans = [case(seed, noise) for seed, noise in ((0, 1.0), (1, 3.0))]
    result = evaluate({"half": lambda s: s.spet * 0.5}, scans)
    single = [metrics.psnr(s.lpet, s.spet, s.mask) for s in scans]
    cell = result["summary"]["spet"]["LPET"]["psnr"]
    assert cell["mean"] == pytest.approx(np.mean(single)) and cell["n"] == 2
    assert min(single) - 1e-9 <= cell["ci95"][0] <= cell["ci95"][1] <= max(single) + 1e-9
    assert result["summary"]["spet"]["half"]["activity_bias"]["mean"] == pytest.approx(-0.5)
    assert result["summary"]["truth"]["half"]["activity_bias"]["mean"] == pytest.approx(0.5 / 1.1 - 1, abs=1e-6)
    json.dumps(result)


def test_summary_leaves_out_patients_without_a_value():
    rows = [{"m": {"mr_leak": 0.2}}, {"m": {"mr_leak": float("nan")}}]
    assert summarise(rows)["m"]["mr_leak"]["n"] == 1 and summarise(rows)["m"]["mr_leak"]["mean"] == pytest.approx(0.2)


def test_the_rough_mask_never_sees_the_spet():
    scan = case()
    scan = dataclasses.replace(scan, mask=None)
    before = brain_mask(scan)
    scan = dataclasses.replace(scan, spet=scan.spet[::-1] * 3)
    assert np.array_equal(before, brain_mask(scan))


def test_the_audit_gives_each_mr_to_the_method_and_scores_what_it_makes():
    """A method that copies the MR: each row has the score of the MR that it was given."""
    scan = case()
    scan = dataclasses.replace(scan, mr=np.random.default_rng(1).random(scan.lpet.shape).astype(np.float32) + 1)
    other = scan.mr[::-1].copy()
    rows = audit_mr(lambda lpet, mr: lpet if mr is None else mr, scan, other).rows
    moved = np.concatenate([np.repeat(scan.mr[:1], 2, 0), scan.mr[:-2]])  # 4 mm are two voxels
    expected = {"right MR": scan.mr, "MR shifted by 4 mm": moved, "another patient's MR": other, "no MR": scan.lpet}
    assert list(rows) == ["right MR", "MR shifted by 2 mm", "MR shifted by 4 mm", "another patient's MR", "no MR"]
    for name, image in expected.items():
        assert rows[name]["psnr"] == pytest.approx(metrics.psnr(image, scan.spet, scan.mask), abs=1e-4), name
    truth = audit_mr(lambda lpet, mr: scan.activity, scan, other, against="truth")
    assert {row["nrmse"] for row in truth.rows.values()} == {0.0}


def test_another_patients_mr_lies_at_the_height_of_the_scan():
    """On a grid ten slices above the bottom of the other's: its slices from the tenth on."""
    other = virtual_patient(load_anatomy("icbm152"), 1)
    affine = other.affine.copy()
    affine[2, 3] += 10 * affine[2, 2]
    scan = Scan(np.ones((*other.mr.shape[:2], 3), np.float32), affine=affine)
    found = another_mr(scan)
    assert np.allclose(found, other.mr[..., 10:13], rtol=1e-4, atol=1e-3) and found.std() > 10


# --- results/ ----------------------------------------------------------------------------------------------------


def script(name, patch):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmarks():
    """The scripts of benchmarks/, as when they are run from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
        found = {"results": script("results", patch)}
        names = ("evidence", "ablations", "adaptation", "course", "viewer", "real", "second_head", "second_simulator")
        names = (*names, "checks", "web", "any_noise", "detection", "bench")
        yield found | {name: script(name, patch) for name in names}


def test_every_goal_has_its_row(benchmarks):
    rows = {row["id"]: row for row in json.loads((ROOT / "results" / "targets.json").read_text())}
    part = benchmarks["ablations"]
    groups = {"restore": benchmarks["results"].GOALS, "adapt": benchmarks["adaptation"].GOALS}
    groups |= {"evidence": benchmarks["evidence"].GOALS | part.GOALS | part.CONTINUED_GOALS}
    goals = {
        f"{group}.{name}": goal
        for group, named in (
            groups
            | {
                "viewer": benchmarks["viewer"].GOALS,
                "web": benchmarks["web"].GOALS,
                "noise": benchmarks["any_noise"].GOALS,
                "detect": benchmarks["detection"].GOALS,
                "speed": benchmarks["bench"].GOALS | benchmarks["bench"].TRAIN_GOALS,
                "real": benchmarks["real"].GOALS | benchmarks["checks"].GOALS,
                "course": {
                    **benchmarks["course"].GOALS,
                    **benchmarks["course"].CHECKS,
                    **benchmarks["course"].READING_GOALS,
                },
            }
        ).items()
        for name, goal in named.items()
    }
    assert set(rows) == set(goals)
    for name, (_, unit, sense, must, aim) in goals.items():
        row = rows[name]
        assert (row["unit"], row["sense"], row["must"], row["aim"]) == (unit, sense, must, aim), name


def test_wrong_estimates_of_the_noise_are_wrong_as_they_say(benchmarks):
    """The guard is tried on these: strength, covariance in plane, and terms that neighbouring slices share."""
    rng = np.random.default_rng(0)
    image = 10 + ndimage.gaussian_filter(rng.standard_normal((48, 48, 16)), (1, 1, 0))
    noise = NoiseModel(image, np.ones(image.shape, bool))
    noise.image = image
    draws = benchmarks["adaptation"].wrong_draws()
    drawn = {kind: draw(noise, np.random.default_rng(1)) for kind, draw in draws.items()}
    right = noise.draw(np.random.default_rng(1))
    assert drawn["half as strong"].std() == pytest.approx(right.std() / 2)
    assert drawn["twice as strong"].std() == pytest.approx(right.std() * 2)

    def alike(one, axis):
        return (one * np.roll(one, 1, axis)).mean() / (one**2).mean()

    assert alike(right, 0) > 0.5 and abs(alike(drawn["white"], 0)) < 0.05
    assert abs(alike(right, 2)) < 0.15 and alike(drawn["terms shared by neighbours"], 2) < -0.4


def test_targets_are_judged_by_their_own_numbers():
    rows = json.loads((ROOT / "results" / "targets.json").read_text())
    assert len({row["id"] for row in rows}) == len(rows) >= 15
    for row in rows:
        assert row["met"] == (row["value"] >= row["must"] if row["sense"] == ">=" else row["value"] <= row["must"]), (
            row["id"]
        )
        assert row["command"] and row["revision"] and row["relation"]


def test_the_stored_cost_is_that_of_the_targets():
    rows = {row["id"]: row["value"] for row in json.loads((ROOT / "results" / "targets.json").read_text())}
    small, large = json.loads((ROOT / "results" / "restore.json").read_text())["cost"]
    assert rows["restore.volume_seconds"] == pytest.approx(large["seconds"], abs=1e-6)
    assert rows["restore.peak_memory"] == pytest.approx(large["peak_gb"], abs=1e-6)
    assert rows["restore.memory_growth"] == pytest.approx(large["peak_gb"] - small["peak_gb"], abs=1e-6)


def test_the_stored_table_is_the_mean_of_the_stored_patients():
    stored = json.loads((ROOT / "results" / "restore.json").read_text())
    for table in stored["tables"].values():
        for against in ("spet", "truth"):
            for method, row in table["summary"][against].items():
                values = [p[against][method]["psnr"] for p in table["patients"]]
                assert row["psnr"]["mean"] == pytest.approx(np.mean(values))


# --- ablations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ablations(benchmarks):
    return benchmarks["ablations"]


def test_the_margin_between_two_curves(ablations):
    def curve(*points):
        return [{"contrast_kept": x, "psnr": y} for x, y in points]

    ours = curve((0.8, 20.0), (0.6, 24.0))  # 24 at 0.6, falling by 2 for each 0.1
    assert ablations.margin(ours, curve((0.7, 21.0), (0.65, 22.5), (0.9, 30.0))) == pytest.approx(0.5)
    assert ablations.margin(ours, curve((0.5, 1.0))) == np.inf


def test_a_replaced_part_has_the_parameters_of_the_one_it_replaces(ablations):
    counts = {}
    for name in ablations.VARIANTS:
        counts[name] = MFdiff.from_profile(ablations.profile_of(name, 100)).n_parameters
    for name, count in counts.items():
        assert count == pytest.approx(counts["gated fusion"], rel=0.03), name


def test_variants_share_budget_data_and_seed(ablations):
    profiles = [dataclasses.asdict(ablations.profile_of(name, 123)) for name in ablations.VARIANTS]
    for key in ("steps", "batch", "seed", "patients", "slab", "doses", "dose_range", "crop", "learning_rate", "ema"):
        assert len({profile[key] for profile in profiles}) == 1, key


def test_another_seed_is_another_cohort_and_nothing_else(ablations):
    first, second = (ablations.profile_of("gated fusion", 100, seed=seed) for seed in (0, 1))
    assert second == dataclasses.replace(first, seed=1)


def test_what_trains_on_from_other_weights_is_another_run(ablations, monkeypatch, tmp_path):
    places = []

    def trains(profile, out, **options):
        places.append(out)
        return [SimpleNamespace(validation=[])]

    monkeypatch.setattr(ablations, "RUNS", tmp_path)
    monkeypatch.setattr(ablations, "train_stage1", trains)
    monkeypatch.setattr(ablations, "load_model", lambda path: None)
    for letter in "aba":
        ablations.trained("all parts", 1, "smoke", start=SimpleNamespace(fingerprint=letter * 64))
    assert places[0] == places[2] != places[1], "or a new table would hold what older weights learned"


def test_the_headline_is_paired_over_patients_and_averaged_over_seeds(ablations):
    def judged(psnr, contrast, leak):
        conditions = {"right MR": 0.0, "another patient's MR": -0.5, "no MR": -0.25}
        patients = [
            {
                "name": f"patient {index}",
                "spet": {
                    name: {"psnr": psnr + index + lost, "contrast_kept": contrast} for name, lost in conditions.items()
                },
                "truth": {name: {"mr_leak": leak} for name in conditions},
            }
            for index in range(3)
        ]
        return {"patients": patients, "curve": [{"contrast_kept": c, "psnr": psnr - c} for c in (0.5, 1.0)]}

    others = {"MR concatenated": judged(25.5, 0.5, 0.4), "PET only": judged(25.0, 0.5, 0.1)}
    others["regression U-Net, PET + MR"] = judged(25.75, 0.5, 0.4)
    seeds = [{"gated fusion": judged(psnr, 0.75, leak)} | others for psnr, leak in ((25.0, 0.0), (27.0, 0.2))]
    assert ablations.complete({"0": seeds[0], "1": others, "2": seeds[1]}) == seeds
    variants = ablations.over_seeds(seeds)
    ours = variants["gated fusion"]
    assert ours["summary"]["spet"]["right MR"]["psnr"]["mean"] == pytest.approx(26 + 1)  # patients: + 0, 1, 2
    assert ours["summary"]["spet"]["no MR"]["psnr"]["n"] == 3
    assert [p["name"] for p in ours["patients"]] == [f"patient {index}" for index in range(3)]

    rows = {}

    class Rows:
        def add(self, name, value, ci95=None):
            rows[name] = value

    ablations.report(variants, [{"contrast_kept": 0.75, "psnr": 25.0}], Rows())
    assert rows == pytest.approx(
        {
            "matched_unet": 0.25,
            "pet_only": 1.0,
            "concat_psnr": 0.5,
            "concat_leak": 0.25,
            "concat_contrast": 0.25,
            "tradeoff": 0.25,  # 26 less the contrast, against 25.75 less it: U-Net; as far: Gaussian
            "other_mr_pet_only": -0.5,
            "no_mr_pet_only": -0.75,
        }
    )
    assert set(rows) == set(ablations.GOALS)


@pytest.mark.parametrize("part", ["no gate", "no similarity", "no coarse estimate"])
def test_a_part_that_no_profile_switches_off_is_gone_within_and_back_after(ablations, part):
    model = MFdiff.from_profile(load_profile("smoke"))
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1, generator=generator)
    lpet, mr = torch.rand(2, 1, 3, 64, 64, generator=generator)
    batch = {"lpet": lpet, "mr": mr, "dose": torch.tensor([20.0]), "spet": lpet[:, :1]}
    batch["weight"] = torch.ones_like(batch["spet"])

    def seen():
        fused = model.fusion(lpet, mr, batch["dose"])
        losses = model(batch, torch.tensor([5]), torch.ones_like(batch["spet"]))
        open_wide = bool((fused.gate == fused.fit).all())  # what `fit` leaves of it
        return open_wide, fused.similarity.abs().max() == 0, set(losses) == {"diffusion"}

    with ablations.altered(part):
        assert seen() == tuple(part == one for one in ("no gate", "no similarity", "no coarse estimate"))
    assert seen() == (False, False, False)


def test_without_residual_the_denoiser_generates_the_image_itself(ablations):
    model = MFdiff.from_profile(load_profile("smoke"))  # its heads start at zero: v = 0 and coarse = the Gaussian
    generator = torch.Generator().manual_seed(0)
    lpet, mr = torch.rand(2, 1, 3, 64, 64, generator=generator)
    spet = torch.rand(1, 1, 64, 64, generator=generator)
    noise = torch.randn(1, 2, 64, 64, generator=generator)
    batch = {"lpet": lpet, "mr": mr, "dose": torch.tensor([20.0]), "spet": spet, "weight": torch.ones_like(spet)}
    t = torch.tensor([5])
    with_residual = model(batch, t, noise[:, :1])
    with ablations.altered("no residual"):
        losses = model(batch, t, noise[:, :1])
        a = model.schedule.alpha_bar(t, noise)
        wanted = (a.sqrt() * noise[:, :1] - (1 - a).sqrt() * spet / ablations.WHOLE_SD).square().mean()
        assert losses["diffusion"].item() == pytest.approx(wanted.item(), rel=1e-5)
        assert losses["coarse"].item() == pytest.approx(with_residual["coarse"].item(), rel=1e-5)

        begun = []

        def perfect(xt, t, *_):  # knows the image
            begun.append(xt)
            a = model.schedule.alpha_bar(t, xt)
            return (a.sqrt() * xt - spet / ablations.WHOLE_SD) / (1 - a).sqrt()

        model._denoise = perfect
        drawn, fused = model.restore_slices(lpet, mr, batch["dose"], noise)
    assert drawn.shape == noise.shape
    assert torch.allclose(drawn, spet.expand_as(drawn), atol=1e-4)
    a = model.schedule.alpha_bar(torch.tensor([model.schedule.times(6, 0.9)[0]]), noise)
    warm = a.sqrt() * fused.coarse / ablations.WHOLE_SD + (1 - a).sqrt() * noise
    assert torch.allclose(begun[0].transpose(0, 1), warm, atol=1e-5), "the warm start is the coarse estimate"


# ---- one door for what can be judged -------------------------------------------------------------------------------


def bare(scan):
    """As from files: no mask, no truth."""
    return Scan(scan.lpet, scan.mr, spet=scan.spet, name="bare")


def test_a_scan_without_mask_can_be_evaluated():
    """Today's fault: AttributeError for every scan of load_scan."""
    scan = bare(case())
    found = evaluate({"same": lambda s: s.spet}, [scan])["summary"]["spet"]
    assert found["same"]["nrmse"]["mean"] == 0 < found["LPET"]["nrmse"]["mean"]
    assert found["LPET"]["psnr"]["mean"] == compare(scan, {}).rows["LPET"]["psnr"]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_compare_takes_an_image_as_explore_does(kind):
    """Today's fault: AttributeError for an array."""
    scan = case()
    image = scan.spet * 0.5 + scan.lpet * 0.5
    assert compare(scan, kind(image)).rows["restored"] == compare(scan, {"restored": image}).rows["restored"]


def test_what_cannot_be_judged_is_refused_in_a_sentence():
    scan = bare(case())
    with pytest.raises(ValueError, match="restored: expected the LPET's grid"):
        compare(scan, scan.lpet[1:])
    with pytest.raises(ValueError, match="restored: expected finite values, found 1 NaN"):
        compare(scan, np.where(np.arange(scan.lpet.size).reshape(scan.lpet.shape) == 7, np.nan, scan.lpet))
    with pytest.raises(ValueError, match="against: expected one of spet, truth, found 'mr'"):
        compare(scan, scan.lpet, against="mr")
    with pytest.raises(ValueError, match="expected at least one scan, found none"):
        evaluate({}, [])
    for change, words in (({"spet": None}, "expected a scan with its spet"), ({"mr": None}, "expected a scan with MR")):
        with pytest.raises(ValueError, match=words):
            audit_mr(lambda lpet, mr: lpet, dataclasses.replace(scan, **change))
        if "spet" in change:
            with pytest.raises(ValueError, match=words):
                evaluate({}, [dataclasses.replace(scan, **change)])


def test_a_reference_that_not_all_scans_have_is_not_summarised():
    with_truth = case()
    found = evaluate({}, [with_truth, bare(with_truth)])
    assert set(found["patients"][0]) == {"name", "spet", "truth"} and set(found["summary"]) == {"spet"}


def test_another_patient_is_never_the_same_one():
    """Today's fault: for icbm152, seed 1, the row "another patient's MR" held the patient's own."""
    patient = virtual_patient(load_anatomy("icbm152"), 1, slices=20)
    scan = Scan(patient.activity, patient.mr, spet=patient.activity, affine=patient.affine, name=patient.name)
    other = another_mr(scan)
    assert other.any() and np.corrcoef(other.ravel(), scan.mr.ravel())[0, 1] < 0.98
    with pytest.raises(ValueError, match="expected another patient than icbm152-1, found the same"):
        another_mr(scan, "icbm152", 1)
