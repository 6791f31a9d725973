"""Small models with random parameters in every tensor, so that nothing is trivially zero."""

import contextlib
import functools

import jax
import jax.numpy as jnp

from vit_interact.models.config import ViTConfig
from vit_interact.models.vit import ViT


@functools.cache
def tiny(seed=0, batch=2, **overrides):
    """A model, its parameters and normalised images."""
    fields = dict(
        image_size=(12, 16),
        patch_size=(4, 4),
        width=24,
        depth=3,
        heads=3,
        mlp_dim=48,
        num_classes=5,
    )
    model = ViT(ViTConfig(**{**fields, **overrides}))
    images = jax.random.normal(jax.random.key(seed + 1), (batch, *model.config.image_size, 3))
    params = jax.jit(model.init)(jax.random.key(seed), images)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 2), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(tree, noisy), images


def stacked(params):
    """Parameters of a loop model as its scanned twin has them."""
    blocks = {k: v for k, v in params["Transformer"].items() if k.startswith("encoderblock_")}
    rest = {k: v for k, v in params["Transformer"].items() if k not in blocks}
    layers = [blocks[f"encoderblock_{i}"] for i in range(len(blocks))]
    block = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {**params, "Transformer": {**rest, "encoderblock": block}}


def lowered(function, platform, *shapes):
    """The program as text, for a platform that is not here; jax from 0.12 asks which GPU."""
    with contextlib.ExitStack() as stack:
        if platform == "cuda" and jax.__version_info__ >= (0, 12):
            from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

            gpu = AbstractDevice("NVIDIA H100", 132, "gpu")
            stack.enter_context(use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)))
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
