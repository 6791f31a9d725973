import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import applied, tiny
from tests.models.layers import close
from vit_interact import interactions as vx
from vit_interact.interactions.boxes import clipped_boxes
from vit_interact.models.config import WindowConfig
from vit_interact.models.vit import ViT
from vit_interact.models.weights import stack_layers
from vit_interact.models.winft import predicted_distances, to_winft, without_windows


@pytest.mark.parametrize(
    "indicator",
    [pytest.param("edge", marks=pytest.mark.slow), "rollout"],  # smallest entries to 1e-5
)
def test_everything_agrees_with_the_functions(indicator, monkeypatch):
    # Both are to multiply by the same library.
    monkeypatch.setattr("vit_interact.models.cpu._known_here", lambda: False)
    model, params, images = tiny(distilled=True, pos_prefix=2)
    layout = model.config.layout
    dataset = vi.analyze(model, params, images, indicator=indicator, coverage=0.7, layers=(0, 2))
    maps = vi.measure(model, params, images, (indicator,), layers=(0, 2))[indicator]
    assert list(dataset["layer"].values) == [0, 2]
    view = vx.patch_view(maps, layout, rows=False)
    np.testing.assert_allclose(dataset["interaction"], np.moveaxis(view, 0, 1), rtol=1e-5)
    combined = maps[-1] if indicator == "rollout" else vx.combine_layers(maps, layout)
    rows = vx.patch_view(combined, layout)
    np.testing.assert_allclose(dataset["combined_interaction"], rows, rtol=1e-4, atol=1e-7)
    windows = vx.smallest_windows(rows, layout, 0.7)
    np.testing.assert_array_equal(dataset["combined_window"], windows)
    impact = vx.received_impact(combined, layout)
    grid = (2, layout.rows, layout.cols)
    np.testing.assert_allclose(dataset["combined_received_impact"], impact.reshape(grid), rtol=1e-4)
    np.testing.assert_array_equal(dataset["removal_order"], vx.removal_order(impact))
    field = vx.responsive_field(rows, layout)
    for name in field._fields:
        np.testing.assert_allclose(
            dataset[f"combined_{name}"], getattr(field, name), rtol=1e-3, atol=1e-3
        )
    np.testing.assert_allclose(dataset["combined_area"], vx.window_area(windows, layout))
    logits = np.asarray(applied(model, params, images))
    np.testing.assert_array_equal(dataset["prediction"][:, 0], logits.argmax(-1))
    np.testing.assert_allclose(dataset["score"], logits.max(-1), rtol=1e-4)


def test_another_library_multiplies_as_well():
    """A program that runs seldom does without YNNPACK on a CPU."""
    model, params, images = tiny()
    found = vi.analyze(model, params, images, indicator="edge")["interaction"]
    maps = vi.measure(model, params, images, ("edge",))["edge"]
    close(found, np.moveaxis(vx.patch_view(maps, model.config.layout, rows=False), 0, 1))


@pytest.mark.parametrize("indicator", ["leave_one_out", "edge"])
def test_one_block_for_all_layers_finds_the_same(indicator):
    """Commands loop one block where there are few images."""
    model, params, images = tiny()
    scanned = ViT(dataclasses.replace(model.config, scan=True))
    found = vi.analyze(scanned, stack_layers(params), images, indicator)
    expected = vi.analyze(model, params, images, indicator)
    assert set(found) == set(expected) and found.attrs == expected.attrs
    for name in ("interaction", "combined_interaction", "received_impact", "score", "probability"):
        close(found[name], expected[name])


def test_predicted_windows_are_what_the_model_predicts():
    model, params, images = tiny()
    layout = model.config.layout
    ours, params = to_winft(model, params, WindowConfig(layers=(1,), groups=1))
    head = params["Transformer"]["encoderblock_1"]["WindowHead_0"]["Dense_0"]
    head["bias"] = jnp.array([-4.0, -5.0, -3.0, -6.0])
    dataset = vi.analyze(ours, params, images, indicator="attention")
    assert list(dataset["window_layer"].values) == [1]
    found = dataset["predicted_window"].transpose("window_layer", "image", ...).values
    _, distances = predicted_distances(ours, params, images)
    np.testing.assert_allclose(found, clipped_boxes(distances, layout), rtol=1e-5)
    assert (found[..., 2:] > found[..., :2]).all() and found[..., 2].max() <= layout.rows
    assert "predicted_window" not in vi.analyze(model, without_windows(ours, params)[1], images)


def test_zero_rows_are_nan_and_units_are_named():
    """With a class-token head the last layer's patch rows of `edge` are zero."""
    model, params, images = tiny()
    dataset = vi.analyze(model, params, images, indicator="edge")
    last = dataset.isel(layer=-1)
    assert np.isnan(last["spread"]).all() and np.isnan(last["tendency"]).all()
    np.testing.assert_allclose(last["area"], 1 / 12)
    assert np.isfinite(dataset["combined_spread"]).all()
    assert dataset["spread"].attrs["units"] == "patches"
    assert dataset["interaction"].attrs["units"] == "change of score"
    json.dumps(dataset.attrs)  # attributes survive any store


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indicator": "nope"}, "unknown indicator"),
        ({"coverage": 0.0}, "coverage"),
        ({"coverage": 1.5}, "coverage"),
        ({"layers": (9,)}, "layers 0 to 2"),
    ],
)
def test_wrong_options(options, message):
    model, params, images = tiny()
    with pytest.raises(ValueError, match=message):
        vi.analyze(model, params, images, **options)


def test_a_foreign_model_needs_a_layout():
    model, params, images = tiny()
    with pytest.raises(ValueError, match="needs layout=TokenLayout"):
        vi.analyze(model.apply, params, images)
