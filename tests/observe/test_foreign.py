"""Models that are not ours, whose attention uses `vi.attention_fn`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.helpers import applied
from tests.models.layers import close
from vit_interact import interactions as vx

ALL = tuple(vx.INDICATORS)


class Foreign(nn.Module):
    """Somebody else's ViT: post-norm, its own names, Flax's own attention."""

    attention_fn: object = nn.dot_product_attention
    depth: int = 11

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="patches")(x).reshape(x.shape[0], -1, 16)
        for i in range(self.depth):
            attend = nn.MultiHeadDotProductAttention(
                num_heads=2, attention_fn=self.attention_fn, dropout_rate=0.1,
                deterministic=not train, name=f"layer_{i}",
            )  # fmt: skip
            x = nn.LayerNorm()(x + attend(x))
        return nn.Dense(4)(x.mean(1))


@pytest.fixture(scope="module")
def foreign():
    images = jax.random.normal(jax.random.key(0), (2, 12, 16, 3))
    model = Foreign(attention_fn=vi.attention_fn)
    return model, jax.jit(model.init)(jax.random.key(1), images)["params"], images


def test_attention_fn_changes_neither_parameters_nor_outputs(foreign):
    model, params, images = foreign
    plain = Foreign()
    expected = jax.eval_shape(plain.init, jax.random.key(1), images)
    assert jax.tree.structure(expected) == jax.tree.structure({"params": params})
    logits = applied(plain, params, images)
    np.testing.assert_array_equal(applied(model, params, images), logits)
    tapped, _ = applied(model, params, images, mutable=["intermediates"])
    np.testing.assert_allclose(tapped, logits, atol=1e-5)
    key = {"dropout": jax.random.key(3)}
    ours, theirs = (functools.partial(one.apply, train=True, rngs=key) for one in (model, plain))
    of_both = [jax.jit(run)({"params": params}, images) for run in (ours, theirs)]
    np.testing.assert_array_equal(*of_both)


def test_foreign_model_gives_the_same_captures(foreign):
    """Weights against Flax's own sown ones, in order of depth beyond ten layers."""
    model, params, images = foreign
    captures = vi.capture(model, params, images)
    assert captures.weights.shape == (11, 2, 2, 12, 12)

    class Sowing(Foreign):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (4, 4), strides=(4, 4), name="patches")(x).reshape(2, -1, 16)
            for i in range(self.depth):
                attend = nn.MultiHeadDotProductAttention(num_heads=2, name=f"layer_{i}")
                x = nn.LayerNorm()(x + attend(x, sow_weights=True))
            return nn.Dense(4)(x.mean(1))

    _, state = applied(Sowing(), params, images, mutable=["intermediates"])
    for i in range(11):
        sown = state["intermediates"][f"layer_{i}"]["attention_weights"][0]
        np.testing.assert_allclose(captures.weights[i], sown, atol=1e-6)
        np.testing.assert_array_equal(captures.out_kernel[i], params[f"layer_{i}"]["out"]["kernel"])
    maps = vi.measure(model, params, images, ALL, layers=(0, 10))
    for name in ALL:
        if name != "rollout":
            expected = jax.jit(functools.partial(vx.compute, name))(captures)
            close(maps[name], expected[jnp.array([0, 10])], 1e-4)


def test_foreign_gradient_equals_ours(foreign):
    """d(score)/d(value bias) = sum_ij A_ij g_i, here by Flax's own derivative."""
    model, params, images = foreign
    captures = vi.capture(model, params, images, score=1)
    plain = Foreign()
    grads = jax.grad(lambda p: applied(plain, p, images)[:, 1].sum())(params)
    for i in (0, 5, 10):
        found = jnp.einsum("bhij,bihk->hk", captures.weights[i], captures.output_grad[i])
        close(found, grads[f"layer_{i}"]["value"]["bias"], 1e-4)


def test_apply_function_in_place_of_a_model(foreign):
    model, params, images = foreign
    apply = functools.partial(model.apply, train=False)
    found = vi.measure(apply, params, images, ("attention",))["attention"]
    close(found, vi.measure(model, params, images, ("attention",))["attention"])


def test_a_model_without_attention_fn_is_refused(foreign):
    _, params, images = foreign
    with pytest.raises(ValueError, match=r"attention_fn=vit_interact\.attention_fn"):
        vi.measure(Foreign(), params, images)
    with pytest.raises(ValueError, match="block needs vit_interact's ViT"):
        vi.measure(foreign[0], params, images, block=3)
    with pytest.raises(ValueError, match="inside a linen module"):
        vi.attention_fn(*jnp.ones((3, 1, 4, 2, 8)))


def test_weights_under_dropout_are_refused(foreign):
    model, params, images = foreign
    with pytest.raises(ValueError, match="run the model deterministic"):
        model.apply(
            {"params": params}, images, train=True, mutable=["intermediates"],
            rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "value"), [("keep", np.zeros((2, 2), int)), ("mask", np.ones((4, 4), bool))]
)
def test_keep_and_mask_are_for_our_model(foreign, choice, value):
    model, params, images = foreign[:3]
    with pytest.raises(ValueError, match="keep and mask need vit_interact's ViT"):
        vi.measure(model, params, images, ("attention",), **{choice: value})
