import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import applied, stacked, tiny
from vit_interact.models.attention import KINDS, Taps
from vit_interact.models.bias import SeparableBias
from vit_interact.models.vit import ViT

FAMILY = {
    "vit": {},
    "gap": {"pool": "gap"},
    "gap_no_cls": {"pool": "gap", "cls_token": False, "pos_prefix": 0, "norm_before_pool": False},
    "map": {"pool": "map", "cls_token": False, "pos_prefix": 0},
    "deit": {"distilled": True, "pos_prefix": 2},
    "dinov2": {"registers": 2, "layer_scale": 0.5, "pool": "cls_gap"},
    "swiglu": {"swiglu": True, "qk_norm": True},
    "clip": {
        "pre_norm": True, "activation": "gelu_quick", "patch_bias": False, "head_bias": False,
        "norm_before_pool": False, "norm_eps": 1e-5,
    },
}  # fmt: skip


def tapped(model, params, images, **options):
    taps = Taps(kinds=KINDS)
    return applied(model.clone(taps=taps), params, images, mutable=["intermediates"], **options)


@pytest.mark.parametrize("member", FAMILY)
def test_fused_equals_explicit(member):
    model, params, images = tiny(**FAMILY[member])
    fused = applied(model, params, images)
    explicit, _ = tapped(model, params, images)
    assert fused.shape == (2, 5)
    assert np.abs(fused).max() > 0.1
    np.testing.assert_allclose(fused, explicit, atol=1e-5)


def test_fused_path_has_no_weights():
    """Without taps no softmax over tokens reaches the outside, and nothing is sown."""
    model, params, images = tiny()
    _, state = applied(model, params, images, mutable=["intermediates"])
    assert "intermediates" not in state or not jax.tree.leaves(state["intermediates"])


@pytest.mark.parametrize(
    "options", [{"scan": True}, {"remat": True}, {"scan": True, "remat": True}]
)
def test_loop_scan_and_remat_sow_the_same(options):
    """jax drops sown values under scan unless the collection is named."""
    model, params, images = tiny(layer_scale=0.5)
    other = ViT(dataclasses.replace(model.config, **options))
    other_params = stacked(params) if options.get("scan") else params
    logits, state = tapped(model, params, images)
    other_logits, other_state = tapped(other, other_params, images)
    np.testing.assert_allclose(logits, other_logits, atol=1e-5)
    for layer in range(3):
        own = state["intermediates"]["Transformer"][f"encoderblock_{layer}"]
        theirs = other_state["intermediates"]["Transformer"]
        if options.get("scan"):
            theirs = jax.tree.map(lambda leaf, at=layer: leaf[at], theirs["encoderblock"])
        else:
            theirs = theirs[f"encoderblock_{layer}"]
        sown = own["MultiHeadDotProductAttention_0"]
        assert len(sown) == len(KINDS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), own, theirs)


def test_taps_choose_layers_and_kinds():
    model, params, images = tiny()
    taps = Taps(kinds=("weights",), layers=(1,))
    _, state = applied(model.clone(taps=taps), params, images, mutable=["intermediates"])
    assert list(state["intermediates"]["Transformer"]) == ["encoderblock_1"]
    sown = state["intermediates"]["Transformer"]["encoderblock_1"]["MultiHeadDotProductAttention_0"]
    assert list(sown) == ["attention_weights"]
    weights = sown["attention_weights"][0]
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="cannot sow"):
        Taps(kinds=("gates",))


def test_bf16_weights_are_float32():
    model, params, images = tiny(dtype="bfloat16")
    _, state = tapped(model, params, images)
    sown = state["intermediates"]["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_0"]
    assert sown["attention_weights"][0].dtype == jnp.float32
    assert sown["attention_values"][0].dtype == jnp.bfloat16


