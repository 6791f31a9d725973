"""One Vision Transformer for the whole family; `ViTConfig` says which member.

Parameters carry big_vision's names: `embedding`, `cls`, `pos_embedding`,
`Transformer/encoderblock_0/{LayerNorm_0, MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0}`,
`Transformer/encoder_norm`, `MAPHead_0`, `head`; with `scan=True` the blocks are one stacked
`Transformer/encoderblock`. What big_vision lacks is named in the same spirit: `reg`, `dist`, `ls1`,
`ls2`, `pre_norm`, `pool_norm`, `head_dist`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_interact.models import fused
from vit_interact.models.attention import SINKS, MultiHeadDotProductAttention, Taps
from vit_interact.models.bias import SeparableBias
from vit_interact.models.config import ViTConfig
from vit_interact.models.cpu import computed_once
from vit_interact.models.dense import Dense, PatchEmbedding
from vit_interact.models.elementwise import ACTIVATION_FUNCTIONS, LayerNorm
from vit_interact.models.fused import FirstTokens
from vit_interact.models.parameter import parameter
from vit_interact.models.winft import GivenWindows, WindowHead

Images = Float[Array, "B h w 3"] | Float[np.ndarray, "B h w 3"]
Keep = Int[Array, "B K"] | Int[np.ndarray, "B K"] | None
LayerMask = Bool[Array, "..."] | Bool[np.ndarray, "..."] | Sequence[Any] | None
LayerBias = SeparableBias | Sequence[SeparableBias | None] | None


def _layer_norm(config: ViTConfig, name: str | None = None) -> LayerNorm:
    return LayerNorm(config.norm_eps, dtype=config.dtype, name=name)


class MlpBlock(nn.Module):
    """Two dense layers with GELU, or SwiGLU when the config says so."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], train: bool = False) -> Float[Array, "B N D"]:
        """Applies the MLP to every token."""
        config, width = self.config, x.shape[-1]
        hidden = config.mlp_dim * (2 if config.swiglu else 1)
        activation = None if config.swiglu else config.activation
        x = Dense(hidden, dtype=config.dtype, activation=activation, name="Dense_0")(x)
        if config.swiglu:
            gate, x = jnp.split(x, 2, axis=-1)
            x = ACTIVATION_FUNCTIONS["silu"](gate) * x
        x = nn.Dropout(config.dropout)(x, deterministic=not train)
        return Dense(width, dtype=config.dtype, name="Dense_1")(x)


class Block(nn.Module):
    """One pre-norm transformer block; its return pair is what `nn.scan` wants."""

    config: ViTConfig
    taps: Taps | None = None
    windowed: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        mask: Bool[Array, "..."] | FirstTokens | None,
        bias: SeparableBias | None,
        drop_path: Float[Array, ""] | float,
        train: bool,
        sharpness: Float[Array, ""] | float | None = None,
        first_tokens: int | None = None,
    ) -> tuple[Float[Array, "B M D"], None]:
        """Applies the block.

        Args:
          x: tokens `[B, N, D]`.
          mask: True = attend; see `MultiHeadDotProductAttention`.
          bias: separable bias of this layer.
          drop_path: stochastic-depth rate of this layer.
          train: whether dropout and stochastic depth are active.
          sharpness: of predicted windows.
          first_tokens: how many of the tokens are wanted; None is all.
        """
        config = self.config
        scales: list[Array | None] = [None, None]
        if config.layer_scale is not None:
            init = nn.initializers.constant(config.layer_scale)
            scales = [parameter(self, name, init, (config.width,)) for name in ("ls1", "ls2")]

        def residual(x: Array, update: Array, scale: Array | None) -> Array:
            if scale is not None:
                update = update * scale.astype(update.dtype)
            update = nn.Dropout(config.dropout)(update, deterministic=not train)
            if train and config.stochastic_depth > 0:
                keep = 1.0 - jnp.asarray(drop_path, update.dtype)
                kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1))
                update = jnp.where(kept, update / keep, 0)
            return computed_once(x + update)

        attention = MultiHeadDotProductAttention(
            config.heads,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            taps=self.taps,
            dtype=config.dtype,
            name="MultiHeadDotProductAttention_0",
        )
        y, x = _layer_norm(config, "LayerNorm_0")(x, keep=True)
        if self.windowed:
            assert config.windows is not None and not isinstance(mask, FirstTokens)
            if config.windows.kind == "given":
                mask = GivenWindows(config.layout, name="GivenWindows_0")(mask)
            else:
                head = WindowHead(config.windows, config.layout, config.heads, name="WindowHead_0")
                mask, bias = head(y, mask, bias, sharpness)
        update = attention(y, y, mask, bias, scales[0], first_tokens)
        x = residual(x[:, :first_tokens], update, scales[0])
        y, x = _layer_norm(config, "LayerNorm_1")(x, keep=True)
        x = residual(x, MlpBlock(config, name="MlpBlock_0")(y, train), scales[1])
        return x, None


