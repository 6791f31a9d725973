"""One dataclass describes every Vision Transformer that the package builds or loads."""

from __future__ import annotations

import dataclasses
from typing import Any

from vit_interact.layout import TokenLayout

POOLS = ("cls", "gap", "map", "cls_gap")
ACTIVATIONS = ("gelu", "gelu_tanh", "gelu_quick")
WINDOWS = ("predicted", "given")


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """Windows that patches attend within; see `models/winft.py`.

    Attributes:
      layers: that have windows; None for all. The others attend everywhere.
      kind: `predicted` by each patch, for a window-free transformer; or `given`: the same for all
        images, kept with the weights.
      groups: predicted windows of each patch, for as many equal groups of heads.
      sharpness: `τ`, the width of the border of predicted windows in patches.
      reach: how far beyond the grid predicted windows go before training, in patches.
      start: `b`, the logit of every distance before training: the nearer to 0, the steeper.
      hard: attend within the windows that soft ones become as they sharpen.
      detach: gradients stop at the tokens that windows are predicted from: windows learn to read
        these, but they do not learn to suit the windows.
    """

    layers: tuple[int, ...] | None = None
    kind: str = "predicted"
    groups: int = 1
    sharpness: float = 1.0
    reach: float = 5.0
    start: float = 3.0
    hard: bool = False
    detach: bool = False

    def __post_init__(self) -> None:
        if self.kind not in WINDOWS:
            raise ValueError(f"windows.kind={self.kind!r}: expected one of {WINDOWS}")
        if self.groups < 1 or self.sharpness <= 0:
            raise ValueError(
                f"groups={self.groups}, sharpness={self.sharpness}: expected at least 1 and more "
                "than 0"
            )

    def has(self, layer: int) -> bool:
        """Whether a layer has windows."""
        return self.layers is None or layer in self.layers


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture of a Vision Transformer; hashable, so it can be static under `jit`.

    Attributes:
      image_size: (height, width) in pixels; need not be square.
      patch_size: (height, width) of a patch in pixels.
      width: model width `D`.
      depth: layers `L`.
      heads: attention heads `H`.
      mlp_dim: hidden width of the MLP (after the gate for SwiGLU).
      num_classes: outputs of the head; 0 returns the pooled features.
      pool: what the head reads: class token, mean of patches, attention pooling (MAP), or class
        token and mean of patches side by side (`cls_gap`, the DINOv2 linear head).
      cls_token: whether a class token comes first.
      registers: register tokens after class and distillation token.
      distilled: a distillation token and a second head; at inference the two heads are averaged.
      pos_prefix: prefix tokens that have a row of the position embedding, before the patches'.
      layer_scale: initial LayerScale value, or None for a model without it.
      activation: which GELU: `gelu` (erf), `gelu_tanh` or `gelu_quick` (sigmoid, CLIP).
      swiglu: gated MLP with SiLU instead of GELU.
      qk_norm: LayerNorm of queries and keys in each head.
      pre_norm: LayerNorm before the first block (CLIP).
      patch_bias: bias in the patch embedding.
      head_bias: bias in the head (CLIP's projection has none).
      norm_before_pool: the last LayerNorm is on all tokens; otherwise on the pooled vector.
      norm_eps: epsilon of every LayerNorm.
      dropout: rate in the MLP, after attention and after the position embedding.
      stochastic_depth: rate of the last layer; grows linearly from 0.
      scan: one compiled block looped by `nn.scan`, parameters stacked on a leading layer axis.
      remat: recompute each block in the backward pass.
      dtype: compute type name; parameters stay float32.
      windows: that patches attend within, as in a window-free transformer; None for a plain ViT.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000
    pool: str = "cls"
    cls_token: bool = True
    registers: int = 0
    distilled: bool = False
    pos_prefix: int = 1
    layer_scale: float | None = None
    activation: str = "gelu"
    swiglu: bool = False
    qk_norm: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    head_bias: bool = True
    norm_before_pool: bool = True
    norm_eps: float = 1e-6
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: str = "float32"
    windows: WindowConfig | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, as_pair(getattr(self, name), name))
        for size, patch, axis in zip(
            self.image_size, self.patch_size, ("height", "width"), strict=True
        ):
            if size < patch or size % patch:
                raise ValueError(
                    f"image {axis} {size} is not a multiple of the patch {axis} {patch}; "
                    f"the nearest that is: {max(1, round(size / patch)) * patch}"
                )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        for name, known in (("pool", POOLS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {known}")
        if self.pool in ("cls", "cls_gap") and not self.cls_token:
            raise ValueError(f"pool={self.pool!r} needs cls_token=True")
        if self.distilled and not (self.cls_token and self.pool == "cls"):
            raise ValueError("distilled=True needs cls_token=True and pool='cls'")
        if self.windows is not None:
            self._check_windows(self.windows)
        if not 0 <= self.pos_prefix <= self.prefix:
            raise ValueError(
                f"pos_prefix={self.pos_prefix}: the model has {self.prefix} prefix tokens"
            )

    def _check_windows(self, windows: WindowConfig) -> None:
        if self.heads % windows.groups:
            raise ValueError(f"{self.heads} heads are not a multiple of {windows.groups} groups")
        if windows.layers is None:
            return
        if self.scan:
            raise ValueError("a scanned model has windows in all layers or in none")
        wrong = [layer for layer in windows.layers if not 0 <= layer < self.depth]
        if wrong:
            raise ValueError(f"windows.layers has {wrong}; the model has {self.depth} layers")

    @property
    def blocks_are_alike(self) -> bool:
        """Whether one scanned block can stand for all."""
        return self.windows is None or self.windows.layers is None

    @property
    def prefix(self) -> int:
        """Prefix tokens `T`: class, distillation, registers."""
        return int(self.cls_token) + int(self.distilled) + self.registers

    @property
    def tokens_read(self) -> int | None:
        """How many of the first tokens logits are made of; None where it is all of them."""
        if self.pool != "cls":
            return None
        return 1 + int(self.distilled)

    @property
    def layout(self) -> TokenLayout:
        """Token layout of the model's own image size."""
        (height, width), (ph, pw) = self.image_size, self.patch_size
        return TokenLayout(rows=height // ph, cols=width // pw, prefix=self.prefix)

    @property
    def head_dim(self) -> int:
        """Width `K` of one head."""
        return self.width // self.heads

    @property
    def has_classes(self) -> bool:
        """Whether outputs are classes: not features, and not CLIP's embedding (a biasless head)."""
        return self.num_classes > 0 and self.head_bias

    def count_parameters(self) -> int:
        """Number of parameters, by arithmetic: listing models shall not start an accelerator."""
        width, norm = self.width, 2 * self.width
        (ph, pw), hidden = self.patch_size, self.mlp_dim
        mlp = (width + 1) * hidden * (2 if self.swiglu else 1) + (hidden + 1) * width
        attention = 4 * (width + 1) * width
        block = attention + mlp + 2 * norm + (4 * self.head_dim if self.qk_norm else 0)
        block += 0 if self.layer_scale is None else 2 * width
        total = (3 * ph * pw + int(self.patch_bias)) * width + self.depth * block + norm
        total += (self.pos_prefix + self.layout.num_patches + self.prefix) * width
        total += norm if self.pre_norm else 0
        if self.windows is not None:
            windowed = sum(self.windows.has(layer) for layer in range(self.depth))
            predicted = 4 * self.windows.groups * (width + 1)
            given = 4 * self.layout.num_patches
            total += windowed * (predicted if self.windows.kind == "predicted" else given)
        if self.pool == "map":
            total += width + attention + norm + mlp
        head = (
            width * (2 if self.pool == "cls_gap" else 1) + int(self.head_bias)
        ) * self.num_classes
        total += norm * (1 if self.pool == "cls_gap" and not self.norm_before_pool else 0) + head
        return total + ((width + 1) * self.num_classes if self.distilled else 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ViTConfig:
        """Builds a config from `to_dict`'s output.

        Raises:
          ValueError: for a field that no ViTConfig has.
        """
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown model settings {unknown}; see ViTConfig for the known ones")
        # JSON has lists where the fields are pairs.
        pairs: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        windows = pairs.get("windows")
        if isinstance(windows, dict):
            layers = windows.get("layers")
            layers = None if layers is None else tuple(layers)
            pairs["windows"] = WindowConfig(**{**windows, "layers": layers})
        return cls(**pairs)


def as_pair(value: Any, name: str) -> tuple[int, int]:
    """An int or a pair of ints as (height, width).

    Raises:
      ValueError: for anything else, naming `name`.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"{name}={value!r}: expected a positive int or (height, width)")
    return pair  # type: ignore[return-value]
