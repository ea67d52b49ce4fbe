"""The slice explorer: what lands where on the screen, in which colour, and what is said about it."""

import base64
import dataclasses
import io
import re
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from mfdiff_lite.look import PLANES, State, explore, figure, panel, panes, render, report_html, show
from mfdiff_lite.look.page import STILLS
from mfdiff_lite.look.panes import CROSS, GAP, GAP_GREY, OWN_MAPS, PET_MAPS
from mfdiff_lite.scan import Scan

SHAPE = (5, 7, 9)
LEFT_ANTERIOR_SUPERIOR = (0, 6, 8)  # in RAS+


def volume(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).uniform(1, 10, shape).astype(np.float32)


def result(mean, n_samples=2):
    settings = {"n_samples": n_samples}
    return SimpleNamespace(mean=mean, std=0.1 * mean, coarse=mean, gate=0 * mean, unit="kBq/mL", settings=settings)


@pytest.fixture
def scan():
    return Scan(volume(0), volume(1), spet=volume(2), name="case", voxel_size=2.0)


def pixels(view):
    return np.asarray(Image.open(io.BytesIO(view.image.value)))


# --- render ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPI", "PIR"])
@pytest.mark.parametrize("radiological", [True, False])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_left_anterior_superior_lands_where_it_should(orientation, radiological, plane):
    ras = np.full(SHAPE, 0.5, np.float32)
    ras[LEFT_ANTERIOR_SUPERIOR] = 10
    image = nib.Nifti1Image(ras, np.diag([2.0, 2.0, 2.0, 1.0]))
    codes = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(*codes))
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    view = explore(Scan(np.asarray(image.dataobj), affine=image.affine))
    view.plane.value, view.radiological.value = plane, radiological
    axis = PLANES[plane]
    view.slice.value = LEFT_ANTERIOR_SUPERIOR[axis] + 1
    picture = pixels(view)[..., 0]
    height, width = {"axial": (7, 5), "coronal": (9, 5), "sagittal": (9, 7)}[plane]
    assert picture.shape == (height, width)
    dark_on_right = radiological != (plane == "sagittal")  # left of the patient; in the sagittal plane, anterior
    assert np.argwhere(picture == picture.min()).tolist() == [[0, width - 1 if dark_on_right else 0]]
    left, top, right = re.findall(r"<span>(\w)</span>", view.titles.value)
    assert (right if dark_on_right else left) == ("A" if plane == "sagittal" else "L")
    assert top == ("A" if plane == "axial" else "S")
    feet = view._rows[0].children[2].value
    assert re.findall(r"<span>(\w)</span>", feet) == ["P" if plane == "axial" else "I"]
    assert f"{'xyz'[axis]} = {2.0 * LEFT_ANTERIOR_SUPERIOR[axis]:.1f} mm" in view.caption.value


def test_one_window_for_all_pet_panes_and_all_slices():
    same = np.zeros((4, 4, 3), np.float32)
    same[1, 1, 0], same[1, 1, 2] = 5, 5
    volumes = {"LPET": same, "SPET": same + (same == 0) * 7, "restored": same * 1.0}
    for plane_slice in (0, 2):  # slices with different company: no autoscale
        state = State(index=plane_slice, window=(0, 20), radiological=False)
        picture = render(volumes, state)
        colours = [picture[2, 1 + pane * (4 + GAP)] for pane in range(3)]
        expected = round(255 * (1 - 5 / 20))
        assert all(np.all(np.abs(c.astype(int) - expected) <= 1) for c in colours)
        assert np.array_equal(colours[0], colours[1]) and np.array_equal(colours[0], colours[2])


def test_panes_stand_side_by_side_with_a_gap(scan):
    volumes = {"LPET": scan.lpet, "SPET": scan.spet, "MR": scan.mr, "restored": scan.lpet}
    assert list(panes(volumes, State())) == ["LPET", "SPET", "MR", "restored", "restored - SPET"]
    picture = render(volumes, State())
    assert picture.dtype == np.uint8 and picture.shape == (7, 5 * 5 + 4 * GAP, 3)
    assert np.all(picture[:, 5 : 5 + GAP] == GAP_GREY)
    assert list(panes({"LPET": scan.lpet, "restored": scan.lpet}, State()))[-1] == "restored - LPET"