@pytest.mark.parametrize("scan", [False, True])
def test_mask_is_respected_by_both_paths(scan):
    model, params, images = tiny()
    tokens = model.config.layout.num_tokens
    mask = jax.random.bernoulli(jax.random.key(5), 0.5, (2, tokens, tokens))
    mask = mask.at[:, 4].set(False)  # a row that may look at nothing
    masks = [mask, jnp.ones_like(mask), mask]
    if scan:
        model, params = ViT(dataclasses.replace(model.config, scan=True)), stacked(params)
    fused = applied(model, params, images, mask=masks)
    explicit, state = tapped(model, params, images, mask=masks)
    assert np.isfinite(fused).all()
    np.testing.assert_allclose(fused, explicit, atol=1e-5)
    blocks = state["intermediates"]["Transformer"]
    sown = blocks["encoderblock" if scan else "encoderblock_0"]["MultiHeadDotProductAttention_0"]
    weights = sown["attention_weights"][0]
    weights = np.asarray(weights[0] if scan else weights)
    assert (weights[np.broadcast_to(~np.asarray(mask)[:, None], weights.shape)] == 0).all()
    assert (weights[:, :, 4] == 0).all()
    grads = jax.grad(lambda p: applied(model, p, images, mask=masks).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_separable_bias_is_added_to_patch_logits_only():
    model, params, images = tiny()
    layout = model.config.layout
    rows = jax.random.normal(jax.random.key(1), (2, 1, layout.num_patches, layout.rows))
    cols = jax.random.normal(jax.random.key(2), (2, 3, layout.num_patches, layout.cols))
    _, plain = tapped(model, params, images)
    _, biased = tapped(model, params, images, bias=[SeparableBias(rows, cols), None, None])

    def logits(state):
        block = state["intermediates"]["Transformer"]["encoderblock_0"]
        return np.asarray(block["MultiHeadDotProductAttention_0"]["attention_logits"][0])

    added = logits(biased) - logits(plain)
    assert np.abs(added[:, :, 0]).max() == np.abs(added[:, :, :, 0]).max() == 0
    query, row, col = 5, 2, 1
    key = 1 + row * layout.cols + col
    np.testing.assert_allclose(
        added[1, 2, 1 + query, key], rows[1, 0, query, row] + cols[1, 2, query, col], atol=1e-5
    )


def test_dropout_and_stochastic_depth_need_and_obey_keys():
    model, params, images = tiny(dropout=0.3, stochastic_depth=0.5)

    @jax.jit
    def run(key):
        return model.apply({"params": params}, images, train=True, rngs={"dropout": key})

    one, other = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(run(one), run(one))
    assert np.abs(run(one) - run(other)).max() > 1e-3
    calm = applied(model, params, images)
    assert np.isfinite(calm).all()


def test_stochastic_depth_drops_or_rescales_whole_updates():
    model, params, images = tiny(stochastic_depth=0.5, depth=2, batch=64)
    tokens = applied(model, params, images, method=ViT.embed)

    def layer(index, train):
        bound = model.bind({"params": params}, rngs={"dropout": jax.random.key(0)})
        return bound.Transformer(tokens, None, None, train, first=index, last=index + 1)

    # The rate grows from 0 in the first layer to the config's in the last.
    np.testing.assert_allclose(layer(0, True), layer(0, False), atol=1e-6)
    block = model.bind({"params": params}, rngs={"dropout": jax.random.key(0)})
    after, _ = block.Transformer.encoderblock[1](tokens, None, None, 0.5, True)
    untouched = np.isclose(after, tokens, atol=1e-6).all(axis=(1, 2))
    assert 0 < untouched.sum() < 40  # both updates dropped in about a quarter of 64


def _masks(tokens, heads):
    """Of layers and none; the last has whole rows masked."""
    generator = np.random.default_rng(0)
    shapes = ((tokens, tokens), (2, tokens, tokens), (2, heads, tokens, tokens))
    masks = [jnp.asarray(generator.random(shape) < 0.6) for shape in shapes]
    return [None, masks, masks[2].at[:, :, 0].set(False)]


def test_who_reads_which_tokens():
    read = {member: tiny(**FAMILY[member])[0].config.tokens_read for member in FAMILY}
    assert {member: tokens for member, tokens in read.items() if tokens} == {
        "vit": 1, "deit": 2, "swiglu": 1, "clip": 1,
    }  # fmt: skip


@pytest.mark.parametrize("member,remat", [("vit", False), ("vit", True), ("deit", True),
                                          ("swiglu", False), ("clip", False)])  # fmt: skip
def test_a_training_pass_makes_what_is_read_alone(member, remat):
    """Logits and derivatives are those of a pass that makes all tokens of the last block."""
    model, params, images = tiny(**FAMILY[member], remat=remat)
    tokens, heads = model.config.layout.num_tokens, model.config.heads

    @functools.partial(jax.jit, static_argnames="train")
    def run(params, mask, train):
        def loss(params):
            logits = model.apply({"params": params}, images, mask=mask, train=train)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    masks = _masks(tokens, heads)
    for mask in masks if member == "vit" else masks[-1:]:
        found, expected = (run(params, mask, train) for train in (True, False))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_a_training_pass_with_a_bias_makes_what_is_read_alone():
    model, params, images = tiny()
    generator = np.random.default_rng(0)
    layout = model.config.layout
    shapes = [(2, 3, layout.num_patches, side) for side in (layout.rows, layout.cols)]
    bias = SeparableBias(*(jnp.asarray(generator.normal(size=s), jnp.float32) for s in shapes))
    found, expected = (
        jax.jit(functools.partial(model.apply, train=train))({"params": params}, images, bias=bias)
        for train in (True, False)
    )
    assert np.abs(found - applied(model, params, images)).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_last_block_costs_a_training_pass_little():
    flops = {}
    for depth in (2, 3):
        model, params, images = tiny(depth=depth, image_size=(32, 32))

        def loss(params, train, model=model, images=images):
            return jnp.sum(model.apply({"params": params}, images, train=train))

        for train in (True, False):
            lowered = jax.jit(jax.grad(loss), static_argnums=1).lower(params, train)
            flops[depth, train] = lowered.compile().cost_analysis()["flops"]
    block = flops[3, False] - flops[2, False]
    # Keys and values are two of twelve products of a block, and their derivatives.
    for depth in (2, 3):
        assert 0.6 * block < flops[depth, False] - flops[depth, True] < block


def test_captured_intermediates_have_all_tokens():
    model, params, images = tiny()
    _, state = model.apply({"params": params}, images, capture_intermediates=True)
    blocks = state["intermediates"]["Transformer"]
    last, _ = blocks[f"encoderblock_{model.config.depth - 1}"]["__call__"][0]
    assert last.shape[1] == model.config.layout.num_tokens


def test_blocks_can_be_run_in_parts():
    model, params, images = tiny()
    variables = {"params": params}
    tokens = model.apply(variables, images, method=ViT.embed)
    tokens = model.apply(variables, tokens, last=2, method=ViT.run_blocks)
    tokens = model.apply(variables, tokens, first=2, method=ViT.run_blocks)
    logits = model.apply(variables, tokens, method=ViT.classify)
    np.testing.assert_allclose(logits, model.apply(variables, images), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"images": x[:, :8]}, r"this model reads \[B, 12, 16, 3\]"),
        (lambda x: {"images": x, "mask": [None]}, "1 masks or biases for 3 layers"),
    ],
)
def test_wrong_inputs_say_what_was_expected(change, message):
    model, params, images = tiny()
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, **change(images))


