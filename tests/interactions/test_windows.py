"""Windows against all boxes, tried one by one in float64."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_interact.interactions import window_masks as wm
from vit_interact.interactions import windows as wd
from vit_interact.layout import TokenLayout

COVERAGES = (0.125, 0.5, 0.9, 1.0)


def boxes(layout, i):
    """All boxes that contain patch `i`, in lexicographic order."""
    row, col = divmod(i, layout.cols)
    return itertools.product(
        range(row + 1),
        range(col + 1),
        range(row + 1, layout.rows + 1),
        range(col + 1, layout.cols + 1),
    )


def brute_force(rows, layout, coverages):
    """METHOD's definition read aloud: int `[Q, P, 4]`."""
    found = []
    for i, row in enumerate(np.asarray(rows, np.float64)):
        grid = row.reshape(layout.rows, layout.cols) / (row.sum() or 1.0)
        tried = [
            ((b - t) * (r - left), grid[t:b, left:r].sum(), (t, left, b, r))
            for t, left, b, r in boxes(layout, i)
        ]
        of_query = []
        for coverage in coverages:
            share = coverage - 1e-6 if row.sum() > 0 else 0.0
            enough = [box for box in tried if box[1] >= share]
            area = min(box[0] for box in enough)
            enough = [box for box in enough if box[0] == area]
            mass = max(box[1] for box in enough)
            of_query.append(next(box[2] for box in enough if box[1] >= mass - 1e-6))
        found.append(of_query)
    return np.array(found).swapaxes(0, 1)


def example_maps(layout):
    """Maps of small integers: masses are exactly tied, or differ by much more than 1e-6."""
    rng = np.random.default_rng(0)
    shape = (layout.num_patches,) * 2
    corner = np.zeros(shape)
    corner[:, -1] = 3
    maps = [
        np.zeros(shape),
        np.ones(shape),
        np.eye(layout.num_patches),
        corner,
        np.where(rng.random(shape) < 0.8, 0, 1),  # many ties, some rows of zeros
        rng.integers(0, 3, shape),
        rng.integers(0, 9, shape),
        rng.integers(0, 2, shape) * 2.0 ** rng.integers(0, 6, shape),
    ]
    return np.stack(maps).astype(np.float32)


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (3, 5), (5, 4)])
def test_smallest_windows_are_those_of_brute_force(grid):
    layout = TokenLayout(*grid)
    maps = example_maps(layout)
    found = wd.smallest_windows(maps, layout, COVERAGES)
    assert found.shape == (len(COVERAGES), len(maps), layout.num_patches, 4)
    assert found.dtype == jnp.int32
    for index, rows in enumerate(maps):
        np.testing.assert_array_equal(
            found[:, index], brute_force(rows, layout, COVERAGES), err_msg=f"map {index}"
        )


def test_float_maps_have_valid_boxes_of_the_smallest_area():
    layout = TokenLayout(6, 7)
    rng = np.random.default_rng(1)
    rows = rng.random((layout.num_patches,) * 2).astype(np.float32) ** 6
    coverages = (0.3, 0.77, 0.95, 1.0)
    found = np.asarray(wd.smallest_windows(rows, layout, coverages))
    expected = brute_force(rows, layout, coverages)
    grids = (rows / rows.sum(1, keepdims=True)).reshape(-1, 6, 7).astype(np.float64)
    for query, windows in enumerate(found):
        np.testing.assert_array_equal(areas(windows), areas(expected[query]))
        for i, (top, left, bottom, right) in enumerate(windows):
            row, col = divmod(i, 7)
            assert 0 <= top <= row < bottom <= 6
            assert 0 <= left <= col < right <= 7
            assert grids[i, top:bottom, left:right].sum() >= coverages[query] - 1.5e-6


def areas(windows):
    return (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])


def test_mass_decides_between_equal_areas_and_order_between_equal_masses():
    layout = TokenLayout(3, 3)
    rows = np.zeros((9, 9), np.float32)
    rows[4, [1, 3, 5]] = 4, 5, 5  # left or right of the centre hold more than above it
    rows[0, [1, 3]] = 4, 4  # below the corner or right of it: same mass
    found = np.asarray(wd.smallest_windows(rows, layout, 0.3))
    assert found[4].tolist() == [1, 0, 2, 2]
    assert found[0].tolist() == [0, 0, 1, 2]


def test_masses_within_the_tolerance_are_ties():
    layout = TokenLayout(1, 3)
    rows = np.zeros((3, 3), np.float32)
    rows[1] = 0.5 - 2e-7, 0, 0.5 + 2e-7
    assert np.asarray(wd.smallest_windows(rows, layout, 0.4))[1].tolist() == [0, 0, 1, 2]
    rows[1] = 0.5 - 2e-6, 0, 0.5 + 2e-6
    assert np.asarray(wd.smallest_windows(rows, layout, 0.4))[1].tolist() == [0, 1, 1, 3]


