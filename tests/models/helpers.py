"""Small models with random parameters in every tensor, so that nothing is trivially zero."""

import contextlib
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from vit_interact.models.config import ViTConfig
from vit_interact.models.vit import ViT

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def golden(name):
    """Arrays of a golden file by name; the file itself is closed again, come what may."""
    path = GOLDENS / name
    with np.load(path / "expected.npz" if path.is_dir() else path) as arrays:
        return dict(arrays)


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
    shapes = jax.eval_shape(model.init, jax.random.key(seed), images)["params"]
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        # Without `model.init`, whose program would take longer to compile than most tests run.
        start = 1.0 if path[-1].key == "scale" else 0.0
        spread = math.hypot(0.2, 0 if leaf.ndim < 2 else leaf.shape[-1] ** -0.5)
        return jnp.asarray(start + spread * generator.normal(size=leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes), images


def applied(model, params, images, method=None, mutable=False, **arrays):
    """`model.apply` as one program; op by op, each operation of a new shape is one of its own."""

    def forward(params, images, arrays):
        return model.apply({"params": params}, images, method=method, mutable=mutable, **arrays)

    return jax.jit(forward)(params, images, arrays)


def stacked(params):
    """Parameters of a loop model as its scanned twin has them."""
    blocks = {k: v for k, v in params["Transformer"].items() if k.startswith("encoderblock_")}
    rest = {k: v for k, v in params["Transformer"].items() if k not in blocks}
    layers = [blocks[f"encoderblock_{i}"] for i in range(len(blocks))]
    block = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {**params, "Transformer": {**rest, "encoderblock": block}}


def lowered(function, platform, *shapes):
    """The program as text, for a platform that is not here; jax from 0.11 on asks which GPU."""
    with contextlib.ExitStack() as stack:
        if platform == "cuda" and jax.__version_info__ >= (0, 11):
            from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

            gpu = AbstractDevice("NVIDIA H100", 132, "gpu")
            stack.enter_context(use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)))
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def bodies_of_ynnpack(program):
    """The computations that a program compiled for the CPU leaves to YNNPACK, as text."""
    text = program.as_text()
    bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    called = re.findall(r"^ *(?:ROOT )?%?ynn_fusion\S* = [^\n]*calls=%?([\w.\-]+)", text, re.M)
    return [bodies[name] for name in called]
