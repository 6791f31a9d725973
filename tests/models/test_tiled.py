"""Pallas kernels, interpreted, against attention all at once; and lowered for TPU and GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import lowered
from tests.models.layers import close
from vit_interact import interactions as vx
from vit_interact.models.attend import Tiles, explicit_attention
from vit_interact.models.tile_maps import CUTS, halves
from vit_interact.models.tiled import Tiled, attend_in_tiles, stack_maps

MAPS = ("attention", "dispersion", "gradient", "leave_one_out", "edge")
N, H, K = 37, 2, 12  # three blocks of 16, the last of them mostly empty


def layer(tokens=N, batch=(2,), dtype=jnp.float32, largest=6.0):
    """Query, key, value, output kernel and a gradient of the output; many keys dominate."""
    rng = np.random.default_rng(0)
    q, k, v, g = rng.normal(size=(4, *batch, tokens, H, K))
    q *= np.where(np.arange(tokens) % 3 == 0, largest, 0.5)[:, None, None]
    # Far from zero, so that values need their centre taken off.
    q, k, v, g = (jnp.asarray(x, dtype) for x in (q, k, v + 3, g))
    return q, k, v, jnp.asarray(rng.normal(size=(H, K, 7)), jnp.float32), g


def whole(names, q, k, v, w, g):
    attended = explicit_attention(q, k, v)
    given = {"weights": attended.weights, "values": v, "out_kernel": w, "output_grad": g}
    maps = {name: vx.INDICATORS[name](*(given[n] for n in vx.NEEDS[name])) for name in names}
    return attended.output, maps


def in_tiles(names, tiles, q, k, v, w, g):
    reduce = lambda tiled, g: {name: tiled.indicator(name, g) for name in names}  # noqa: E731
    return attend_in_tiles((q, k, v, None, None, w), tiles, reduce, g)


@pytest.mark.parametrize("kernels", ["gpu", pytest.param("tpu", marks=pytest.mark.slow)])
def test_tiles_equal_all_at_once_where_keys_dominate(kernels):
    arguments = layer(batch=(1, 2))
    weights = np.asarray(explicit_attention(*arguments[:3]).weights)
    assert (1 - weights.max(-1)).min() < 1e-6  # nothing but one key
    assert ((weights.max(-1) > 0.5).mean() > 0.2) and ((weights.max(-1) < 0.5).mean() > 0.2)
    output, maps = jax.jit(functools.partial(in_tiles, MAPS, Tiles(16, 32, kernels)))(*arguments)
    expected_output, expected = jax.jit(functools.partial(whole, MAPS))(*arguments)
    close(output, expected_output)
    for name in MAPS:
        assert maps[name].shape == (1, 2, N, N)
        close(maps[name], expected[name])


@pytest.mark.parametrize("kernels", ["tpu", "gpu"])
def test_small_changes_of_rows_on_one_key_are_exact(kernels):
    """Rows whose other keys hold e^-20 together: subtraction from 1 would leave nothing of it."""
    q, k, v, w, g = layer(tokens=5, batch=(1,))
    k = jnp.zeros_like(k).at[:, 2, :, 0].set(1.0)
    q = jnp.zeros_like(q).at[..., 0].set(20.0)
    _, maps = jax.jit(functools.partial(in_tiles, ("edge",), Tiles(16, 16, kernels)))(q, k, v, w, g)
    values, grads = (np.asarray(x, np.float64)[0] for x in (v, g))
    a = np.exp([0.0, 0, 20, 0, 0])
    a /= a.sum()
    expected = np.zeros((5, 5))
    for j in range(5):
        others = np.where(np.arange(5) == j, 0, a)
        change = np.einsum("j,jhk->hk", others / others.sum() - a, values)
        expected[:, j] = np.abs(np.einsum("ihk,hk->i", grads, change))
    np.testing.assert_allclose(maps["edge"][0], expected, rtol=2e-3)  # v's offset costs digits


@pytest.mark.parametrize("kernels", ["tpu", "gpu"])
def test_maps_of_several_layers_lie_in_one_array(kernels):
    layers = [layer(tokens=20, batch=(2,), largest=largest) for largest in (1.0, 3.0, 6.0)]

    def stacked(layers):
        tiles = Tiles(16, 16, kernels)
        later = [Tiled(q, k, v, w, tiles).later("attention") for q, k, v, w, _ in layers]
        return stack_maps(later)

    found = jax.jit(stacked)(layers)
    for one, arguments in zip(found, layers, strict=True):
        close(one, whole(("attention",), *arguments)[1]["attention"])


def test_halves_add_up():
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    high, low = jax.jit(functools.partial(halves, dtype=jnp.bfloat16))(x)
    assert high.dtype == low.dtype == jnp.bfloat16
    np.testing.assert_allclose(high.astype(jnp.float32) + low.astype(jnp.float32), x, rtol=2.0**-16)


@pytest.mark.slow
def test_derivatives_are_those_of_all_at_once():
    names, arguments = ("edge",), layer(tokens=9, batch=(1,), largest=2.0)

    def loss(function, *arguments):
        output, maps = function(*arguments)
        return jnp.sum(jnp.sin(output)) + sum(jnp.sum(jnp.sin(x)) for x in maps.values())

    def derivatives(function):
        loss_of = functools.partial(loss, function)
        return jax.jit(jax.grad(loss_of, argnums=(0, 1, 2, 4)))(*arguments)

    found = derivatives(functools.partial(in_tiles, names, Tiles(16, 16)))
    for a, b in zip(found, derivatives(functools.partial(whole, names)), strict=True):
        close(a, b)


def test_bfloat16_and_vmap():
    arguments = layer(tokens=20, dtype=jnp.bfloat16)
    function = functools.partial(in_tiles, ("leave_one_out",), Tiles(32, 16))
    output, maps = jax.jit(jax.vmap(function, in_axes=(0, 0, 0, None, 0)))(*arguments)
    assert output.dtype == jnp.bfloat16
    # bf16 inputs as they are, but everything else in float32.
    wide = [x.astype(jnp.float32) for x in arguments]
    expected_output, expected = jax.jit(functools.partial(whole, ("leave_one_out",)))(*wide)
    close(output.astype(jnp.float32), expected_output, 1e-2)
    close(maps["leave_one_out"], expected["leave_one_out"])


def test_no_array_is_as_large_as_the_weights():
    largest = 0

    def visit(jaxpr):
        nonlocal largest
        for equation in jaxpr.eqns:
            sizes = [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
            largest = max([largest, *sizes])
            for value in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    batch, tokens, heads = 1, 640, 6
    shape = jax.ShapeDtypeStruct((batch, tokens, heads, 64), jnp.float32)
    kernel = jax.ShapeDtypeStruct((heads, 64, 384), jnp.float32)
    function = functools.partial(in_tiles, ("leave_one_out",), Tiles())
    visit(jax.make_jaxpr(function)(shape, shape, shape, kernel, shape).jaxpr)
    assert batch * tokens**2 <= largest < batch * heads * tokens**2 / 2


@pytest.mark.parametrize(
    ("tokens", "heads", "dtype", "names"),
    [
        (197, 12, "bfloat16", ("edge", "gradient")),  # ViT-B/16 at 224 pixels
        (257, 6, "float32", ("attention", "dispersion")),  # ViT-S/14 at 224 pixels
        (5330, 6, "float32", ("leave_one_out",)),  # ViT-S/14 at 1,022 pixels
    ],
)
@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "xla.gpu.triton")]
)
def test_kernels_lower_for_accelerators(platform, call, tokens, heads, dtype, names):
    """Runs the compilers' first half, which needs no device, at the sizes of real models."""
    if platform == "cuda":
        pytest.importorskip("jax.experimental.pallas.triton", reason="this jax has no Triton")
    shape = jax.ShapeDtypeStruct((2, tokens, heads, 64), dtype)
    kernel = jax.ShapeDtypeStruct((heads, 64, heads * 64), "float32")
    function = functools.partial(in_tiles, names, Tiles())
    text = lowered(function, platform, shape, shape, shape, kernel, shape)
    plain = platform == "cuda" and not set(names) & set(CUTS) and "gradient" not in names
    for name in ("attend" if plain else "rows", *names):
        assert f"vit_interact_{name}" in text
    assert text.count(f"@{call}") + text.count(f"@__gpu${call}") == 1 + len(names)


def test_what_kernels_cannot_do_is_said():
    q, k, v, w, g = layer(tokens=4, batch=(1,))
    mask = jnp.ones((4, 4), bool)
    with pytest.raises(ValueError, match="no mask"):
        attend_in_tiles((q, k, v, None, mask, w), Tiles())
    with pytest.raises(ValueError, match="no Pallas kernel for 'value_norm'"):
        function = functools.partial(in_tiles, ("value_norm",), Tiles())
        jax.eval_shape(function, q, k, v, w, g)
    with pytest.raises(ValueError, match="powers of two"):
        Tiles(16, 24)
