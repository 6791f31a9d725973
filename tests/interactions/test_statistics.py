"""Statistics against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vit_interact.interactions.statistics import Statistics

EDGES = (-1.0, 0.0, 0.5, 2.0)


def fold(batches, **options):
    statistics = Statistics.empty(batches.shape[2:], **options)
    for batch in batches:
        statistics = statistics.update(batch)
    return statistics


def assert_matches(statistics, x, rtol=2e-6):
    """Compares with numpy over the first axis of `x`, NaN left out."""
    x = np.asarray(x, np.float64)
    np.testing.assert_array_equal(statistics.count, (~np.isnan(x)).sum(0))
    np.testing.assert_allclose(statistics.mean, np.nanmean(x, 0), rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(statistics.variance, np.nanvar(x, 0), rtol=10 * rtol, atol=1e-12)
    np.testing.assert_array_equal(statistics.min, np.nanmin(x, 0))
    np.testing.assert_array_equal(statistics.max, np.nanmax(x, 0))


def histogram_of(x, edges):
    """Numpy's bins with one below and one above, for each element of the entries."""
    x = np.asarray(x, np.float32)
    flat = x.reshape(len(x), -1).T
    rows = [
        [(e < edges[0]).sum(), *np.histogram(e, np.float32(edges))[0], (e > edges[-1]).sum()]
        for e in flat
    ]
    return np.array(rows).reshape(*x.shape[1:], len(edges) + 1)


def test_batches_give_the_statistics_of_all():
    x = np.random.default_rng(0).standard_normal((5, 7, 2, 3)).astype(np.float32)
    statistics = fold(x, edges=EDGES)
    assert_matches(statistics, x.reshape(35, 2, 3))
    np.testing.assert_array_equal(statistics.histogram, histogram_of(x.reshape(35, 2, 3), EDGES))


def test_edges_belong_to_bins_as_in_numpy():
    x = np.array([-2, -1, -0.5, 0, 0.5, 1, 2, 2.5, np.inf, np.nan], np.float32)
    statistics = Statistics.empty((), EDGES).update(x)
    assert statistics.histogram.tolist() == [1, 2, 1, 3, 2]
    assert int(statistics.count) == 9


def test_large_mean_and_small_variance():
    rng = np.random.default_rng(1)
    x = (1000 + 0.1 * rng.standard_normal((200, 8, 4))).astype(np.float32)
    statistics = fold(x)
    flat = x.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, flat.mean(0), rtol=1e-7)
    np.testing.assert_allclose(statistics.variance, flat.var(0), rtol=1e-5)


def test_a_long_run_over_sorted_data_follows_the_mean():
    """Here a batch moves the mean by less than its last bit: plain float32 would stand still."""
    first, then = np.full(40_000, 1000.0), np.full(2_000, 1000.5)
    x = np.concatenate([first, then]).astype(np.float32)[:, None]

    def step(statistics, batch):
        return statistics.update(batch), None

    statistics, _ = jax.lax.scan(step, Statistics.empty(()), x)
    exact = x.astype(np.float64)
    assert abs(float(statistics.mean) - exact.mean()) < 4e-5
    assert float(statistics.variance) == pytest.approx(exact.var(), rel=1e-4)


