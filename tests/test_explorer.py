"""The slice explorer: what lands where on the screen, in which colour, and what is said about it."""

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from mfdiff_lite import explorer
from mfdiff_lite.explorer import State, explore, figure, panes, render, report_html
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
    axis = explorer.PLANES[plane]
    view.slice.value = LEFT_ANTERIOR_SUPERIOR[axis] + 1
    picture = pixels(view)[..., 0]
    height, width = {"axial": (7, 5), "coronal": (9, 5), "sagittal": (9, 7)}[plane]
    assert picture.shape == (height, width)
    dark_on_right = radiological != (plane == "sagittal")  # left of the patient; in the sagittal plane, anterior
    assert np.argwhere(picture == picture.min()).tolist() == [[0, width - 1 if dark_on_right else 0]]
    marks = re.findall(r"<span>(\w)</span>", view.titles.value)
    assert marks[1 if dark_on_right else 0] == ("A" if plane == "sagittal" else "L")
    assert f"{'xyz'[axis]} = {2.0 * LEFT_ANTERIOR_SUPERIOR[axis]:.1f} mm" in view.caption.value


def test_one_window_for_all_pet_panes_and_all_slices():
    same = np.zeros((4, 4, 3), np.float32)
    same[1, 1, 0], same[1, 1, 2] = 5, 5
    volumes = {"LPET": same, "SPET": same + (same == 0) * 7, "restored": same * 1.0}
    for plane_slice in (0, 2):  # slices with different company: no autoscale
        state = State(index=plane_slice, window=(0, 20), radiological=False)
        picture = render(volumes, state)
        colours = [picture[2, 1 + pane * (4 + explorer.GAP)] for pane in range(3)]
        expected = round(255 * (1 - 5 / 20))
        assert all(np.all(np.abs(c.astype(int) - expected) <= 1) for c in colours)
        assert np.array_equal(colours[0], colours[1]) and np.array_equal(colours[0], colours[2])


def test_panes_stand_side_by_side_with_a_gap(scan):
    volumes = {"LPET": scan.lpet, "SPET": scan.spet, "MR": scan.mr, "restored": scan.lpet}
    assert list(panes(volumes, State())) == ["LPET", "SPET", "MR", "restored", "restored - SPET"]
    picture = render(volumes, State())
    assert picture.dtype == np.uint8 and picture.shape == (7, 5 * 5 + 4 * explorer.GAP, 3)
    assert np.all(picture[:, 5 : 5 + explorer.GAP] == explorer.GAP_GREY)
    assert list(panes({"LPET": scan.lpet, "restored": scan.lpet}, State()))[-1] == "restored - LPET"


def test_difference_is_centred_on_zero():
    spet = volume()
    restored = spet.copy()
    restored[0, 0, 0] += 3
    restored[1, 0, 0] -= 3
    state = State(difference=3.0, radiological=False)
    picture = render({"SPET": spet, "restored": restored}, state)[:, -5:].astype(int)
    centre, high, low = (255 * np.array(explorer.matplotlib.colormaps["RdBu_r"](v)[:3]) for v in (0.5, 1.0, 0.0))
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
        patch.setattr(explorer, "render", lambda volumes, state: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            view.slice.value = 2
        assert 'role="alert"' in view.error.value and "ZeroDivisionError" in view.error.value
        assert view.error in view.children and "&lt;" in view.error.value  # escaped
    view.slice.value = 3
    assert view.error.value == "" and "slice 3 of 9" in view.caption.value


def test_still_picture_with_words_where_no_front_end_runs(scan):
    view = explore(scan, result(volume(3)))
    bundle = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    alt = re.search(r'<img alt="([^"]+)"', bundle["text/html"])[1]
    for word in ("LPET", "SPET", "MR", "restored - SPET", "axial slice 5 of 9", "kBq/mL"):
        assert word in alt and word in bundle["text/plain"]
    data = base64.b64decode(re.search(r"base64,([^\"]+)", bundle["text/html"])[1])
    assert Image.open(io.BytesIO(data)).size[0] > 600


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
    assert pixels(view).shape == (8, 3 * 6 + 2 * explorer.GAP, 3)
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
    wrong = r"coarse: expected the LPET's grid \(5, 7, 9\), found \(5, 7, 8\)"
    with pytest.raises(ValueError, match=wrong):
        explore(scan, coarse=volume()[..., :8])
    with pytest.raises(ValueError, match="restored: expected finite"):
        explore(scan, scan.lpet * np.nan)


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
    assert all([t.get_text() for t in ax.texts] == ["R", "L"] for ax in shown)
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


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.images = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [dict(attrs)] if tag == "img" else []

    def handle_data(self, data):
        self.text += data


def test_report_stands_alone_and_is_escaped(scan):
    scan.name = 'a"><script>alert(1)</script>'
    text = report_html(scan, result(volume(3)), {"<b>PSNR": "30 < 40 & {more}", "weights": "é"})
    page = _Page()
    page.feed(text)
    assert not {"script", "link", "b", "iframe"} & set(page.tags)
    assert "<b>PSNR" in page.text and "30 < 40 & {more}" in page.text and "é" in page.text
    assert "Teaching and research only; not a medical device." in page.text
    assert '<meta charset="utf-8">' in text and page.tags.count("title") == 1 and page.tags.count("tr") == 2
    (image,) = page.images
    assert image["src"].startswith("data:image/png;base64,") and "<script>alert(1)</script>" in image["alt"]
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|https?://", text)


def test_panel_puts_the_patients_right_on_the_left_and_centres_mm():
    from matplotlib.figure import Figure

    from mfdiff_lite.explorer import panel

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
