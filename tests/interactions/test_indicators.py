import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from tests.interactions import reference
from vit_interact import TokenLayout
from vit_interact import interactions as vx
from vit_interact.interactions import by_head
from vit_interact.interactions.indicators import edge_of_logits, gradient_of_logits

SINGLE = [name for name in vx.INDICATORS if name != "rollout"]


def make(heads=3, tokens=7, width=4, model=10, sharpness=2.0, seed=0, lead=()):
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(*lead, heads, tokens, tokens))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return {
        "weights": weights / weights.sum(-1, keepdims=True),
        "values": rng.normal(size=(*lead, tokens, heads, width)),
        "output_grad": rng.normal(size=(*lead, tokens, heads, width)),
        "out_kernel": rng.normal(size=(heads, width, model)),
    }


def call(name, tensors, dtype=jnp.float32, **options):
    arguments = (jnp.asarray(tensors[need], dtype) for need in vx.NEEDS[name])
    return vx.INDICATORS[name](*arguments, **options)


def relative(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("name", SINGLE)
def test_equals_numpy_loops(name, sharpness):
    tensors = make(sharpness=sharpness)
    expected = getattr(reference, name)(**tensors)
    # The square root of a quadratic form keeps half of the digits where heads cancel.
    tolerance = 3e-4 if name == "value_norm" else 3e-6
    assert relative(call(name, tensors), expected) < tolerance


def test_edge_signed_equals_numpy_loops():
    tensors = make()
    expected = reference.edge(**tensors, signed=True)
    assert (expected < 0).any()
    assert relative(call("edge", tensors, signed=True), expected) < 3e-6


def test_rollout_equals_numpy_loops():
    weights = np.stack([make(seed=s)["weights"] for s in range(4)])
    assert (
        relative(vx.rollout(jnp.asarray(weights, jnp.float32)), reference.rollout(weights)) < 1e-6
    )


def test_two_tokens_by_hand():
    """A row (3/4, 1/4) of one head with values 0 and 2: cutting key 1 moves the output by −½."""
    weights = jnp.array([[[0.75, 0.25], [0.5, 0.5]]])
    values = jnp.array([[[0.0]], [[2.0]]])
    kernel = jnp.array([[[3.0]]])
    expected = [[0.75 * 2 * 3, 0.5 * 3], [3.0, 3.0]]
    np.testing.assert_allclose(vx.leave_one_out(weights, values, kernel), expected, rtol=1e-6)
    grad = jnp.array([[[1.0]], [[-2.0]]])
    signed = vx.edge(weights, values, grad, signed=True)
    np.testing.assert_allclose(signed, [[1.5, -0.5], [-2.0, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(
        vx.value_norm(weights, values, kernel), [[0, 1.5], [0, 3]], rtol=1e-6
    )


@pytest.mark.parametrize("name", ["leave_one_out", "edge"])
@pytest.mark.parametrize("closeness", [0.35, 0.29, 1e-3, 1e-7])
def test_dominant_weight_does_not_cancel(name, closeness):
    """METHOD's numerics: a row whose largest weight is 1 − 1e-7."""
    tensors = make(heads=2, tokens=6, seed=3)
    rest = np.array([0.0, 0.3, 0.1, 0.2, 0.25, 0.15]) * closeness
    tensors["weights"][0, 2] = rest
    tensors["weights"][0, 2, 0] = 1 - closeness
    expected = getattr(reference, name)(**tensors)
    found = np.asarray(call(name, tensors))
    assert relative(found, expected) < 3e-6
    # Row 2 on its own scale, not only on the scale of the whole matrix.
    assert relative(found[2], expected[2]) < 3e-6


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_edge_and_gradient_from_the_derivative_by_the_logits(lead):
    """Also where one key holds nearly all of a row, and where it holds all."""
    tensors = make(tokens=6, lead=lead)
    weights = tensors["weights"]
    weights[..., 2, :] = np.array([1 - 1e-6, 4e-7, 1e-7, 2e-7, 2e-7, 1e-7])
    weights[..., 3, :] = np.eye(6)[4]
    g = tensors["output_grad"]
    slope = np.einsum("...ihk,...jhk->...hij", g, tensors["values"])
    along = (weights * slope).sum(-1)
    logit_grad = weights * (slope - along[..., None])
    made = [jnp.asarray(array, jnp.float32) for array in (weights, logit_grad, along)]
    assert relative(gradient_of_logits(*made), call("gradient", tensors)) < 1e-6
    found = np.asarray(edge_of_logits(*made[:2]))
    expected = np.asarray(call("edge", tensors))
    assert relative(found, expected) < 3e-6
    assert relative(found[..., 2, :], expected[..., 2, :]) < 3e-6


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_leave_one_out_from_the_output_at_hand(lead):
    """Also where one key holds nearly all of a row; an output of a narrower type is not used."""
    tensors = make(tokens=6, lead=lead, sharpness=8.0)
    weights = tensors["weights"]
    weights[..., 2, :] = np.array([1 - 1e-6, 4e-7, 1e-7, 2e-7, 2e-7, 1e-7])
    weights[..., 3, :] = np.eye(6)[4]
    output = jnp.asarray(
        np.einsum("...hij,...jhk->...ihk", weights, tensors["values"]), jnp.float32
    )
    expected = call("leave_one_out", tensors)
    found = call("leave_one_out", tensors, output=output)
    assert relative(found, expected) < 1e-6
    assert relative(found[..., 2, :], np.asarray(expected)[..., 2, :]) < 3e-6
    narrow = call("leave_one_out", tensors, output=output.astype(jnp.bfloat16))
    np.testing.assert_array_equal(narrow, expected)


@pytest.mark.parametrize("name", ["leave_one_out", "edge"])
def test_only_key_cannot_be_cut(name):
    tensors = make(tokens=5)
    tensors["weights"][:, 1] = np.eye(5)[3]
    found = np.asarray(call(name, tensors))
    assert np.isfinite(found).all()
    assert found[1, 3] == 0


@pytest.mark.parametrize("name", SINGLE)
def test_leading_axes_jit_vmap(name):
    tensors = make(lead=(2, 3))
    arguments = [jnp.asarray(tensors[need], jnp.float32) for need in vx.NEEDS[name]]
    function = vx.INDICATORS[name]
    whole = jax.jit(function)(*arguments)
    assert whole.shape == (2, 3, 7, 7)
    axes = tuple(None if need == "out_kernel" else 0 for need in vx.NEEDS[name])
    mapped = jax.vmap(jax.vmap(function, axes), axes)(*arguments)
    np.testing.assert_allclose(whole, mapped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_heads_can_be_permuted(name):
    tensors = make()
    order = [2, 0, 1]
    permuted = {
        "weights": tensors["weights"][order],
        "values": tensors["values"][:, order],
        "output_grad": tensors["output_grad"][:, order],
        "out_kernel": tensors["out_kernel"][order],
    }
    np.testing.assert_allclose(call(name, tensors), call(name, permuted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_bf16_tensors_stay_within_two_percent(name):
    tensors = make(tokens=20, width=8, model=16, sharpness=6.0)
    arguments = [
        jnp.asarray(tensors[need], jnp.float32 if need == "weights" else jnp.bfloat16)
        for need in vx.NEEDS[name]
    ]
    found = vx.INDICATORS[name](*arguments)
    assert found.dtype == jnp.float32
    assert relative(found, getattr(reference, name)(**tensors)) < 0.02


@pytest.mark.parametrize("name", SINGLE)
def test_gradients_are_finite_at_zero(name):
    """All heads alike, all values zero: every square root is taken at 0."""
    tensors = make()
    tensors["weights"][:] = tensors["weights"][:1]
    tensors["values"][:] = 0
    arguments = [jnp.asarray(tensors[need], jnp.float32) for need in vx.NEEDS[name]]
    numbers = tuple(range(len(arguments)))
    grads = jax.grad(lambda *a: vx.INDICATORS[name](*a).sum(), numbers)(*arguments)
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)


@pytest.mark.parametrize("name", ["leave_one_out", "edge"])
def test_gradients_where_one_key_holds_nearly_all(name):
    """All other keys together hold about 1e-25: no division by the square of it."""
    tensors = make(tokens=6)
    logits = np.log(tensors["weights"])
    logits[..., 2] += 60

    def total(logits, *others):
        return vx.INDICATORS[name](jax.nn.softmax(logits), *others).sum()

    def slope(dtype):
        others = [jnp.asarray(tensors[need], dtype) for need in vx.NEEDS[name][1:]]
        return jax.grad(total)(jnp.asarray(logits, dtype), *others)

    with jax.enable_x64(True):
        expected = np.asarray(slope(jnp.float64))
    assert relative(np.asarray(slope(jnp.float32)), expected) < 1e-4


@pytest.mark.parametrize("name", SINGLE)
def test_gradient_matches_finite_differences(name):
    tensors = make(tokens=4)
    with jax.enable_x64(True):
        arguments = [jnp.asarray(tensors[need]) for need in vx.NEEDS[name]]
        check_grads(
            lambda w: vx.INDICATORS[name](w, *arguments[1:]),
            (arguments[0],), order=1, modes=["rev"], rtol=1e-4, atol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_sharded_equals_unsharded(name):
    tensors = make(lead=(8,))
    arguments = [jnp.asarray(tensors[need], jnp.float32) for need in vx.NEEDS[name]]
    expected = vx.INDICATORS[name](*arguments)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = tuple(
        PartitionSpec() if need == "out_kernel" else PartitionSpec("data")
        for need in vx.NEEDS[name]
    )
    placed = [
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arguments, specs, strict=True)
    ]
    found = jax.jit(vx.INDICATORS[name])(*placed)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    mapped = jax.shard_map(
        vx.INDICATORS[name], mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data")
    )(*placed)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)


def test_rollout_in_shard_map():
    weights = jnp.asarray(make(lead=(2, 8))["weights"], jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "data")
    found = jax.shard_map(vx.rollout, mesh=mesh, in_specs=spec, out_specs=spec)(weights)
    np.testing.assert_allclose(found, vx.rollout(weights), rtol=1e-5)


@pytest.mark.parametrize("name", ["gradient", "edge"])
def test_heads_one_by_one_equal_all_together(name):
    """A whole layer is too large to work on all heads together, a few of its rows are not."""
    tensors = make(heads=8, tokens=200, width=4, model=8)
    weights, values, grads = (jnp.asarray(tensors[n], jnp.float32) for n in vx.NEEDS[name])
    some = slice(60, 90)
    assert weights[:, some].size <= by_head._AT_ONCE < weights.size
    whole = vx.INDICATORS[name](weights, values, grads)
    part = vx.INDICATORS[name](weights[:, some], values, grads[some])
    assert relative(whole[some], part) < 1e-6


@pytest.mark.parametrize("name", ["leave_one_out", "edge"])
def test_no_tensor_with_two_tokens_and_a_width(name):
    """What exists at a time grows with N², not with N²·K; nor with H·N², but for small inputs."""
    tensors = make(heads=8, tokens=256, width=32, model=256)
    arguments = [jnp.asarray(tensors[need], jnp.float32) for need in vx.NEEDS[name]]
    compiled = jax.jit(vx.INDICATORS[name]).lower(*arguments).compile()
    square = 256 * 256 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 7 * square


def test_value_norm_makes_no_values_in_the_residual_stream():
    """What exists at a time is of one head: neither `[N, H, D]` nor products of pairs of heads."""
    tensors = make(heads=8, tokens=256, width=32, model=512)
    arguments = [jnp.asarray(tensors[need], jnp.float32) for need in vx.NEEDS["value_norm"]]
    compiled = jax.jit(vx.value_norm).lower(*arguments).compile()
    in_the_stream = 256 * 8 * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * in_the_stream


def test_patch_view_and_combine_layers():
    layout = TokenLayout(rows=1, cols=2, prefix=1)
    indicator = jnp.array(
        [
            [[9.0, 9, 9], [9, 1, 3], [9, 0, 0]],  # patch mean 1
            [[9.0, 9, 9], [9, 0, 0], [9, 0, 0]],  # left out: zeros between patches
            [[5.0, 5, 5], [5, 10, 10], [5, 10, 10]],  # patch mean 10
        ]
    )
    view = vx.patch_view(indicator, layout)
    np.testing.assert_allclose(view[0], [[0.25, 0.75], [0, 0]])
    np.testing.assert_allclose(vx.patch_view(indicator, layout, rows=False)[0], [[1, 3], [0, 0]])
    combined = vx.combine_layers(indicator, layout)
    np.testing.assert_allclose(combined[1:, 1:], [[1, 2], [0.5, 0.5]])
    np.testing.assert_allclose(combined[0, 0], (9 + 0.5) / 2)
    with pytest.raises(ValueError, match="has 3 tokens"):
        vx.patch_view(indicator[:, :2, :2], layout)


def test_compute_names_what_is_missing():
    weights = jnp.asarray(make(lead=(2, 1))["weights"], jnp.float32)
    captures = vx.Captures(weights=weights)
    np.testing.assert_allclose(vx.compute("attention", captures), weights.mean(2), rtol=1e-6)
    with pytest.raises(
        ValueError, match="edge needs weights, values, output_grad; captures has no"
    ):
        vx.compute("edge", captures)
    with pytest.raises(ValueError, match="unknown indicator 'saliency'; known: attention"):
        vx.compute("saliency", captures)


def test_attention_and_dispersion_by_hand():
    weights = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # 2 heads, 1 query, 2 keys
    square = jnp.concatenate([weights, weights], axis=1)
    np.testing.assert_allclose(vx.attention(square)[0], [0.5, 0.5])
    np.testing.assert_allclose(vx.dispersion(square)[0], [0.5, 0.5])


def test_same_shapes_compile_once():
    traced = []

    @functools.partial(jax.jit, static_argnames="name")
    def run(name, *arguments):
        traced.append(name)
        return vx.INDICATORS[name](*arguments)

    for seed in range(3):
        tensors = make(seed=seed)
        run("edge", *(jnp.asarray(tensors[need], jnp.float32) for need in vx.NEEDS["edge"]))
    assert traced == ["edge"]
