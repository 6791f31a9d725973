"""What only a GPU can show: cuDNN's attention, and the Pallas kernels as compiled for it.

Run on one by `JAX_PLATFORMS=cuda,cpu python -m pytest tests/models/test_gpu.py`; skipped elsewhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_interact as vi
from tests.models.layers import close
from tests.models.test_tiled import MAPS, in_tiles, layer, whole
from tests.models.windowed import both, boxes, masked
from vit_interact.interactions import smallest_windows, windows
from vit_interact.layout import TokenLayout
from vit_interact.models import gpu
from vit_interact.models.attend import Tiles, explicit_attention
from vit_interact.models.config import ViTConfig
from vit_interact.models.fused import fused_attention
from vit_interact.models.vit import Encoder, ViT
from vit_interact.models.window_attention import window_attention

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 are not rounded to tf32, as they are by default on a GPU."""
    with jax.default_matmul_precision("highest"):
        yield


def heads(tokens, dtype, batch=2, count=6, width=64):
    q, k, v, g = jax.random.normal(jax.random.key(0), (4, batch, tokens, count, width))
    return [x.astype(dtype) for x in (q / width**0.5, k, v, g)]


@pytest.mark.parametrize("tokens", [196, 197, 1370])
def test_cudnn_attends_in_bfloat16(tokens):
    q, k, v, g = heads(tokens, jnp.bfloat16)
    run = jax.jit(lambda q, k, v: both(fused_attention, g, q, k, v))
    assert "cudnn$fmha" in run.lower(q, k, v).compile().as_text()
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    plain = lambda *x: explicit_attention(*x).output  # noqa: E731
    expected, of_expected = both(plain, g.astype(jnp.float32), *wide)
    found, of_found = run(q, k, v)
    close(found.astype(jnp.float32), expected, 0.01)
    for a, b in zip(of_found, of_expected, strict=True):
        close(a.astype(jnp.float32), b, 0.02)


def test_float32_is_not_narrowed():
    q, k, v, _ = heads(197, jnp.float32)
    close(jax.jit(fused_attention)(q, k, v), explicit_attention(q, k, v).output, 1e-5)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("tokens", [37, 197, 530])
def test_kernels_equal_all_at_once(name, tokens):
    arguments = layer(tokens=tokens)
    output, maps = jax.jit(functools.partial(in_tiles, (name,), Tiles()))(*arguments)
    expected_output, expected = jax.jit(functools.partial(whole, (name,)))(*arguments)
    close(output, expected_output)
    close(maps[name], expected[name])


@pytest.mark.parametrize("name", MAPS)
def test_kernels_take_bfloat16_as_it_is(name):
    """Inputs are narrow, but no weight, sum or product is rounded on the way to a map."""
    arguments = layer(tokens=197, dtype=jnp.bfloat16)
    output, maps = jax.jit(functools.partial(in_tiles, (name,), Tiles()))(*arguments)
    wide = [x.astype(jnp.float32) for x in arguments]
    expected_output, expected = jax.jit(functools.partial(whole, (name,)))(*wide)
    close(output.astype(jnp.float32), expected_output, 0.01)
    close(maps[name], expected[name], 1e-4)


@pytest.mark.parametrize("name", ["attention", "leave_one_out"])
def test_layers_of_a_model_lie_in_one_array(name):
    """As far from float32 as XLA's are."""
    wide, narrow = (
        ViT(ViTConfig((64, 64), (8, 8), depth=3, width=128, heads=2, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    params = wide.init(jax.random.key(0), images)["params"]
    expected = np.asarray(vi.measure(wide, params, images, (name,), kernel="xla")[name])

    def error(kernel):
        found = vi.measure(narrow, params, images, (name,), kernel=kernel)[name]
        return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)

    assert error("pallas") < 1.2 * error("xla") < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [TokenLayout(14, 14, 1), TokenLayout(37, 37, 1)])
def test_kernels_of_windows_equal_a_mask(layout, dtype):
    q, k, v, g = heads(layout.num_tokens, dtype)
    windows = jnp.asarray(boxes(layout, 5))
    attend = lambda *x: window_attention(*x, windows, layout, kernel="pallas")  # noqa: E731
    found, of_found = jax.jit(lambda *x: both(attend, g, *x))(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, of_expected = both(
        lambda *x: masked(*x, windows, layout), g.astype(jnp.float32), *wide
    )
    tolerance = 1e-5 if dtype == "float32" else 0.02
    close(found.astype(jnp.float32), expected, tolerance)
    for a, b in zip(of_found, of_expected, strict=True):
        close(a.astype(jnp.float32), b, 2 * tolerance)


def test_training_by_kernels_is_as_far_from_float32_as_without(monkeypatch):
    """LayerNorm's and GELU's kernels, one token more and queries scaled by their kernel."""
    wide, narrow = (
        ViT(ViTConfig((224, 224), (16, 16), depth=2, width=384, heads=6, num_classes=9, dtype=t))
        for t in ("float32", "bfloat16")
    )
    images = jax.random.normal(jax.random.key(1), (8, 224, 224, 3))
    params = wide.init(jax.random.key(0), images)["params"]

    def slopes(model):
        def score(params):
            logits = model.apply({"params": params}, images, train=True)
            return jnp.sum(jnp.sin(logits.astype(jnp.float32)))

        jax.clear_caches()
        program = jax.jit(jax.grad(score)).lower(params).compile()
        found = jnp.concatenate([x.ravel() for x in jax.tree.leaves(program(params))])
        return np.asarray(found), program.as_text()

    expected, _ = slopes(wide)
    found, text = slopes(narrow)
    for name in ("norm", "norm_backward", "gelu", "gelu_backward"):
        assert f"vit_interact_{name}" in text
    monkeypatch.setattr(gpu, "kernels_pay", lambda *_: False)
    monkeypatch.setattr(Encoder, "_wants_even", lambda *_: False)
    without, text = slopes(narrow)
    assert "vit_interact_" not in text
    error, of_without = (np.linalg.norm(x - expected) for x in (found, without))
    assert error < 1.2 * of_without < 0.1 * np.linalg.norm(expected)


def test_windows_are_those_that_a_cpu_finds():
    layout = TokenLayout(14, 14)
    maps = jax.random.uniform(jax.random.key(0), (5, 196, 196)) ** 4
    found = smallest_windows(maps, layout, (0.5, 0.9))
    here = jnp.asarray(np.asarray(maps).reshape(-1, 14, 14, 196))
    cols = jnp.arange(14)
    by_loops = windows._windows_of_maps(here, cols, layout, (0.5, 0.9), 1, 2**22, False)
    by_loops = by_loops.transpose(2, 0, 3, 1, 4).reshape(found.shape)
    np.testing.assert_array_equal(found, by_loops)
