"""Histograms of the entries of indicators: against NumPy, and stores from before there were any."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import tiny
from vit_interact import interactions as vx
from vit_interact.interactions.statistics import Statistics
from vit_interact.survey import Design, load_survey, merge_surveys, observe, pool
from vit_interact.survey.quantities import MOST_PAIRS, value_pairs
from vit_interact.survey.store import check_same, save, to_dataset

NAMES = ("attention", "edge")


@pytest.fixture(scope="module")
def tiny_survey():
    """A model of 3 x 4 patches, so that all pairs count, and statistics of three of four images."""
    model, params, images = tiny(num_classes=2, batch=4)
    design = Design.of(model, indicators=NAMES, coverages=())
    real = jnp.array([True, True, False, True])

    @jax.jit
    def step(statistics, params, images):
        return pool(statistics, observe(design, model, params, images), real)

    return model, params, images, design, step(design.empty(), params, images)


def test_values_are_those_of_the_arrays(tiny_survey):
    model, params, images, design, statistics = tiny_survey
    layout = design.layout
    for name, maps in vi.measure(model, params, images[jnp.array([0, 1, 3])], NAMES).items():
        view = np.asarray(vx.patch_view(maps, layout), float)
        entries = np.where(view.any(-1, keepdims=True), view * layout.num_patches, np.nan)
        found = statistics[f"{name}_value"]
        edges = np.asarray(found.edges, float)
        assert edges[0] == pytest.approx(1e-4) and edges[-1] == pytest.approx(12)
        np.testing.assert_allclose(np.diff(np.log(edges)), np.log(edges[1] / edges[0]), rtol=1e-4)
        for layer, own in enumerate(entries):
            own = own[np.isfinite(own)]
            assert found.count[layer] == own.size
            bins = np.asarray(found.histogram[layer])
            assert bins.sum() == own.size
            if not own.size:
                continue
            expected = np.histogram(own, edges)[0]
            # An entry within rounding of an edge may fall on either side.
            assert np.abs(bins[1:-1] - expected).sum() <= 2
            assert abs(bins[0] - (own < edges[0]).sum()) <= 1
            for value, other in ((found.mean, 1.0), (found.variance, own.var()),
                                 (found.min, own.min()), (found.max, own.max())):  # fmt: skip
                np.testing.assert_allclose(value[layer], other, rtol=1e-3, atol=1e-5)
    # With a class token, patches of the last layer cannot change the score: rows of zeros.
    assert statistics["edge_value"].count[-1] == 0 < statistics["edge_value"].count[0]


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (14, 14), (37, 37), (8, 8), (3, 4), (1, 1)])
def test_pairs_have_every_distance_in_its_share(rows, cols):
    layout = vi.TokenLayout(rows, cols, 1)
    pairs = value_pairs(layout)
    patches = rows * cols
    assert len(pairs) == len(set(pairs.tolist())) <= MOST_PAIRS
    assert len(pairs) > 0.6 * min(MOST_PAIRS, patches**2)
    place = layout.positions().astype(float)
    apart = np.linalg.norm(place[:, None] - place[None], axis=-1).ravel()
    for reach in (0, 1, 2, 5, 10):
        expected = (apart <= reach).mean() * len(pairs)
        assert abs((apart[pairs] <= reach).sum() - expected) <= 1
    # From all over the grid, as queries and as keys.
    for patch in (pairs // patches, pairs % patches):
        np.testing.assert_allclose(place[patch].mean(0), place.mean(0), atol=0.03 * max(rows, cols))


def test_counts_are_not_overrun():
    design = Design(vi.TokenLayout(16, 16, 1), 12, 6)
    design.check_count(1_281_167)  # ImageNet
    with pytest.raises(ValueError, match="16x16 holds at most 1,343,857 images, got 2,000,000"):
        design.check_count(2_000_000)
    dataclasses.replace(design, values=False).check_count(8_000_000)


def about(start, end):
    return {"weights_sha256": "1", "preprocess": {}, "data": "d", "images": end - start,
            "ranges": [[start, end]]}  # fmt: skip


@pytest.mark.slow
def test_stores_from_before_values_still_open(tmp_path, tiny_survey):
    _, _, _, design, statistics = tiny_survey
    old = dataclasses.replace(design, values=False)
    kept = {name: one for name, one in statistics.items() if not name.endswith("_value")}
    for number in range(2):
        dataset = to_dataset(old, kept, about(3 * number, 3 * number + 3))
        assert '"values": false' in dataset.attrs["design"]
        # As it was written then.
        dataset.attrs["design"] = dataset.attrs["design"].replace(', "values": false', "")
        save(tmp_path / f"old{number}.zarr", dataset)
    found, opened, _ = load_survey(tmp_path / "old0.zarr")
    assert found == old and set(opened) == set(kept)
    merge_surveys([tmp_path / "old0.zarr", tmp_path / "old1.zarr"], tmp_path / "both.zarr")
    assert load_survey(tmp_path / "both.zarr")[2]["images"] == 6
    save(tmp_path / "new.zarr", to_dataset(design, statistics, about(9, 12)))
    assert isinstance(load_survey(tmp_path / "new.zarr")[1]["edge_value"], Statistics)
    with pytest.raises(ValueError, match=r"new.zarr has histograms of values and the other survey"):
        merge_surveys([tmp_path / "old0.zarr", tmp_path / "new.zarr"], tmp_path / "no.zarr")
    with pytest.raises(ValueError, match="lacks histograms of values"):
        check_same(old, about(0, 3), design, about(0, 3), "it")
