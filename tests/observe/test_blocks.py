"""`vi.measure` in blocks of queries, and straight to fields, against whole layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import stacked, tiny
from tests.models.layers import close
from vit_interact import interactions as vx
from vit_interact.models.config import WindowConfig
from vit_interact.models.vit import ViT
from vit_interact.models.winft import to_winft

NAMES = ("leave_one_out", "edge", "rollout")  # forward, backward, and through the layers


@pytest.mark.parametrize("options", [{}, {"scan": True, "remat": True}])
def test_blocks_measure_the_same(options):
    model, params, images = tiny(layer_scale=0.5)
    expected = vi.measure(model, params, images, NAMES)
    if options:
        model = ViT(dataclasses.replace(model.config, **options))
        params = stacked(params)
    found = vi.measure(model, params, images, NAMES, block=5)
    for name in NAMES:
        close(found[name], expected[name])


@pytest.mark.slow
def test_blocks_serve_kept_patches_and_predicted_windows():
    model, params, images = tiny()
    keep = np.array([[0, 3, 7], [1, 2, 11]], np.int32)
    whole = vi.measure(model, params, images, ("leave_one_out",), keep=keep)["leave_one_out"]
    found = vi.measure(model, params, images, ("leave_one_out",), keep=keep, block=3)
    close(found["leave_one_out"], whole)
    model, params = to_winft(model, params, WindowConfig(sharpness=0.5, reach=0.5, start=0.0))
    names = ("attention", "edge")
    whole = vi.measure(model, params, images, names)
    for name, maps in vi.measure(model, params, images, names, block=4).items():
        close(maps, whole[name])


def test_fields_are_those_of_the_maps():
    model, params, images = tiny(layer_scale=0.5)
    layout = model.config.layout
    coverages = (0.5, 0.9)
    fields = vi.measure(
        model, params, images, NAMES, layers=(1,), block=4, reduce="fields", coverage=coverages
    )
    maps = vi.measure(model, params, images, NAMES, layers=(1,))
    for name in NAMES:
        expected = vx.fields_of_map(maps[name], layout, coverages)
        assert fields[name].windows.shape == (2, 1, 2, 12, 4)
        assert fields[name].windows.dtype == jnp.int32
        # Rounding may turn a tie; it does not in these maps.
        np.testing.assert_array_equal(fields[name].windows, expected.windows)
        close(fields[name].received_impact, expected.received_impact)
        for what, value in fields[name].field._asdict().items():
            # Angles and eccentricities of nearly round fields magnify rounding.
            close(value, getattr(expected.field, what), 1e-3)


def test_one_coverage_has_no_axis_and_options_are_checked():
    model, params, images = tiny()
    fields = vi.measure(
        model, params, images, ("attention",), layers=(0,), reduce="fields", coverage=0.7
    )
    assert fields["attention"].windows.shape == (1, 2, 12, 4)
    assert fields["attention"].field.tendency.shape == (1, 2, 12, 2)
    with pytest.raises(ValueError, match="expected None or 'fields'"):
        vi.measure(model, params, images, reduce="windows")
    with pytest.raises(ValueError, match="all patches"):
        keep = np.array([[0, 1], [2, 3]], np.int32)
        vi.measure(model, params, images, reduce="fields", keep=keep)


def _count(jaxpr, name):
    """How often a program has a primitive, loops counted as one pass."""
    leaf = lambda one: hasattr(one, "eqns") or hasattr(one, "jaxpr")  # noqa: E731
    parts = jax.tree.leaves([equation.params for equation in jaxpr.eqns], is_leaf=leaf)
    inner = [getattr(part, "jaxpr", part) for part in parts if leaf(part)]
    found = sum(equation.primitive.name == name for equation in jaxpr.eqns)
    return found + sum(_count(one, name) for one in inner)


@pytest.mark.parametrize(("block", "softmaxes"), [(None, 2), (5, 2)])
def test_indicators_share_the_backward_pass_of_their_layer(block, softmaxes):
    """One softmax forward and one backward in each layer, whatever is measured.

    With blocks the program has two forward, of which one runs: a CPU's, and other devices'. One
    more exponential is of the derivative of GELU.
    """
    model, params, images = tiny()
    names = ("edge", "gradient")
    run = jax.make_jaxpr(lambda p, x: vi.measure(model, p, x, names, block=block))
    assert _count(run(params, images).jaxpr, "exp") == (softmaxes + 1) * model.config.depth


@pytest.mark.slow
def test_second_derivatives_of_blocks():
    """A loss on an indicator of gradients reaches the parameters as without blocks."""
    model, params, images = tiny()

    def loss(params, block):
        return vi.measure(model, params, images, ("edge",), block=block)["edge"].sum()

    expected = jax.tree.leaves(jax.jit(jax.grad(loss), static_argnums=1)(params, None))
    found = jax.tree.leaves(jax.jit(jax.grad(loss), static_argnums=1)(params, 5))
    scale = max(np.abs(leaf).max() for leaf in expected)
    assert scale > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize(
    ("name", "maps"), [("leave_one_out", 4), pytest.param("edge", 6, marks=pytest.mark.slow)]
)
def test_memory_at_1024_patches(name, maps, monkeypatch):
    """Two layers of 6 heads: blocks take a few maps `[N, N]`, less than one layer's weights."""
    model, _, _ = tiny()
    sizes = dict(image_size=(128, 128), depth=2, heads=6, width=96)
    model = ViT(dataclasses.replace(model.config, **sizes))
    images = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    one_map = 4 * model.config.layout.num_tokens**2

    def lowered(**options):
        run = jax.jit(lambda p, x: vi.measure(model, p, x, (name,), **options))
        return run.lower(params, images)

    def temporary(**options):
        return lowered(**options).compile().memory_analysis().temp_size_in_bytes

    blocks = temporary(block=32)
    assert blocks < maps * one_map
    # XLA's fused attention does not count its weights: nowhere does the program have them.
    assert "6x1025x1025x" not in lowered(block=32).as_text()
    # All queries take one head at a time, too; all heads at once is what they are held against.
    assert "6x1025x1025x" not in lowered(block=2000).as_text()
    with monkeypatch.context() as patch:
        patch.setattr("vit_interact.observe.ways.TERMS", {})
        assert 2 * blocks < temporary(block=2000)
    if name == "leave_one_out":
        # The search for windows of a grid of 32x32 takes most of it.
        assert temporary(block=32, reduce="fields") < maps * one_map