def test_difference_is_centred_on_zero():
    spet = volume()
    restored = spet.copy()
    restored[0, 0, 0] += 3
    restored[1, 0, 0] -= 3
    state = State(difference=3.0, radiological=False)
    picture = render({"SPET": spet, "restored": restored}, state)[:, -5:].astype(int)
    centre, high, low = (255 * np.array(matplotlib.colormaps["RdBu_r"](v)[:3]) for v in (0.5, 1.0, 0.0))
    assert np.allclose(picture[-1, 0], high, atol=1) and np.allclose(picture[-1, 1], low, atol=1)
    assert np.allclose(picture[:-1], centre, atol=1)


def test_mr_has_its_own_window_and_no_say_in_the_pet_window(scan):
    plain, bright = explore(scan), explore(replace_mr(scan, scan.mr * 1000))
    assert plain.state.window == bright.state.window
    assert np.array_equal(pixels(plain)[:, 18:23], pixels(bright)[:, 18:23])  # MR pane: its window follows its scale
    before = pixels(plain)[:, 18:23]
    plain.window.value = (0, 5)
    assert np.array_equal(pixels(plain)[:, 18:23], before)


def replace_mr(scan, mr):
    return Scan(scan.lpet, mr, spet=scan.spet, name=scan.name)


def test_thick_slices_keep_their_proportions():
    lpet = np.zeros((4, 4, 3), np.float32)
    lpet[1, 2, 1] = 1
    state = State("coronal", 2, voxel_size=(2.0, 2.0, 6.0), radiological=False)
    picture = render({"LPET": lpet}, state)[..., 0]
    assert picture.shape == (9, 4)
    assert np.argwhere(picture == 0).tolist() == [[3, 1], [4, 1], [5, 1]]
    assert render({"LPET": lpet}, State("axial", 1, voxel_size=(2.0, 2.0, 6.0))).shape == (4, 4, 3)


def test_an_empty_window_is_a_threshold():
    lpet = np.arange(4, dtype=np.float32).reshape(4, 1, 1)
    picture = render({"LPET": lpet}, State(window=(2.0, 2.0), radiological=False))
    assert picture[0, :, 0].tolist() == [255, 255, 255, 0]


# --- the widget -----------------------------------------------------------------------------------------------------


def test_controls_change_picture_and_caption(scan):
    view = explore(scan, result(volume(3)))
    seen = {(view.image.value, view.caption.value)}
    assert 'role="status" aria-live="polite"' in view.caption.value
    assert "axial slice 5 of 9, z = 8.0 mm" in view.caption.value and "kBq/mL" in view.caption.value
    for change in (
        lambda: setattr(view.slice, "value", 2),
        lambda: setattr(view.window, "value", (1.0, 4.0)),
        lambda: setattr(view.plane, "value", "sagittal"),
        lambda: setattr(view.radiological, "value", False),
    ):
        change()
        seen.add((view.image.value, view.caption.value))
    assert len({image for image, _ in seen}) == len({caption for _, caption in seen}) == len(seen) == 5
    before = view.image.value
    view.pet_map.value = "hot"
    assert view.image.value != before
    assert "PET window 1 to 4 kBq/mL" in view.caption.value and "sagittal slice 3 of 5" in view.caption.value
    assert "kBq/mL" in view.bars.value and "gradient" in view.bars.value


def test_every_slice_of_every_plane_can_be_reached(scan):
    view = explore(scan)
    for plane, count in (("coronal", 7), ("sagittal", 5), ("axial", 9)):
        view.plane.value = plane
        assert view.slice.max == count and view.slice.value == count // 2 + 1
        view.slice.value = count
        assert f"{plane} slice {count} of {count}" in view.caption.value