def test_cls_position_and_register_positions():
    """Registers stand between class token and patches and get no position."""
    model, params, images = tiny(registers=2)
    zeroed = {**params, "embedding": jax.tree.map(jnp.zeros_like, params["embedding"])}
    tokens = model.apply({"params": zeroed}, images, method=ViT.embed)
    position = params["pos_embedding"][0]
    np.testing.assert_allclose(tokens[0, 0], params["cls"][0, 0] + position[0], atol=1e-6)
    np.testing.assert_allclose(tokens[0, 1:3], params["reg"][0], atol=1e-6)
    np.testing.assert_allclose(tokens[0, 3:], position[1:], atol=1e-6)


def test_positions_are_summed_over_images_with_tokens_in_one_axis():
    """A sum over images of `[B, N, D]` has XLA's GPU compiler transpose every layer's tokens."""
    model, params, images = tiny()
    loss = lambda params: model.apply({"params": params}, images).sum()  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    sums = [e for e in jaxpr.eqns if e.primitive.name == "reduce_sum" and e.params["axes"] == (0,)]
    shapes = [e.invars[0].aval.shape for e in sums]
    patches, width = model.config.layout.num_patches, model.config.width
    assert (len(images), patches * width) in shapes
    assert not [s for s in shapes if len(s) == 3 and s[1] > 1]
