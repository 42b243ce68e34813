"""The clickable rate-distortion plot: its view model, and the widget's click without a browser."""

import io

import numpy as np
import pandas as pd
import pytest
from conftest import micro_model
from PIL import Image

from entroformer_lib.studies.measuring import picture_at
from entroformer_lib.views.rate_explorer import RatePoints, figure_of, widget
from entroformer_lib.weights.zoo import save_weights


@pytest.fixture(scope="module")
def points(photo, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "micro.safetensors"
    save_weights(micro_model(lmbdas=(0.01, 0.1)), path, {})
    table = pd.DataFrame(
        [("jpeg", 30.0, 0.5, 29.0, 10.0), ("jpeg", 10.0, 0.2, 25.0, 7.0), (str(path), 0.1, 0.4, 28.0, 9.0),
         (f"{path}@0.01", np.nan, 0.1, 20.0, 5.0)],
        columns=["codec", "setting", "bpp", "psnr_db", "ms_ssim_db"],
    )  # fmt: skip
    return RatePoints(table, photo, picture_at)


def test_points_give_real_pictures(points, photo):
    sizes = [points.at(i).bytes for i in (1, 0)]
    assert sizes[0] < sizes[1]
    for i in range(4):
        shown = points.at(i)
        assert shown.picture.size == photo.size and f"{shown.bytes:,} bytes" in shown.text
    assert "jpeg at 30" in points.at(0).text and points.at(0) == points.at(0)


def test_each_point_is_coded_once(points, photo):
    calls = []
    counted = RatePoints(points.table, photo, lambda *words: calls.append(words[:2]) or (photo, 100))
    for _ in range(3):
        counted.at(3), counted.beside(3)
    assert calls == [(points.table.loc[3, "codec"], None)]


def test_beside_holds_original_result_and_crops(points, photo):
    sheet = points.beside(0, centre=(0.0, 1.0), side=32)
    width, height = photo.size
    assert sheet.size == (2 * width + 8, height + 8 + width)
    assert np.array_equal(np.asarray(sheet)[:height, :width], np.asarray(photo.convert("RGB")))
    corner = photo.convert("RGB").crop((0, height - 32, 32, height))
    large = corner.resize((width, width), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(sheet)[height + 8 :, :width], np.asarray(large))


def test_curves_say_whether_they_are_published(points):
    curve = pd.DataFrame({"codec": "BPG 4:4:4", "bpp": [0.1, 0.2], "psnr_db": [28.0, 30.0]})
    names = [trace.name for trace in figure_of(points, curve).data]
    assert names[0] == "BPG 4:4:4, published" and all(name.endswith(", measured") for name in names[1:])
    jpeg = figure_of(points, curve).data[1]
    assert list(jpeg.x) == [0.2, 0.5] and [point for point, _ in jpeg.customdata] == [1, 0]  # from low rate to high


def test_a_click_shows_the_picture(points):
    box = widget(points, pd.DataFrame(columns=["codec", "bpp", "psnr_db"]))
    plot, text, picture = box.children
    trace = plot.data[0]
    trace._dispatch_on_click(type("P", (), {"point_inds": [1]})(), None)
    assert "jpeg at 30" in text.value
    assert Image.open(io.BytesIO(picture.value)).size == points.beside(0).size