def test_failure_in_a_callback_is_shown_and_raised_and_goes_away(scan, monkeypatch):
    view = explore(scan)
    with monkeypatch.context() as patch:
        patch.setattr("mfdiff_lite.look.page.panes", lambda volumes, state: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            view.slice.value = 2
        assert 'role="alert"' in view.error.value and "ZeroDivisionError" in view.error.value
        assert view.error in view.children and "&lt;" in view.error.value  # escaped
    view.slice.value = 3
    assert view.error.value == "" and "slice 3 of 9" in view.caption.value


def test_seven_panes_stand_in_two_rows(scan):
    view = explore(scan, result(volume(3)))
    names = [re.findall(r"<b>([^<]+)</b>", row.children[0].value) for row in view._rows]
    assert names == [["LPET", "SPET", "MR", "restored"], ["restored - SPET", "SD", "gate"]]
    pictures = [Image.open(io.BytesIO(row.children[1].value)) for row in view._rows]
    widths = [4 * 5 + 3 * GAP, 3 * 5 + 2 * GAP]
    assert [picture.size for picture in pictures] == [(width, 7) for width in widths]
    assert [row.layout.width for row in view._rows] == ["100.00%", f"{100 * widths[1] / widths[0]:.2f}%"]  # same scale
    single = explore(scan, result(volume(3), n_samples=1))
    assert list(single.values)[-1] == "gate" and "SD" not in single.values


def test_mr_under_pet_shows_where_there_is_no_uptake():
    lpet, mr = np.zeros((2, 5, 5, 3), np.float32)
    lpet[1], lpet[2], mr[:] = 10, 5, 80
    state = State(index=1, window=(0, 10), own_windows={"MR": (0, 100)}, radiological=False, blend=1.0)
    volumes = {"LPET": lpet, "MR": mr}
    picture = render(volumes, state)[2, :5]
    hot, grey = (matplotlib.colormaps[name] for name in ("hot", "gray"))
    under = np.array(grey(0.8)[:3])
    for x, uptake in ((0, 0.0), (1, 1.0), (2, 0.5)):
        expected = uptake * np.array(hot(uptake)[:3]) + (1 - uptake) * under
        assert np.allclose(picture[x], 255 * expected, atol=4)
    assert panes(volumes, replace(state, pet_map="inferno"))["LPET"].colours == "inferno"
    alone = panes(volumes, replace(state, blend=0.0))["LPET"]
    assert alone.colours == "gray_r" and alone.under is None
    view = explore(Scan(lpet, mr))
    before = view.image.value
    view.blend.value = 0.5
    assert view.image.value != before and "MR under PET" in view.caption.value
    assert "MR under PET" not in [w.description for w in controls(explore(Scan(lpet)))]


def controls(widget):
    for child in getattr(widget, "children", ()):
        yield from controls(child)
        if hasattr(child, "description"):
            yield child


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PIR"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_crosshair_reads_the_voxel_that_it_points_at(orientation, plane):
    image = nib.Nifti1Image(volume(), np.array([[2.0, 0, 0, -3], [0, 2, 0, 5], [0, 0, 2, 7], [0, 0, 0, 1]]))
    codes = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(*codes))
    lpet = np.asarray(image.dataobj)
    scan = Scan(lpet, spet=2 * lpet, affine=image.affine)
    view = explore(scan, 3 * lpet)
    view.plane.value = plane
    for voxel in ((0, 0, 0), (1, 2, 3), tuple(np.array(lpet.shape) - 1)):
        mm = nib.affines.apply_affine(image.affine, voxel)
        view.go_to(mm + 0.4)  # to the nearest voxel
        assert np.allclose(view.position, mm, atol=1e-4)
        value = float(lpet[voxel])
        assert np.allclose(list(view.values.values()), [value, 2 * value, 3 * value, value])
        assert list(view.values) == ["LPET", "SPET", "restored", "restored - SPET"]
        assert f"LPET {value:.4g} [kBq/mL], SPET {2 * value:.4g} [kBq/mL]" in view.caption.value
        assert f"crosshair at ({mm[0]:.1f}, {mm[1]:.1f}, {mm[2]:.1f}) mm" in view.caption.value
    with pytest.raises(ValueError, match=r"expected a place between \[-3.0, 5.0, 7.0\] and \[5.0, 17.0, 23.0\] mm"):
        view.go_to((0, 10, 30))