class Encoder(nn.Module):
    """The stack of blocks, as a loop or as one scanned block, and the final LayerNorm."""

    config: ViTConfig
    taps: Taps | None = None

    def setup(self) -> None:
        """Makes the blocks."""
        config = self.config
        block: Any = Block
        if config.remat:
            # Static are `train` and `first_tokens` (0 is the module).
            block = nn.remat(Block, prevent_cse=not config.scan, static_argnums=(5, 7))
        if config.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0, SINKS: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=config.depth,
            )
            self.encoderblock: Any = scanned(config, self.taps, config.windows is not None)
        else:
            self.encoderblock = [
                block(
                    config,
                    self.taps if self._tapped(i) else None,
                    config.windows is not None and config.windows.has(i),
                )
                for i in range(config.depth)
            ]
        if config.norm_before_pool:
            self.encoder_norm = _layer_norm(config)

    def _wants_even(self, tokens: int) -> bool:
        """Whether layers are attended to by cuDNN, whose derivative wants an even number."""
        config = self.config
        plain = self.taps is None and config.windows is None and not self.is_initializing()
        return (
            plain
            and tokens % 2 == 1
            and fused.cudnn_knows(jnp.dtype(config.dtype), config.head_dim)
        )

    def _tapped(self, layer: int) -> bool:
        return self.taps is not None and (self.taps.layers is None or layer in self.taps.layers)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        mask: LayerMask = None,
        bias: LayerBias = None,
        train: bool = False,
        first: int = 0,
        last: int | None = None,
        sharpness: Float[Array, ""] | float | None = None,
        first_tokens: int | None = None,
    ) -> Float[Array, "B M D"]:
        """Runs blocks `first` to `last - 1`; the final norm follows only the very last block.

        With `first_tokens` it may give so many tokens alone: the last block makes no others, of
        which a loop over equal blocks (`scan`) knows nothing.
        """
        config, tokens = self.config, x.shape[1]
        whole: Any = mask
        last = config.depth if last is None else last
        if train and mask is None and bias is None and self._wants_even(tokens):
            # One more, which nobody attends to; in each layer, cuDNN would copy all to add it.
            x, whole = jnp.pad(x, ((0, 0), (0, 1), (0, 0))), FirstTokens(tokens)
        masks, biases = _per_layer(whole, config.depth), _per_layer(bias, config.depth)
        rates = [
            config.stochastic_depth * i / max(1, config.depth - 1) for i in range(config.depth)
        ]
        if config.scan:
            if (first, last) != (0, config.depth):
                raise ValueError("a scanned model runs all of its layers; unstack it first")
            stacked = (_stack(masks, "mask"), _stack(biases, "bias"), jnp.asarray(rates))
            x, _ = self.encoderblock(x, *stacked, train, sharpness, None)
        else:
            for i in range(first, last):
                wanted = first_tokens if i == config.depth - 1 else None
                given = (masks[i], biases[i], rates[i], train, sharpness, wanted)
                x, _ = self.encoderblock[i](x, *given)
        x = x[:, :tokens]
        return self.encoder_norm(x) if config.norm_before_pool and last == config.depth else x