def test_masks_and_nan_are_left_out():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((12, 3)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    entries, elements = rng.random(12) < 0.6, rng.random(x.shape) < 0.6
    empty = Statistics.empty((3,), EDGES)
    for mask in (entries, elements):
        broad = mask[:, None] if mask.ndim == 1 else mask
        kept = np.where(broad, x, np.nan)
        statistics = empty.update(x, mask)
        assert_matches(statistics, kept)
        for element in range(3):
            seen = kept[~np.isnan(kept[:, element]), element]
            expected = histogram_of(seen, EDGES)
            np.testing.assert_array_equal(statistics.histogram[element], expected)


def test_mask_does_not_let_masked_values_through():
    x = np.array([[1.0], [np.inf], [3e38]], np.float32)
    statistics = Statistics.empty((1,)).update(x, np.array([True, False, False]))
    assert_matches(statistics, x[:1])


def test_nothing_seen():
    statistics = Statistics.empty((2,)).update(np.full((4, 2), np.nan, np.float32))
    assert statistics.count.tolist() == [0, 0]
    assert np.isnan(statistics.variance).all()
    assert statistics.min.tolist() == [np.inf, np.inf]
    later = statistics.update(np.ones((1, 2), np.float32))
    assert later.mean.tolist() == [1, 1]
    assert later.variance.tolist() == [0, 0]
    none = later.update(np.zeros((0, 2), np.float32))
    assert none.count.tolist() == [1, 1]
    assert none.max.tolist() == [1, 1]


def test_merge_is_as_if_one_had_seen_all():
    x = (50 + np.random.default_rng(3).standard_normal((30, 2))).astype(np.float32)
    empty = Statistics.empty((2,), EDGES)
    parts = [empty.update(x[:4]), empty, empty.update(x[4:])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert_matches(merged, x)
    other_way = parts[2].merge(parts[0])
    np.testing.assert_allclose(other_way.mean, merged.mean, rtol=1e-7)
    np.testing.assert_allclose(other_way.m2, merged.m2, rtol=1e-6)
    np.testing.assert_array_equal(other_way.histogram, merged.histogram)


def test_scan_is_the_loop_and_repeats_exactly():
    x = np.random.default_rng(4).standard_normal((6, 5, 3)).astype(np.float32)
    scan = jax.jit(
        lambda x: jax.lax.scan(lambda s, b: (s.update(b), None), Statistics.empty((3,), EDGES), x)[
            0
        ]
    )
    first, second, loop = scan(x), scan(x), fold(x, edges=EDGES)
    assert jax.tree.structure(first) == jax.tree.structure(loop)
    for a, b, c in zip(*map(jax.tree.leaves, (first, second, loop)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", ["data", ("data", "model")])
def test_devices_together_give_what_one_device_gives(axes):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(axes)
    rng = np.random.default_rng(5)
    # Each device has another mean: a sum of states would be far off.
    x = (rng.standard_normal((24, 3)) + 300 + np.arange(24)[:, None]).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:6, 0] = np.nan  # a device that has seen nothing of the first element
    edges = (300.0, 310.0, 315.0)

    def update(x):
        return Statistics.empty((3,), edges).update(x).all_reduce(axes)

    mapped = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    together, alone = mapped(x), Statistics.empty((3,), edges).update(x)
    assert_matches(together, x)
    np.testing.assert_allclose(together.m2, alone.m2, rtol=1e-5)
    np.testing.assert_array_equal(together.histogram, alone.histogram)


def test_all_reduce_keeps_small_variances_of_large_means():
    x = (1000 + 0.1 * np.random.default_rng(6).standard_normal((8, 50))).astype(np.float32)
    reduced = jax.vmap(
        lambda x: Statistics.empty(()).update(x).all_reduce("part"), axis_name="part"
    )(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(reduced.mean, exact.mean(), rtol=1e-7)
    np.testing.assert_allclose(reduced.variance, exact.var(), rtol=1e-5)


def test_trees_of_shapes_can_be_made():
    shapes = jax.eval_shape(lambda: Statistics.empty((2,), EDGES))
    assert shapes.histogram.shape == (2, 5)
    assert jax.tree.map(lambda leaf: leaf.shape, Statistics.empty((2,))).mean == (2,)


def test_bfloat16_entries_are_counted_in_float32():
    x = jnp.arange(1000, dtype=jnp.bfloat16)
    statistics = Statistics.empty(()).update(x)
    assert statistics.mean.dtype == jnp.float32
    assert_matches(statistics, np.asarray(x, np.float32))


def test_a_loop_compiles_one_program():
    """What it begins with has the types that it goes on with, weak ones included."""
    before = Statistics.empty((3,), edges=EDGES)
    after = jax.jit(lambda statistics, x: statistics.update(x))(before, jnp.ones((2, 3)))
    assert jax.tree.map(jax.typeof, before) == jax.tree.map(jax.typeof, after)


def test_mistakes_are_named():
    empty = Statistics.empty((2, 3))
    with pytest.raises(ValueError, match="x has shape"):
        empty.update(np.ones((4, 3), np.float32))
    with pytest.raises(ValueError, match="mask has shape"):
        empty.update(np.ones((4, 2, 3), np.float32), np.ones((4, 2), bool))
    with pytest.raises(ValueError, match="same shape"):
        empty.merge(Statistics.empty((2, 3), EDGES))
    for edges in ((1.0,), (1.0, 1.0), (2.0, 1.0, 3.0)):
        with pytest.raises(ValueError, match="increasing"):
            Statistics.empty((), edges)