def test_crosshair_lines_meet_at_the_voxel_and_leave_it_free(scan):
    lpet = volume(shape=(40, 41, 42))
    view = explore(Scan(lpet))
    view.window.value = view.window.min, view.window.min  # all voxels at the end of the scale
    view.go_to((2 * 12, 2 * 30, 2 * 5))
    cross = np.all(pixels(view) == CROSS, axis=-1)
    rows, columns = np.flatnonzero(cross.sum(1) > 20), np.flatnonzero(cross.sum(0) > 20)
    assert rows.tolist() == [40 - 30] and columns.tolist() == [39 - 12]  # anterior up, right on the left
    assert not cross[10, 27] and cross.sum() == 40 + 41 - 2 * 7
    shown = [slider.description for slider in controls(view) if slider.description.endswith("slice")]
    boxes = [view._position_rows[plane].layout.display for plane in ("axial", "coronal", "sagittal")]
    assert shown == ["axial slice", "coronal slice", "sagittal slice"] and boxes == [None] * 3
    view.crosshair.value = False
    assert view._position_rows["coronal"].layout.display == "none"
    assert not np.all(pixels(view) == CROSS, axis=-1).any()


def test_each_slider_has_a_play_button_of_its_range(scan):
    view = explore(scan)
    plays = [row.children[1] for row in view._position_rows.values()]
    assert [(play.min, play.max, play.value) for play in plays] == [(1, 9, 5), (1, 7, 4), (1, 5, 3)]


@pytest.mark.parametrize("name", [*PET_MAPS.values(), *OWN_MAPS.values(), "RdBu_r"])
def test_colour_maps_read_in_grey_and_for_colour_blind_eyes(name):
    """Lightness never turns back: every order that colour shows, lightness shows too. (Diverging: in each half.)"""
    colours = matplotlib.colormaps[name](np.linspace(0, 1, 128))[:, :3]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    lightness = np.cbrt(linear @ [0.2126, 0.7152, 0.0722])
    halves = np.split(lightness, 2) if name == "RdBu_r" else [lightness]
    for half in halves:
        steps = np.diff(half)
        assert np.all(steps > -1e-3) or np.all(steps < 1e-3)
        assert abs(half[-1] - half[0]) > 0.4


def test_a_tick_is_cheap_and_leaves_nothing_behind():
    """Under 25 ms of kernel time with four volumes of 128^3."""
    volumes = {name: volume(seed, (128, 128, 128)) for seed, name in enumerate(("LPET", "SPET", "MR", "restored"))}
    view, ticks = explore(volumes), []
    for index in range(30):
        began = time.process_time()
        view.slice.value = index + 1
        ticks.append(time.process_time() - began)
    assert np.median(ticks) < 0.025
    tracemalloc.start()
    for round_ in range(2):
        before = tracemalloc.get_traced_memory()[0]
        for index in range(20):
            view.slice.value = 20 * round_ + index + 1
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 200_000  # a picture or two, not twenty


def test_slices_scroll_without_kernel_or_script_where_no_front_end_runs(scan):
    view = explore(scan, result(volume(3)))
    bundle = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    page = _Page()
    page.feed(bundle["text/html"])
    assert not {"script", "link", "iframe"} & set(page.tags) and "onclick" not in bundle["text/html"]
    bars = [tag for tag in page.attributes if tag.get("type") == "radio"]
    assert len(bars) == 9 and len({bar["name"] for bar in bars}) == 1
    assert [index for index, bar in enumerate(bars) if "checked" in bar] == [4]
    assert len(page.images) == 9 * 2
    for word in ("LPET", "SPET", "MR", "restored - SPET", "gate", "axial slice 5 of 9", "kBq/mL"):
        assert word in page.images[8]["alt"] and word in bundle["text/plain"]
    for index, bar in enumerate(bars):
        assert f"axial slice {index + 1} of 9" in bar["aria-label"]
        data = base64.b64decode(page.images[2 * index]["src"].partition("base64,")[2])
        shown = np.asarray(Image.open(io.BytesIO(data)), float)
        view.slice.value = index + 1
        assert np.abs(shown - pixels(view)).mean() < 8  # a JPEG of the same slice
    other = explore(scan)._repr_mimebundle_()["text/html"]
    assert bars[0]["name"] not in other  # two explorers on a page do not switch each other


