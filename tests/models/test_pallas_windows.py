"""The Pallas kernels of attention within windows, interpreted; and lowered for TPU and GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import lowered
from tests.models.layers import close
from tests.models.windowed import both, boxes, equals_a_mask, inputs, masked
from vit_interact.layout import TokenLayout
from vit_interact.models import pallas_windows
from vit_interact.models.patch_blocks import needed_blocks, patch_blocks
from vit_interact.models.window_attention import window_attention


@pytest.mark.parametrize(
    ("layout", "reach"),
    [
        (TokenLayout(7, 9, 5), 3),  # a block that is not full
        (TokenLayout(9, 5, 0), 3),  # no prefix token
        (TokenLayout(4, 4, 1), 40),  # windows of the whole grid: nothing to skip
    ],
)
def test_equals_a_mask_with_its_derivatives(layout, reach):
    windows = boxes(layout, reach)
    windows[0, 2] = 0  # nobody's window, but it must give zeros as a mask does
    attend = lambda *a: pallas_windows.attend(layout, True, *a, 16)  # noqa: E731
    equals_a_mask(attend, layout, windows)


def test_blocks_that_no_window_reaches_are_not_read():
    layout = TokenLayout(8, 8, 1)
    q, k, v, _ = inputs(layout, batch=(1,))
    windows = jnp.asarray(boxes(layout, 1, batch=(1,)))  # each patch by itself
    blocks = patch_blocks(layout, 16)
    np.testing.assert_array_equal(needed_blocks(windows, layout, 16)[0], np.eye(4, dtype=bool))
    # Each block by itself, the prefix token's with all and all with it.
    share = pallas_windows.computed_share(windows[0], layout, 16)
    np.testing.assert_allclose(share, (4 + 9) * 16**2 / 65**2)
    poison = np.isin(np.arange(65) - 1, blocks.patches[1:])
    v = jnp.where(poison[:, None, None], jnp.nan, v)
    found = np.asarray(pallas_windows.attend(layout, True, q, k, v, windows, 16))[0]
    assert np.isfinite(found[1 + blocks.patches[0]]).all()
    assert np.isnan(found[0]).all()  # the prefix token reads all


def test_leading_axes_bf16_and_vmap():
    layout = TokenLayout(6, 5, 1)
    q, k, v, _ = inputs(layout, batch=(2, 2))
    windows = boxes(layout, 3, batch=())
    expected = masked(q, k, v, windows, layout)
    attend = jax.jit(functools.partial(window_attention, layout=layout, kernel="pallas"))
    close(attend(q, k, v, windows), expected)
    close(jax.vmap(attend, in_axes=(0, 0, 0, None))(q, k, v, windows), expected)
    half = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), windows)
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), expected, 0.03)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(("side", "dtype"), [(14, "bfloat16"), (64, "float32")])
@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "xla.gpu.triton")]
)
def test_kernels_lower_for_accelerators(platform, call, side, dtype):
    if platform == "cuda":
        pytest.importorskip("jax.experimental.pallas.triton", reason="this jax has no Triton")
    layout = TokenLayout(side, side, 1)
    tokens = jax.ShapeDtypeStruct((2, layout.num_tokens, 6, 64), dtype)
    windows = jax.ShapeDtypeStruct((2, layout.num_patches, 4), "int32")

    def derivatives(q, k, v, windows, g):
        attend = lambda *a: window_attention(*a, windows, layout, kernel="pallas")  # noqa: E731
        return both(attend, g, q, k, v)

    text = lowered(derivatives, platform, tokens, tokens, tokens, windows, tokens)
    for name in ("windows", "windows_queries", "windows_keys"):
        assert f"vit_interact_{name}" in text
    assert text.count(f"@{call}") + text.count(f"@__gpu${call}") == 3


def test_what_kernels_cannot_do_is_said():
    layout = TokenLayout(4, 4, 1)
    q, k, v, _ = inputs(layout)
    windows = boxes(layout, 2)
    with pytest.raises(ValueError, match="expected None or 'pallas'"):
        window_attention(q, k, v, windows, layout, kernel="cuda")
    with jax.enable_x64(True), pytest.raises(ValueError, match="not in float64"):
        wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v)]
        window_attention(*wide, windows, layout, kernel="pallas")
