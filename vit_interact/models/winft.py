"""The window-free transformer: no window is preset, every patch predicts its own.

In each layer a zero-initialised Dense reads the normalised block input of a patch and gives four
distances `d = extent · sigmoid(u + b)`. Their soft box is added to the attention logits as a
separable bias (METHOD section 5; the paper's own WinfT is not public). At the start every box holds
the whole grid, so a converted ViT gives the ViT's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vit_interact.interactions.boxes import hard_windows, soft_window
from vit_interact.interactions.windows import window_mask
from vit_interact.layout import TokenLayout
from vit_interact.models.attention import SeparableBias
from vit_interact.models.config import WindowConfig

if TYPE_CHECKING:
    from vit_interact.models.vit import ViT

REACH = 5.0
"""How far beyond the grid windows reach before training, in `τ`.

METHOD's margin of 2 τ leaves logits of a 4x5 grid 5e-3 of their largest away from the ViT's, and
more on larger grids, where `b = 3` takes a twentieth of the side. At 5 it is below 1e-3 everywhere.
"""
DISTANCES = "window_distances"
"""Name under which distances are sown into `intermediates`."""


class WindowHead(nn.Module):
    """Predicts each patch's window from its normalised block input.

    Attributes:
      config: how.
      layout: the grid of patches and the prefix tokens.
      heads: of the attention that follows.
    """

    config: WindowConfig
    layout: TokenLayout
    heads: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        mask: Bool[Array, ...] | None,
        bias: SeparableBias | None,
        sharpness: Float[Array, ""] | float | None,
    ) -> tuple[Bool[Array, ...] | None, SeparableBias | None]:
        """Adds the windows to what restricts attention already.

        Args:
          x: normalised tokens `[B, N, D]`.
          mask: True = attend; see `MultiHeadDotProductAttention`.
          bias: of the logits.
          sharpness: `τ`; None is the config's.

        Returns:
          The mask and the bias, one of them changed.
        """
        config, layout = self.config, self.layout
        patches = x[:, layout.prefix :].astype(jnp.float32)
        zeros = nn.initializers.zeros
        u = nn.Dense(4 * config.groups, kernel_init=zeros, bias_init=zeros, name="Dense_0")(patches)
        u = jnp.moveaxis(u.reshape(*u.shape[:-1], config.groups, 4), -2, 1)
        # Where u is 0, borders lie REACH τ beyond the farthest patch of the grid.
        first = np.array([layout.rows, layout.cols] * 2) - 1.5 + REACH * config.sharpness
        extent = first * (1 + np.exp(-config.start))
        distances = jnp.asarray(extent, jnp.float32) * jax.nn.sigmoid(u + config.start)
        if not self.is_initializing():
            self.sow("intermediates", DISTANCES, distances)
        if config.hard:
            inside = window_mask(hard_windows(distances, layout), layout)
            inside = self._by_head(inside)
            return inside if mask is None else inside & _four(mask), bias
        tau = config.sharpness if sharpness is None else sharpness
        soft = soft_window(distances, layout, tau)
        rows, cols = self._by_head(soft.rows), self._by_head(soft.cols)
        if bias is not None:
            rows, cols = rows + bias.rows, cols + bias.cols
        return mask, SeparableBias(rows, cols)

    def _by_head(self, values: Array) -> Array:
        """Values of groups `[B, G, ...]` for each head; one group broadcasts by itself."""
        groups = self.config.groups
        return values if groups == 1 else jnp.repeat(values, self.heads // groups, axis=1)


def _four(mask: Array) -> Array:
    return mask if mask.ndim == 4 else jnp.expand_dims(mask, -3)


def to_winft(
    model: ViT, params: Mapping[str, Any], windows: WindowConfig | None = None
) -> tuple[ViT, dict[str, Any]]:
    """Turns any loaded model into a window-free transformer that gives the same logits.

    Args:
      model: a ViT, DeiT, DINOv2 or CLIP tower.
      params: its parameters.
      windows: how windows are predicted; None for one window a patch in all layers.

    Returns:
      The model and its parameters, those of the window heads being zero. Before training, logits
      differ from the model's by less than 1e-3 of their largest.

    Raises:
      ValueError: for layers or groups that the model has not.
    """
    windows = WindowConfig() if windows is None else windows
    config = dataclasses.replace(model.config, windows=windows)
    outputs = 4 * windows.groups
    shape = (config.depth,) if config.scan else ()
    encoder = dict(params["Transformer"])
    names = ["encoderblock"] if config.scan else [
        f"encoderblock_{i}" for i in range(config.depth) if windows.has(i)
    ]  # fmt: skip
    for name in names:
        dense = {
            "kernel": jnp.zeros((*shape, config.width, outputs)),
            "bias": jnp.zeros((*shape, outputs)),
        }
        encoder[name] = {**encoder[name], "WindowHead_0": {"Dense_0": dense}}
    return model.clone(config=config), {**params, "Transformer": encoder}


def predicted_distances(
    model: ViT, params: Mapping[str, Any], images: Float[Array, "B h w 3"], **settings: Any
) -> tuple[Float[Array, "B classes"], Float[Array, "L B G P 4"]]:
    """Logits, and the distances that every layer predicts.

    Args:
      model: a window-free transformer.
      params: its parameters.
      images: normalised.
      **settings: of `model.apply`, such as `train`, `rngs` or `sharpness`.

    Returns:
      Logits `[B, classes]` and (top, left, bottom, right) in patches, `[L, B, G, P, 4]`, `L` being
      the layers that predict windows.

    Raises:
      ValueError: for a plain ViT.
    """
    config = model.config
    if config.windows is None:
        raise ValueError("this model predicts no windows; see to_winft")
    output: Any = model.apply({"params": params}, images, mutable=["intermediates"], **settings)
    logits, sown = output
    encoder = sown["intermediates"]["Transformer"]
    if config.scan:
        return logits, encoder["encoderblock"]["WindowHead_0"][DISTANCES][0]
    layers = [i for i in range(config.depth) if config.windows.has(i)]
    each = [encoder[f"encoderblock_{i}"]["WindowHead_0"][DISTANCES][0] for i in layers]
    return logits, jnp.stack(each)