def test_full_coverage_asks_for_no_more_than_the_row_holds():
    layout = TokenLayout(12, 11)
    rng = np.random.default_rng(2)
    rows = np.zeros((layout.num_patches,) * 2, np.float32)
    # Thousandths and thirds that round when summed, inside a 5x4 box; all queries are inside it.
    inside = np.zeros((12, 11), bool)
    inside[3:8, 2:6] = True
    rows[:, inside.ravel()] = rng.random((layout.num_patches, 20)) / 3 + 1e-3
    found = np.asarray(wd.smallest_windows(rows * 1e30, layout, 1.0))
    assert (found[inside.ravel()] == [3, 2, 8, 6]).all()


def test_scale_of_rows_does_not_matter_and_unusable_rows_get_their_own_patch():
    layout = TokenLayout(4, 4)
    rows = np.random.default_rng(3).integers(1, 9, (16, 16)).astype(np.float32)
    expected = np.asarray(wd.smallest_windows(rows, layout))
    rows *= 2.0 ** np.arange(-60, 68, 8, dtype=np.float32)[:, None]
    rows[5, 3], rows[6, 6], rows[7] = np.nan, np.inf, 0
    found = np.asarray(wd.smallest_windows(rows, layout))
    for i in (5, 6, 7):
        row, col = divmod(i, 4)
        assert found[i].tolist() == [row, col, row + 1, col + 1]
    np.testing.assert_array_equal(np.delete(found, [5, 6, 7], 0), np.delete(expected, [5, 6, 7], 0))


def test_leading_axes_chunks_vmap_and_bfloat16_agree():
    layout = TokenLayout(4, 5)
    maps = np.random.default_rng(4).integers(0, 9, (2, 5, 20, 20)).astype(np.float32)
    one_by_one = np.stack(
        [[wd.smallest_windows(rows, layout, 0.7) for rows in layer] for layer in maps]
    )

    def search(x):
        return wd.smallest_windows(x, layout, 0.7)

    for found in (
        search(maps),
        jax.vmap(search)(maps),
        search(jnp.asarray(maps, jnp.bfloat16)),  # integers below 256 are exact
    ):
        np.testing.assert_array_equal(found, one_by_one)
    bytes_of_three = 3 * 4 * (3 * 20 * 6 + 400)  # 20 lanes: four chunks, the last overlaps
    for at_once in (False, True):
        chunked = wd._windows_of_maps(
            jnp.asarray(maps.reshape(10, 4, 5, 20)), jnp.arange(5), layout, (0.7,), 1,
            bytes_of_three, at_once,
        )  # [maps, columns, coverages, rows, 4]  # fmt: skip
        chunked = jnp.swapaxes(chunked[:, :, 0], 1, 2).reshape(10, 20, 4)
        np.testing.assert_array_equal(chunked, one_by_one.reshape(10, 20, 4))


@pytest.mark.parametrize(("rows", "cols", "highest"), [(3, 5, 2), (7, 4, 2), (6, 6, 9), (1, 8, 3)])
def test_on_an_accelerator_the_search_has_no_loop_that_depends_on_what_it_finds(
    rows, cols, highest, monkeypatch
):
    layout = TokenLayout(rows, cols)
    patches = layout.num_patches
    maps = np.random.default_rng(rows).integers(0, highest, (40, patches, patches))
    maps = maps.astype(np.float32)  # of few numbers, so that many boxes tie
    maps[3, 1], maps[4, 0, 0] = 0, np.nan
    search = lambda x: wd.smallest_windows(x, layout, (0.3, 0.9, 1.0))  # noqa: E731
    expected = search(maps)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    compiled = jax.jit(search).lower(maps).compile()
    np.testing.assert_array_equal(compiled(maps), expected)
    # How often each loop turns is known: of maps, and of columns.
    loops = re.findall(r" while\(.*", compiled.as_text())
    assert loops and all("known_trip_count" in loop for loop in loops)
    jax.clear_caches()


def test_no_maps_have_no_windows():
    assert wd.smallest_windows(jnp.zeros((0, 4, 4)), TokenLayout(2, 2)).shape == (0, 4, 4)


