"""The window-free transformer: no window is preset, every patch predicts its own.

In each layer a zero-initialised Dense reads the normalised block input of a patch and gives four
distances `d = extent · sigmoid(u + b)`. Their soft box is added to the attention logits as a
separable bias (docs/method.md; the paper's own WinfT is not public). At the start every box holds
the whole grid, so a converted ViT gives the ViT's logits.

What a WinfT is compared with has windows, too: given ones, the same for all images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.interactions.boxes import hard_windows, soft_window
from vit_interact.interactions.window_masks import window_mask
from vit_interact.layout import TokenLayout
from vit_interact.models.bias import SeparableBias
from vit_interact.models.config import ViTConfig, WindowConfig
from vit_interact.models.parameter import parameter

if TYPE_CHECKING:
    from vit_interact.models.vit import ViT

DISTANCES = "window_distances"
"""Name under which distances are sown into `intermediates`."""
_NAMES = ("WindowHead_0", "GivenWindows_0")


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
        mask: Bool[Array, "..."] | None,
        bias: SeparableBias | None,
        sharpness: Float[Array, ""] | float | None,
    ) -> tuple[Bool[Array, "..."] | None, SeparableBias | None]:
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
        if config.detach:
            patches = jax.lax.stop_gradient(patches)
        zeros = nn.initializers.zeros
        u = nn.Dense(4 * config.groups, kernel_init=zeros, bias_init=zeros, name="Dense_0")(patches)
        u = jnp.moveaxis(u.reshape(*u.shape[:-1], config.groups, 4), -2, 1)
        # Where u is 0, borders lie `reach` beyond the farthest patch of the grid. 2 τ
        # leaves logits of a 4x5 grid 5e-3 of their largest away from the ViT's, and more on larger
        # grids, where `b = 3` takes a twentieth of the side; at 5 τ it is below 1e-3 everywhere.
        first = np.array([layout.rows, layout.cols] * 2) - 1.5 + config.reach
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


class GivenWindows(nn.Module):
    """Windows that are the same for all images, kept with the weights and never trained.

    Attributes:
      layout: the grid of patches and the prefix tokens.
    """

    layout: TokenLayout

    @nn.compact
    def __call__(self, mask: Bool[Array, "..."] | None) -> Bool[Array, "..."]:
        """Adds the windows to what restricts attention already."""
        layout = self.layout
        whole = np.tile([0, 0, layout.rows, layout.cols], (layout.num_patches, 1))
        start = lambda *_: jnp.asarray(whole, jnp.float32)  # noqa: E731
        windows = parameter(self, "windows", start, whole.shape)
        inside = window_mask(jnp.round(windows).astype(jnp.int32), layout)
        return inside if mask is None else inside & mask


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
      differ from the model's by less than 1e-3 of their largest. Given windows hold the whole grid;
      see `give_windows`.

    Raises:
      ValueError: for layers or groups that the model has not, or one that has windows already.
    """
    if model.config.windows is not None:
        raise ValueError("this model has windows already")
    windows = WindowConfig() if windows is None else windows
    config = dataclasses.replace(model.config, windows=windows)
    outputs = 4 * windows.groups
    shape = (config.depth,) if config.scan else ()
    if windows.kind == "given":
        layout = config.layout
        whole = jnp.asarray([0, 0, layout.rows, layout.cols], jnp.float32)
        given = jnp.broadcast_to(whole, (*shape, layout.num_patches, 4))
        added: dict[str, Any] = {"GivenWindows_0": {"windows": given}}
    else:
        kernel = jnp.zeros((*shape, config.width, outputs))
        bias = jnp.zeros((*shape, outputs))
        added = {"WindowHead_0": {"Dense_0": {"kernel": kernel, "bias": bias}}}
    encoder = dict(params["Transformer"])
    for name in _windowed_blocks(config):
        encoder[name] = {**encoder[name], **added}
    return model.clone(config=config), {**params, "Transformer": encoder}


def without_windows(model: ViT, params: Mapping[str, Any]) -> tuple[ViT, dict[str, Any]]:
    """The same model attending everywhere: the inverse of `to_winft`. Traceable."""
    encoder = {
        name: {key: value for key, value in part.items() if key not in _NAMES}
        if isinstance(part, Mapping)
        else part
        for name, part in params["Transformer"].items()
    }
    config = dataclasses.replace(model.config, windows=None)
    return model.clone(config=config), {**params, "Transformer": encoder}


def give_windows(
    model: ViT, params: Mapping[str, Any], windows: Int[Array, "L P 4"] | Int[np.ndarray, "L P 4"]
) -> dict[str, Any]:
    """Parameters with other given windows. Traceable.

    Args:
      model: with `windows.kind` being `given`.
      params: its parameters.
      windows: (top, left, bottom, right) of each patch, exclusive at the end; `L` are the layers
        that have windows.

    Raises:
      ValueError: for a model without given windows, or windows of another shape.
    """
    config = model.config
    if config.windows is None or config.windows.kind != "given":
        raise ValueError("this model has no given windows; see to_winft")
    layers = sum(config.windows.has(layer) for layer in range(config.depth))
    expected = (layers, config.layout.num_patches, 4)
    if windows.shape != expected:
        raise ValueError(f"windows have shape {windows.shape}; this model has {expected}")
    values = jnp.asarray(windows, jnp.float32)
    encoder = dict(params["Transformer"])
    names = _windowed_blocks(config)
    for name, value in zip(names, [values] if config.scan else values, strict=True):
        encoder[name] = {**encoder[name], "GivenWindows_0": {"windows": value}}
    return {**params, "Transformer": encoder}


def _windowed_blocks(config: ViTConfig) -> list[str]:
    """Names of the blocks with windows; a scanned model has one block."""
    windows = config.windows
    assert windows is not None
    if config.scan:
        return ["encoderblock"]
    return [f"encoderblock_{i}" for i in range(config.depth) if windows.has(i)]


def window_layers(model: ViT) -> tuple[int, ...]:
    """Layers that predict windows; none for a model that does not."""
    config = model.config
    if config.windows is None or config.windows.kind != "predicted":
        return ()
    return tuple(layer for layer in range(config.depth) if config.windows.has(layer))


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
    if not window_layers(model):
        raise ValueError("this model predicts no windows; see to_winft")
    output: Any = model.apply({"params": params}, images, mutable=["intermediates"], **settings)
    logits, sown = output
    encoder = sown["intermediates"]["Transformer"]
    each = [encoder[name]["WindowHead_0"][DISTANCES][0] for name in _windowed_blocks(config)]
    return logits, each[0] if config.scan else jnp.stack(each)
