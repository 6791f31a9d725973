"""Sums over maps, as XLA's CPU compiler takes them: in forms that YNNPACK is fast at."""

import re

import jax
import jax.numpy as jnp
import pytest

from tests.models.helpers import bodies_of_ynnpack
from vit_interact import interactions as vx
from vit_interact.layout import TokenLayout

LAYOUT = TokenLayout(24, 24)
LAYERS = 5


def sums_of_ynnpack(function, *shape):
    program = jax.jit(function).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    return bodies_of_ynnpack(program)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU compiler")
def test_fields_have_one_sum_at_a_time_and_no_logarithms_in_it():
    """Else they take five times as long, where a batch has one image (docs/performance.md)."""
    patches = LAYOUT.num_patches
    sums = sums_of_ynnpack(lambda rows: vx.responsive_field(rows, LAYOUT), 5, 1, patches, patches)
    if not sums:
        pytest.skip("this XLA leaves nothing to YNNPACK")
    assert all(body.count(" reduce(") == 1 and " log(" not in body for body in sums)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU compiler")
def test_layers_are_added_one_by_one():
    """A sum over the first axis jumps through memory: forty times as long."""
    tokens = LAYOUT.num_tokens
    combine = lambda maps: vx.combine_layers(maps, LAYOUT)  # noqa: E731
    for body in sums_of_ynnpack(combine, LAYERS, 1, tokens, tokens):
        assert not re.search(r" reduce\([^\n]*dimensions=\{0\}", body), body


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU compiler")
def test_rollout_of_one_image_has_no_axis_of_one():
    tokens = LAYOUT.num_tokens
    assert all(
        f"{LAYERS},1,{tokens}" not in body
        for body in sums_of_ynnpack(vx.rollout, LAYERS, 1, 3, tokens, tokens)
    )