def test_sharded_maps_agree_with_one_device():
    layout = TokenLayout(3, 4)
    maps = np.random.default_rng(5).integers(0, 9, (8, 12, 12)).astype(np.float32)
    expected = wd.smallest_windows(maps, layout)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.device_put(maps, NamedSharding(mesh, spec))
    search = lambda x: wd.smallest_windows(x, layout)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(search)(sharded), expected)
    mapped = jax.jit(jax.shard_map(search, mesh=mesh, in_specs=spec, out_specs=spec))
    compiled = mapped.lower(sharded).compile()
    found = compiled(sharded)
    np.testing.assert_array_equal(found, expected)
    assert len(found.sharding.device_set) == 8
    assert "all-gather" not in compiled.as_text()


def test_several_coverages_share_one_pass():
    layout = TokenLayout(12, 12)
    maps = np.random.default_rng(6).integers(0, 99, (144, 144)).astype(np.float32)

    def compiled(coverage):
        search = jax.jit(lambda x: wd.smallest_windows(x, layout, coverage))
        return search.lower(maps).compile()

    coverages = (0.5, 0.9)
    together, alone = compiled(coverages), [compiled(coverage) for coverage in coverages]
    np.testing.assert_array_equal(together(maps), np.stack([one(maps) for one in alone]))
    # The bands and the table of heaviest boxes are made once: their matrix products are the proof.
    products = [search.as_text().count(" dot(") for search in (together, alone[0])]
    assert products[0] == products[1] > 0
    work = [search.cost_analysis()["bytes accessed"] for search in (together, *alone)]
    assert work[0] < 0.8 * sum(work[1:])


@pytest.mark.parametrize("maps", [1, 16])
def test_memory_of_a_large_grid_is_bounded(maps):
    layout = TokenLayout(37, 37)
    shape = jax.ShapeDtypeStruct((maps, 1369, 1369), jnp.float32)
    search = jax.jit(lambda x: wd.smallest_windows(x, layout, (0.5, 0.9)))
    memory = search.lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * 2**20


def test_large_grid():
    layout = TokenLayout(37, 37)
    row, col = layout.positions().T
    distance = np.maximum(abs(row[:, None] - row), abs(col[:, None] - col))
    found = np.asarray(wd.smallest_windows((distance <= 3).astype(np.float32), layout, 1.0))
    expected = [
        np.maximum(row - 3, 0),
        np.maximum(col - 3, 0),
        np.minimum(row + 4, 37),
        np.minimum(col + 4, 37),
    ]
    np.testing.assert_array_equal(found, np.stack(expected, axis=-1))


@pytest.mark.parametrize("coverage", [0.0, -0.1, 1.1, float("nan"), (0.5, 2.0), ()])
def test_wrong_coverage_is_refused(coverage):
    with pytest.raises(ValueError, match="coverage"):
        wd.smallest_windows(np.ones((4, 4), np.float32), TokenLayout(2, 2), coverage)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="patch_indicator has shape"):
        wd.smallest_windows(np.ones((5, 5), np.float32), TokenLayout(2, 2))
    with pytest.raises(ValueError, match="windows have shape"):
        wm.window_mask(np.ones((5, 4), np.int32), TokenLayout(2, 2))


def random_windows(layout, batch=()):
    rng = np.random.default_rng(7)
    row, col = layout.positions().T
    shape = (*batch, layout.num_patches)
    return np.stack(
        [
            rng.integers(0, row + 1, shape),
            rng.integers(0, col + 1, shape),
            rng.integers(row + 1, layout.rows + 1, shape),
            rng.integers(col + 1, layout.cols + 1, shape),
        ],
        axis=-1,
    ).astype(np.int32)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_window_mask_opens_the_box_and_the_prefix(prefix):
    layout = TokenLayout(3, 4, prefix)
    windows = random_windows(layout, (2,))
    mask = np.asarray(wm.window_mask(windows, layout))
    assert mask.shape == (2, layout.num_tokens, layout.num_tokens)
    assert mask.dtype == bool
    assert mask[:, :prefix].all()
    assert mask[:, :, :prefix].all()
    for b, i, j in itertools.product(range(2), range(12), range(12)):
        top, left, bottom, right = windows[b, i]
        inside = top <= j // 4 < bottom and left <= j % 4 < right
        assert mask[b, prefix + i, prefix + j] == inside


def test_area_and_coverage_map():
    layout = TokenLayout(3, 4)
    windows = random_windows(layout, (2,))
    inside = np.asarray(wm.window_mask(windows, TokenLayout(3, 4, 0)))
    np.testing.assert_allclose(wm.window_area(windows, layout), inside.sum(-1) / 12, rtol=1e-6)
    np.testing.assert_allclose(wm.coverage_map(windows, layout), inside.sum(-2) / 12, rtol=1e-6)
    assert wm.coverage_map(windows, layout).min() >= np.float32(1 / 12)
