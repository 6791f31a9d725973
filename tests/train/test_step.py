"""One training step against its parts worked out apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vit_interact as vi
from tests.models.helpers import applied
from tests.train import tiny
from vit_interact.data.augment import Augment
from vit_interact.data.preprocess import Preprocess
from vit_interact.train.state import begin
from vit_interact.train.step import Recipe, Teacher, make_train_step

PLAIN = Augment(crop=None, flip=False)
PREPROCESS = Preprocess(size=(8, 8))


@pytest.fixture(scope="module")
def model():
    return vi.create_model(
        "vit_ti16", num_classes=4, image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp_dim=8
    )


@pytest.fixture(scope="module")
def params(model):
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (8, 4)) * 0.3
    return params


def recipe(model, params, **changes):
    frozen = jax.tree.map(lambda leaf: False, params)
    plain = Recipe(model, optax.sgd(0.1), frozen, PLAIN, False, PREPROCESS, seed=0)
    return dataclasses.replace(plain, **changes)


def batch(count=6, empty=()):
    found = tiny.pictures(count, side=8)
    mask = np.ones(count, bool)
    mask[list(empty)] = False
    return {
        "pictures": found.images,
        "labels": found.labels,
        "mask": mask,
        "sizes": np.full((count, 2), 8, np.int32),
        "indices": np.arange(count, dtype=np.int32),
    }


def run(made, params, given, **more):
    state = begin(params, made.optimizer, made.ema > 0)
    return jax.jit(make_train_step(made))(state, given, **more)


def logits_of(model, params, given):
    images = PREPROCESS.normalize(given["pictures"])
    return np.asarray(applied(model, params, images), np.float64)


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_loss_accuracy_and_smoothing(model, params):
    given = batch()
    logits = logits_of(model, params, given)
    targets = np.eye(4)[given["labels"]] * 0.9 + 0.1 / 4
    expected = -(targets * log_softmax(logits)).sum(axis=-1).mean()
    state, sums = run(recipe(model, params, smoothing=0.1), params, given)
    assert float(sums.loss.total / sums.loss.count) == pytest.approx(expected, rel=1e-5)
    right = (logits.argmax(axis=-1) == given["labels"]).mean()
    assert float(sums.accuracy.total / sums.accuracy.count) == pytest.approx(right)
    assert int(state.step) == 1

    def loss(own):
        images = PREPROCESS.normalize(given["pictures"])
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(applied(model, own, images)), -1))

    gradient = jax.device_get(jax.jit(jax.grad(loss))(params))
    moved = jax.tree.map(
        lambda before, slope: before - 0.1 * slope, jax.device_get(params), gradient
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, moved
    )
    norm = np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(gradient)])
    assert float(sums.grad_norm.total) == pytest.approx(norm, rel=1e-4)


def test_sigmoid_loss(model, params):
    given = batch()
    logits, targets = logits_of(model, params, given), np.eye(4)[given["labels"]]
    p = 1 / (1 + np.exp(-logits))
    expected = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(axis=-1).mean()
    _, sums = run(recipe(model, params, loss="sigmoid"), params, given)
    assert float(sums.loss.total / sums.loss.count) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_empty_places_count_for_nothing(model, params, loss):
    holes, whole = batch(6, empty=(1, 4)), batch(6)
    kept = [0, 2, 3, 5]
    fewer = {name: array[kept] for name, array in whole.items()}
    made = recipe(model, params, loss=loss, smoothing=0.1)
    (one, sums), (other, expected) = run(made, params, holes), run(made, params, fewer)
    assert float(sums.loss.total) == pytest.approx(float(expected.loss.total), rel=1e-5)
    assert float(sums.loss.count) == 4 and float(sums.unread.total) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, other.params)


def test_the_average_of_parameters(model, params):
    made = recipe(model, params, ema=0.9)
    step = jax.jit(make_train_step(made))
    state = begin(params, made.optimizer, True)
    average = params
    for done in range(3):
        state, _ = step(state, batch())
        decay = min(0.9, (1 + done) / (10 + done))
        average = jax.tree.map(
            lambda a, p, decay=decay: decay * a + (1 - decay) * p, average, state.params
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, average)
    assert state.best_params is state.ema


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_learning_from_a_teacher(model, params, kind):
    given = batch()
    theirs = jax.tree.map(lambda leaf: leaf * 1.5, params)
    # A teacher with a normalisation of its own sees the same photographs.
    teaching = Preprocess(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    teacher = Teacher(model, theirs, teaching, kind, weight=0.25, temperature=2.0)
    images = teaching.normalize(given["pictures"])
    taught = np.asarray(applied(model, theirs, images), np.float64)
    logits = logits_of(model, params, given)
    own = -log_softmax(logits)[np.arange(6), given["labels"]]
    if kind == "hard":
        lesson = -log_softmax(logits)[np.arange(6), taught.argmax(axis=-1)]
    else:
        p = np.exp(log_softmax(taught / 2))
        lesson = 4 * (p * (np.log(p) - log_softmax(logits / 2))).sum(axis=-1)
    expected = (0.75 * own + 0.25 * lesson).mean()
    _, sums = run(
        recipe(model, params, teacher=teacher), params, given, teaching={"classes": theirs}
    )
    assert float(sums.loss.total / sums.loss.count) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow  # to the last bit
def test_pictures_on_the_device_are_the_same_pictures(model, params):
    given = batch()
    store = given["pictures"][::-1].copy()
    numbers = {key: value for key, value in given.items() if key != "pictures"}
    numbers["indices"] = numbers["indices"][::-1].copy()
    made = recipe(model, params)
    (one, _), (other, _) = run(made, params, given), run(made, params, numbers, store=store)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_keys_follow_from_seed_and_step(model, params):
    noisy = dataclasses.replace(model.config, dropout=0.5)
    given, found = batch(), []
    for seed in (0, 0, 1):
        _, sums = run(recipe(vi.ViT(noisy), params, seed=seed), params, given)
        found.append(float(sums.loss.total))
    assert found[0] == found[1] != found[2]


def test_sums_begin_anew_after_each_line_of_the_log(model, params):
    made = recipe(model, params, log_every=2)
    step, state, counts = jax.jit(make_train_step(made)), begin(params, made.optimizer, False), []
    for _ in range(4):
        state, sums = step(state, batch())
        counts.append(float(sums.loss.count))
    assert counts == [6, 12, 6, 12]


def test_frozen_parameters_cost_no_gradient(model, params):
    frozen = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: "head" not in jax.tree_util.keystr(keys), params
    )
    flops = []
    for which in (frozen, jax.tree.map(lambda leaf: False, params)):
        made = recipe(model, params, frozen=which)
        state = begin(params, made.optimizer, False)
        compiled = jax.jit(make_train_step(made)).lower(state, batch()).compile()
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[0] < 0.6 * flops[1]
    state, _ = run(recipe(model, params, frozen=frozen), params, batch())
    jax.tree.map(np.testing.assert_array_equal, state.params["embedding"], params["embedding"])