def test_memory_does_not_grow_with_layers():
    """Maps are outputs; a layer's own memory is free before the next one's."""

    def temporary(depth):
        model = ViT(dataclasses.replace(tiny()[0].config, image_size=(128, 128), depth=depth))
        images = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        run = jax.jit(lambda p, x: vi.measure(model, p, x, ("attention",), block=128))
        return run.lower(params, images).compile().memory_analysis().temp_size_in_bytes

    assert temporary(6) - temporary(2) < 2 * 2**20  # a map, 4 MiB, for each layer was 16


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"scan": True, "remat": True, "depth": 2}, marks=pytest.mark.slow)],
)
def test_pallas_kernels_measure_the_same(options):
    model, params, images = tiny(layer_scale=0.5, depth=options.get("depth", 1))
    names = NAMES if options else ("leave_one_out", "edge")
    expected = vi.measure(model, params, images, names)
    if options:
        model = ViT(dataclasses.replace(model.config, **options))
        params = stacked(params)
    found = vi.measure(model, params, images, names, kernel="pallas")
    for name in names:
        assert found[name].shape == expected[name].shape
        close(found[name], expected[name])


def test_where_pallas_kernels_do_not_serve():
    model, params, images = tiny(layer_scale=0.5, depth=1)
    for options, message in [
        ({"kernel": "triton"}, "expected None, 'xla' or 'pallas'"),
        ({"kernel": "pallas", "block": 4}, "neither mask nor block"),
        ({"kernel": "pallas", "reduce": "fields"}, "no kernel"),
        ({"kernel": "pallas", "indicators": ("value_norm",)}, "no Pallas kernel"),
    ]:
        with pytest.raises(ValueError, match=message):
            vi.measure(model, params, images, **options)