def test_a_tall_volume_is_thinned_for_the_page_but_not_its_present_slice():
    view = explore(Scan(volume(shape=(8, 8, 101))))
    view.slice.value = 78
    text = view._repr_mimebundle_()["text/html"]
    assert text.count('type="radio"') in (STILLS, STILLS + 1)
    assert re.search(r'aria-label="axial slice 78 of 101[^"]*" checked', text)


def test_only_core_widgets(scan):
    def every(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from every(child)

    view = explore(scan)
    assert isinstance(view, ipywidgets.VBox)
    assert {w._model_module for w in every(view)} == {"@jupyter-widgets/controls"}
    assert all(w.tooltip is None for w in every(view))  # a tooltip on an Image kills the view in ipywidgets 8.1.9


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_slice_without_mr_and_spet(convert):
    array = volume(shape=(6, 8))
    restored = result(convert(array * 0.5), n_samples=1)
    view = explore(Scan(convert(array)), restored)
    assert view.plane.disabled and view.slice.disabled and view.plane.value == "axial"
    assert re.findall(r"<b>([^<]+)</b>", view.titles.value) == ["LPET", "restored", "restored - LPET"]
    assert pixels(view).shape == (8, 3 * 6 + 2 * GAP, 3)
    assert "axial slice 1 of 1" in view.caption.value
    assert len(view.figure().axes) == 3 * 2  # panes and colour bars


def test_tensor_that_needs_a_gradient(scan):
    mean = torch.from_numpy(volume(3)).requires_grad_()
    assert np.array_equal(pixels(explore(scan, mean)), pixels(explore(scan, mean.detach().numpy())))


def test_lpet_alone_and_more_arrays(scan):
    alone = explore(Scan(scan.lpet))
    assert pixels(alone).shape == (7, 5, 3)
    more = explore(scan, coarse=volume(4), gate=volume(5) / 10)
    assert re.findall(r"<b>([^<]+)</b>", more.titles.value) == ["LPET", "SPET", "MR", "coarse", "gate"]
    assert list(explore(scan, **{"MR of another": scan.mr}).state.own_windows) == ["MR", "MR of another"]
    wrong = r"coarse: expected the LPET's grid \(5, 7, 9\), found \(5, 7, 8\)"
    with pytest.raises(ValueError, match=wrong):
        explore(scan, coarse=volume()[..., :8])
    with pytest.raises(ValueError, match="restored: expected finite"):
        explore(scan, scan.lpet * np.nan)


def test_any_volumes_by_name():
    view = explore({"CT": volume() - 5, "PET": torch.from_numpy(volume(1))}, MR=volume(2), voxel_size=3.0, unit="HU")
    assert list(view.values) == ["CT", "PET", "MR"] and "HU" in view.caption.value
    assert view.window.min < -3 and "z = 12.0 mm" in view.caption.value
    assert len([ax for ax in view.figure(1).axes if ax.images]) == 3
    two = explore({"LPET": volume(), "restored": volume(1)})
    assert list(two.values) == ["LPET", "restored", "restored - LPET"]
    assert list(explore({"a": volume()[..., 0]}).values) == ["a"]
    for given, words in (
        ({}, "expected at least one volume"),
        ({"a": volume(), "b": volume()[1:]}, r"b: expected the a's grid \(5, 7, 9\), found \(4, 7, 9\)"),
        ({"a": np.zeros(3)}, r"a: expected one 3-D volume or a 2-D slice, found shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            explore(given)


def test_nifti_files_by_path_are_brought_to_the_grid_of_the_first(tmp_path):
    x, y, z = np.indices((12, 14, 16)) * 2.0
    ramp = (x + 10 * y + 100 * z).astype(np.float32)  # linear: interpolation is exact
    first = nib.Nifti1Image(ramp, np.diag([2.0, 2, 2, 1]))
    codes = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("LPI")
    turned = first.as_reoriented(nib.orientations.ornt_transform(*codes))
    x, y, z = np.indices((20, 20, 24)) * 1.5 - 1
    fine = nib.Nifti1Image((x + 10 * y + 100 * z).astype(np.float32), np.diag([1.5, 1.5, 1.5, 1]))
    fine.affine[:3, 3] = -1
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("LPET", "turned", "MR")}
    for image, path in zip((first, turned, fine), paths.values(), strict=True):
        nib.save(image, path)
    view = explore({**paths, "array": ramp, "text": str(paths["LPET"])})
    view.go_to((12, 8, 20))
    assert np.allclose(list(view.values.values()), 12 + 80 + 2000, rtol=1e-5)
    assert list(explore(Scan(ramp), paths["LPET"]).values) == ["LPET", "restored", "restored - LPET"]
    with pytest.raises(OSError, match="expected a NIfTI file, found nothing"):
        explore({"LPET": tmp_path / "missing.nii"})


def test_equal_images_give_a_usable_difference_range(scan):
    view = explore(scan, scan.spet)
    assert view.state.difference > 0
    assert len(np.unique(pixels(view)[:, -5:].reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("factor", [1e-4, 1.0, 3e4])
def test_window_fits_the_unit(factor):
    view = explore(Scan(volume() * factor))
    low, high = view.window.value
    assert low == 0 and np.isclose(high / factor, 10, rtol=0.02)
    assert len(np.unique(pixels(view))) > 20


# --- paper ----------------------------------------------------------------------------------------------------------


def test_figure_columns_windows_and_rows(scan):
    fig = figure(scan, result(volume(3)), n_slices=2)
    shown = [ax for ax in fig.axes if ax.images]
    titles = ["LPET", "SPET", "MR", "restored", "restored - SPET", "SD"]
    assert [ax.get_title() for ax in shown] == titles + [""] * 6
    limits = [ax.images[0].get_clim() for ax in shown]
    assert limits[0] == limits[1] == limits[3] == limits[6] and limits[4][0] == -limits[4][1]
    assert all([t.get_text() for t in ax.texts] == ["R", "A", "L", "P"] for ax in shown)
    labels = [ax.get_xlabel() for ax in fig.axes if ax not in shown]
    assert labels.count("activity [kBq/mL]") == 3 and "SD [kBq/mL]" in labels and "difference [kBq/mL]" in labels
    assert fig.get_facecolor() == (1, 1, 1, 1)
    single = figure(scan, result(volume(3), n_samples=1), n_slices=2)
    assert "SD" not in [ax.get_title() for ax in single.axes]
    assert np.array_equal(shown[0].images[0].get_array(), scan.lpet[::-1, ::-1, 5].T)


def test_figure_follows_the_explorer(scan):
    view = explore(scan)
    view.plane.value, view.slice.value, view.window.value = "coronal", 2, (1.0, 3.0)
    (ax, *_) = (ax for ax in view.figure(1).axes if ax.images)
    assert np.array_equal(ax.images[0].get_array(), scan.lpet[::-1, 1, ::-1].T)
    assert ax.images[0].get_clim() == (1.0, 3.0)
    assert len([ax for ax in view.figure(99).axes if ax.images]) == 7 * 3
    view.blend.value, view.crosshair.value = 1, True
    (ax, *_) = (ax for ax in view.figure(1).axes if ax.images)
    mr, pet, lines = ax.images
    assert mr.get_cmap().name == "gray" and pet.get_cmap().name == "hot" and pet.get_alpha().shape == (9, 5)
    assert lines.get_array().shape == (9, 5, 4)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.images = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        self.images += [dict(attrs)] if tag == "img" else []

    def handle_data(self, data):
        self.text += data


def test_report_stands_alone_and_is_escaped(scan):
    scan = dataclasses.replace(scan, name='a"><script>alert(1)</script>')
    text = report_html(scan, result(volume(3)), {"<b>PSNR": "30 < 40 & {more}", "weights": "é"})
    page = _Page()
    page.feed(text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not any(name.startswith("on") for attributes in page.attributes for name in attributes)
    assert "<b>PSNR" in page.text and "30 < 40 & {more}" in page.text and "é" in page.text
    assert "Teaching and research only; not a medical device." in page.text
    assert '<meta charset="utf-8">' in text and page.tags.count("title") == 1 and page.tags.count("tr") == 2
    assert len(page.images) == 1 + 9 * 2 and page.text.count("PSNR") == 1  # the figure, and two rows of each slice
    for image in page.images:
        assert re.match("data:image/(png|jpeg);base64,", image["src"]) and "<script>alert(1)</script>" in image["alt"]
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|https?://", text)


def test_panel_puts_the_patients_right_on_the_left_and_centres_mm():
    from matplotlib.figure import Figure

    image = np.zeros((64, 64))
    image[40, 50] = 5.0  # right (+x) and anterior (+y) of the centre
    ax = Figure().subplots()
    drawn = panel(ax, image, "t", "activity [kBq/mL]", window=(0, 5))
    left, right = ax.get_xlim()
    assert left > right  # x runs from the patient's right to the left, radiological
    x0, x1, y0, y1 = drawn.get_extent()
    assert (x0, x1, y0, y1) == (-64, 64, -64, 64)
    assert drawn.get_array()[50, 40] == 5.0 and drawn.origin == "lower"
    assert [text.get_text() for text in ax.texts] == ["R", "L"]
    assert ax.texts[0].get_position()[0] < ax.texts[1].get_position()[0]


def test_air_is_cut_off_and_places_stay_right():
    """A head of 10 x 12 voxels in a wide field of view: shown with a margin of 4, at the same place in mm."""
    lpet = np.zeros((60, 64, 6), np.float32)
    lpet[30:40, 20:32] = volume(shape=(10, 12, 6))
    scan = Scan(lpet, affine=np.array([[2.0, 0, 0, -50], [0, 2, 0, -40], [0, 0, 2, 7], [0, 0, 0, 1]]))
    view = explore(scan)
    assert pixels(view).shape == (12 + 8, 10 + 8, 3)
    assert "slice 4 of 6, z = 13.0 mm" in view.caption.value
    view.plane.value = "sagittal"
    view.slice.value = 5  # the first voxel of the head along x: voxel 30, at 10 mm
    assert "x = 10.0 mm" in view.caption.value


def test_show_displays_a_picture_with_its_text_and_closes_it(monkeypatch):
    shown = []
    monkeypatch.setattr("mfdiff_lite.look.page.display", lambda data, raw: shown.append(data))
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    show(fig, 'a line that rises from 1 to 2 "kBq/mL"')
    assert shown[0]["text/html"].startswith('<img alt="a line that rises from 1 to 2 &quot;kBq/mL&quot;" ')
    assert "data:image/png;base64," in shown[0]["text/html"] and shown[0]["text/plain"].startswith("a line")
    assert not plt.fignum_exists(fig.number)


def test_show_cuts_nothing_off_and_covers_nothing(monkeypatch):
    """Images keep their shape, so that a layout knows where they and their labels end only when they are drawn."""
    shown = []
    monkeypatch.setattr("mfdiff_lite.look.page.display", lambda data, raw: shown.append(data["text/html"]))
    fig, ax = plt.subplots(figsize=(5, 3.9), layout="constrained")
    ax.imshow(np.eye(3))
    ax.set_yticks(range(3), ["a rather long name"] * 3)
    ax.set_ylabel("a label at the edge")
    fig.text(1.01, 0.5, "beyond the edge")
    show(fig, "a square with a diagonal of ones")
    png = re.search('base64,([^"]+)', shown[0]).group(1)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"))
    assert picture.shape[1] > 90 * 5 and all((edge == 255).all() for edge in (*picture[[0, -1]], *picture.T[[0, -1]]))

    fig, axes = plt.subplots(1, 5, figsize=(13, 4.2), layout="constrained")
    for ax in axes:
        drawn = panel(ax, np.eye(128), "a title\nof two lines", None, (-1, 1))
    fig.colorbar(drawn, ax=axes[:4], location="bottom", shrink=0.5)
    above = fig.suptitle("the title of all")
    show(fig, "five squares with a diagonal of ones each")
    assert above.get_window_extent().y0 > axes[0].title.get_window_extent().y1


def test_explore_takes_what_compare_takes(scan):
    """A dict of images beside a scan: the same door."""
    image = scan.spet * 0.5
    found = explore(scan, {"halved": image, "SPET again": scan.spet}).values
    assert {"LPET", "halved", "SPET again"} <= set(found)


def test_looking_and_loading_do_not_wait_for_torch():
    code = "import sys, mfdiff_lite as mf; mf.explore, mf.load_scan, mf.Scan, mf.compare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
