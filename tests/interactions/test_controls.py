"""Control windows: same area, still around the query, and as their names say."""

import jax
import numpy as np
import pytest

from vit_interact import TokenLayout
from vit_interact import interactions as vx
from vit_interact.interactions import controls

LAYOUTS = [TokenLayout(4, 5, 1), TokenLayout(1, 6, 0), TokenLayout(5, 1, 2)]


def made_up(layout, batch=3):
    rows = np.random.default_rng(0).exponential(size=(batch, *[layout.num_patches] * 2)) ** 3
    return rows.astype(np.float32), np.asarray(vx.smallest_windows(rows, layout, 0.6))


def areas(boxes):
    boxes = np.asarray(boxes)
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def check_inside(boxes, layout):
    boxes, (r, c) = np.asarray(boxes), np.divmod(np.arange(layout.num_patches), layout.cols)
    assert (boxes[..., 0] <= r).all() and (r < boxes[..., 2]).all()
    assert (boxes[..., 1] <= c).all() and (c < boxes[..., 3]).all()
    assert boxes.min() >= 0
    assert boxes[..., 2].max() <= layout.rows and boxes[..., 3].max() <= layout.cols


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_area_around_the_query(layout):
    rows, windows = made_up(layout)
    for made in (
        controls.centred_windows(windows, layout),
        controls.random_windows(windows, layout, jax.random.key(0)),
        controls.lowest_windows(rows, windows, layout),
    ):
        check_inside(made, layout)
        np.testing.assert_array_equal(areas(made), areas(windows))


def test_centred_by_hand():
    layout = TokenLayout(3, 4, 0)
    windows = np.tile([0, 0, 2, 3], (12, 1))
    made = np.asarray(controls.centred_windows(windows, layout))
    assert made[0].tolist() == [0, 0, 2, 3]  # (0, 0): shifted into the grid
    assert made[6].tolist() == [1, 1, 3, 4]  # (1, 2): (h-1)//2 = 0 above, (w-1)//2 = 1 left
    assert made[11].tolist() == [1, 1, 3, 4]


def test_random_reaches_every_place_and_follows_its_key():
    layout = TokenLayout(1, 5, 0)
    windows = np.tile([0, 0, 1, 2], (2000, 5, 1))
    made = np.asarray(controls.random_windows(windows, layout, jax.random.key(1)))
    lefts = made[:, 2, 1]
    assert set(lefts.tolist()) == {1, 2}
    assert 0.45 < (lefts == 1).mean() < 0.55
    again = controls.random_windows(windows, layout, jax.random.key(1))
    np.testing.assert_array_equal(made, again)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lowest_by_brute_force(layout):
    rows, windows = made_up(layout)
    made = np.asarray(controls.lowest_windows(rows, windows, layout))
    grid = rows.reshape(*rows.shape[:2], layout.rows, layout.cols)

    def mass(image, query, box):
        return grid[image, query, box[0] : box[2], box[1] : box[3]].sum()

    for image in range(len(rows)):
        for query in range(layout.num_patches):
            r, c = divmod(query, layout.cols)
            least = min(
                mass(image, query, (t, left, b, right))
                for t in range(r + 1)
                for b in range(r + 1, layout.rows + 1)
                for left in range(c + 1)
                for right in range(c + 1, layout.cols + 1)
                if (b - t) * (right - left) == areas(windows)[image, query]
            )
            np.testing.assert_allclose(mass(image, query, made[image, query]), least, rtol=1e-5)


def test_grid_tiles_partition_and_come_near_the_area():
    layout = TokenLayout(8, 8, 1)
    windows = np.tile([0, 0, 4, 4], (64, 1))
    made = np.asarray(controls.grid_windows(windows, layout))
    check_inside(made, layout)
    assert areas(made).mean() == 16
    assert len(np.unique(made, axis=0)) * 16 == 64
    _, windows = made_up(layout)
    made = controls.grid_windows(windows, layout)
    np.testing.assert_allclose(areas(made).mean(-1), areas(windows).mean(-1), rtol=0.15)


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"expected \[..., 20, 4\]"):
        controls.centred_windows(np.zeros((3, 4), np.int32), LAYOUTS[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 9)])
def test_windows_of_one_size(layout, size):
    local = controls.local_windows(size, layout)
    check_inside(local, layout)
    assert (areas(local) == min(size[0], layout.rows) * min(size[1], layout.cols)).all()
    for shift in ((0, 0), (1, 1)):
        tiles = np.asarray(controls.shifted_windows(size, layout, shift))
        check_inside(tiles, layout)
        # Tiles do not overlap: whoever lies in my tile has the same one.
        for own in tiles:
            held = [tuple(tiles[r * layout.cols + c]) for r in range(own[0], own[2])
                    for c in range(own[1], own[3])]  # fmt: skip
            assert set(held) == {tuple(own)}


def test_shifted_tiles_by_hand():
    layout = TokenLayout(1, 5, 0)
    plain, moved = (
        np.asarray(controls.shifted_windows((1, 2), layout, (0, shift)))[:, [1, 3]].tolist()
        for shift in (0, 1)
    )
    assert plain == [[0, 2], [0, 2], [2, 4], [2, 4], [4, 5]]
    assert moved == [[0, 1], [1, 3], [1, 3], [3, 5], [3, 5]]
    with pytest.raises(ValueError, match="at least 1x1"):
        controls.local_windows((0, 2), layout)