def _per_layer(value: Any, depth: int) -> list[Any]:
    """One mask or bias for all layers, or a list or tuple with an entry for each."""
    if not isinstance(value, list | tuple):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"{len(value)} masks or biases for {depth} layers; give one or {depth}")
    return list(value)


def _stack(values: list[Any], what: str) -> Any:
    """Per-layer values with a leading layer axis, or None when no layer has one."""
    missing = [value is None for value in values]
    if all(missing):
        return None
    if any(missing):
        raise ValueError(f"a scanned model needs a {what} in every layer or in none")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)


class MAPHead(nn.Module):
    """Attention pooling: one learned query attends to all tokens (big_vision)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        """Pools tokens into one vector."""
        config = self.config
        probe = parameter(self, "probe", nn.initializers.xavier_uniform(), (1, 1, config.width))
        probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, config.width))
        x = MultiHeadDotProductAttention(
            config.heads, dtype=config.dtype, name="MultiHeadDotProductAttention_0"
        )(probe, x)
        y = _layer_norm(config, "LayerNorm_0")(x)
        return (x + MlpBlock(config, name="MlpBlock_0")(y))[:, 0]


class ViT(nn.Module):
    """A Vision Transformer: `model.apply({"params": params}, images) -> logits [B, classes]`.

    Attributes:
      config: the architecture.
      taps: what attention layers give away; `vi.measure` and `vi.capture` set it. None runs the
        fused attention path.
    """

    config: ViTConfig
    taps: Taps | None = None

    def setup(self) -> None:
        """Makes parameters and submodules under big_vision's names."""
        config = self.config
        self.embedding = PatchEmbedding(
            config.width, config.patch_size, use_bias=config.patch_bias, dtype=config.dtype
        )
        small = nn.initializers.normal(stddev=0.02)
        rows = config.pos_prefix + config.layout.num_patches
        self.pos_embedding = parameter(self, "pos_embedding", small, (1, rows, config.width))
        prefix = []
        if config.cls_token:
            prefix.append(parameter(self, "cls", nn.initializers.zeros, (1, 1, config.width)))
        if config.distilled:
            prefix.append(parameter(self, "dist", nn.initializers.zeros, (1, 1, config.width)))
        if config.registers:
            prefix.append(parameter(self, "reg", small, (1, config.registers, config.width)))
        self.prefix_tokens = prefix
        self.position_dropout = nn.Dropout(config.dropout)
        if config.pre_norm:
            self.pre_norm = _layer_norm(config)
        self.Transformer = Encoder(config, self.taps)
        if config.pool == "map":
            self.MAPHead_0 = MAPHead(config)
        if not config.norm_before_pool:
            self.pool_norm = _layer_norm(config)
        if config.num_classes:
            self.head = Dense(config.num_classes, use_bias=config.head_bias, dtype=config.dtype)
            if config.distilled:
                self.head_dist = Dense(config.num_classes, dtype=config.dtype)

    def __call__(
        self,
        images: Images,
        *,
        mask: LayerMask = None,
        bias: LayerBias = None,
        keep: Keep = None,
        train: bool = False,
        sharpness: Float[Array, ""] | float | None = None,
    ) -> Float[Array, "B classes"]:
        """Logits, or pooled features when the config has `num_classes=0`.

        Args:
          images: normalised, `[B, height, width, 3]` of the config's image size.
          mask: True = attend. `[N, N]`, `[B, N, N]` or `[B, H, N, N]` for all layers, or a list
            with one (or None) for each layer. A row that masks every key gets a zero update.
          bias: a `SeparableBias` for all layers or a list with one (or None) for each.
          keep: numbers of the patches that stay, for each image; the others are deleted after
            position embedding, so that the model runs on `T + K` tokens. None keeps all.
          train: whether dropout and stochastic depth are active (needs the `dropout` key).
          sharpness: `τ` of predicted windows, in patches; None is that of the config. Only for a
            model that predicts windows.

        Raises:
          ValueError: when images or masks do not fit the model.
        """
        x = self.embed(images, train=train)
        if keep is not None:
            if self.config.windows is not None:
                raise ValueError("a model with windows needs all patches: keep=None")
            prefix, patches = jnp.split(x, [self.config.prefix], axis=1)
            patches = jnp.take_along_axis(patches, jnp.asarray(keep)[..., None], axis=1)
            x = jnp.concatenate([prefix, patches], axis=1)
        # A plain pass makes all tokens of the last block, too: Flax's `capture_intermediates` shows
        # them to those who study them (docs/performance.md).
        read = self.config.tokens_read if train or self.taps else None
        x = self.Transformer(x, mask, bias, train, sharpness=sharpness, first_tokens=read)
        return self.classify(x)

    def embed(self, images: Images, *, train: bool = False) -> Float[Array, "B N D"]:
        """Images to tokens: what the first block reads."""
        config = self.config
        if images.ndim != 4 or images.shape[1:] != (*config.image_size, 3):
            raise ValueError(
                f"images have shape {images.shape}; this model reads "
                f"[B, {config.image_size[0]}, {config.image_size[1]}, 3]"
            )
        x = self.embedding(jnp.asarray(images, config.dtype))
        x = x.reshape(x.shape[0], -1, config.width)
        # Positions are added to the first `pos_prefix` prefix tokens and to the patches; registers
        # stand between the two and have none.
        position = self.pos_embedding.astype(x.dtype)
        prefix_position, patch_position = jnp.split(position, [config.pos_prefix], axis=1)
        prefix = jnp.zeros((x.shape[0], 0, config.width), x.dtype)
        if self.prefix_tokens:
            prefix = jnp.concatenate([t.astype(x.dtype) for t in self.prefix_tokens], axis=1)
            unplaced = config.prefix - config.pos_prefix
            prefix = prefix + jnp.pad(prefix_position, ((0, 0), (0, unplaced), (0, 0)))
            prefix = jnp.broadcast_to(prefix.reshape(1, -1), (x.shape[0], prefix[0].size))
        # Tokens of an image stand in one axis here, or XLA's GPU compiler would lay out the whole
        # residual stream for the sum over images that is the positions' derivative, and transpose
        # it in every layer (docs/performance.md).
        prefix = prefix.reshape(x.shape[0], -1)
        x = x.reshape(x.shape[0], -1) + patch_position.reshape(1, -1)
        x = jnp.concatenate([prefix, x], axis=1).reshape(x.shape[0], -1, config.width)
        x = self.position_dropout(x, deterministic=not train)
        return self.pre_norm(x) if config.pre_norm else x

    def run_blocks(
        self,
        tokens: Float[Array, "B N D"],
        *,
        mask: LayerMask = None,
        first: int = 0,
        last: int | None = None,
    ) -> Float[Array, "B N D"]:
        """Blocks `first` to `last - 1` on tokens, as `vi.ablate_edges` needs them."""
        return self.Transformer(tokens, mask, first=first, last=last)

    def classify(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B classes"]:
        """Tokens after the last block to logits; `ViTConfig.tokens_read` of them are enough."""
        config = self.config
        if config.pool == "map":
            pooled = self.MAPHead_0(tokens)
        else:
            parts = []
            if "cls" in config.pool:
                parts.append(tokens[:, 0])
            if "gap" in config.pool:
                parts.append(jnp.mean(tokens[:, config.prefix :], axis=1))
            pooled = jnp.concatenate(parts, axis=-1)
        if not config.norm_before_pool:
            pooled = self.pool_norm(pooled)
        if not config.num_classes:
            return pooled
        logits = self.head(pooled)
        if config.distilled:
            second = tokens[:, 1] if config.norm_before_pool else self.pool_norm(tokens[:, 1])
            logits = (logits + self.head_dist(second)) / 2
        return logits
