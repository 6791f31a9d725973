"""The usual way in PyTorch: a Hugging Face ViT that returns its attention, then a reduction.

Hooks keep each layer's values and heads' outputs, `output_attentions=True` its weights; the
formulas are those of docs/method.md, over all heads at once, as people write them. Nothing here is
used outside of benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.peers import randomise
from vit_interact.models.config import ViTConfig


def build(config: ViTConfig, seed: int = 0) -> Any:
    """`ViTForImageClassification` of our config's sizes, every parameter random."""
    import transformers

    theirs = transformers.ViTConfig(
        hidden_size=config.width, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, intermediate_size=config.mlp_dim,
        image_size=config.image_size[0], patch_size=config.patch_size[0],
        num_labels=config.num_classes, layer_norm_eps=config.norm_eps,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(theirs).eval()
    randomise(model, seed)
    return model


def save(model: Any, folder: Path) -> None:
    """Writes what `vi.load_checkpoint` reads."""
    model.save_pretrained(folder)


def where() -> str:
    """PyTorch's device: a GPU where it has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def to_torch(images: np.ndarray) -> Any:
    """`[B, 3, h, w]` of `[B, h, w, 3]`, on PyTorch's device."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(where())


def forward(model: Any, pixels: Any, implementation: str) -> Callable[[], Any]:
    """A call that gives logits; `implementation` is `sdpa` or `eager`."""
    import torch

    def call() -> Any:
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            return model(pixels).logits

    return call


def training_step(model: Any, pixels: Any, labels: Any, mixed: bool) -> Callable[[], Any]:
    """A call that trains on one batch as people do: SDPA, AdamW, compiled on a GPU.

    Args:
      model: from `build`; on the pixels' device.
      pixels: `[B, 3, h, w]`.
      labels: `[B]`.
      mixed: computes in bfloat16 with float32 parameters.
    """
    import torch

    model.train().set_attn_implementation("sdpa")
    gpu = pixels.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05, fused=gpu)
    run = torch.compile(model) if gpu else model

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=mixed):
            loss = torch.nn.functional.cross_entropy(run(pixels).logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return call


def measure(model: Any, pixels: Any, indicator: str) -> Callable[[], Any]:
    """A call that gives `[L, B, N, N]`, as `vi.measure(..., (indicator,))[indicator]` does."""
    import torch

    layers = [m for m in model.modules() if type(m).__name__ == "ViTAttention"]
    graded = indicator in ("gradient", "edge")
    # Nobody asks for gradients of parameters.
    model.requires_grad_(False)

    def run(values: list[Any], outputs: list[Any]) -> Any:
        """The model's outputs; hooks fill the lists."""
        hooks = []
        for layer in layers:
            hooks += [
                layer.v_proj.register_forward_hook(lambda m, i, o: values.append(o)),
                layer.o_proj.register_forward_pre_hook(lambda m, i: outputs.append(i[0])),
            ]
        try:
            return model(pixels.detach().requires_grad_(graded), output_attentions=True)
        finally:
            for hook in hooks:
                hook.remove()

    def call() -> Any:
        model.set_attn_implementation("eager")
        values: list[Any] = []
        outputs: list[Any] = []
        grads: Sequence[Any] = [None] * len(layers)
        with torch.set_grad_enabled(graded):
            found = run(values, outputs)
            if graded:
                grads = torch.autograd.grad(found.logits.max(dim=-1).values.sum(), outputs)
        maps = []
        with torch.no_grad():
            for a, v, o, g, layer in zip(
                found.attentions, values, outputs, grads, layers, strict=True
            ):
                heads, kernel = a.shape[1], layer.o_proj.weight.T
                own = [_split(array, heads) for array in (v, o, g) if array is not None]
                maps.append(_REDUCTIONS[indicator](a, kernel.unflatten(0, (heads, -1)), *own))
            return torch.stack(_roll(maps) if indicator == "rollout" else maps)

    return call


def _split(array: Any, heads: int) -> Any:
    """`[B, N, H*K]` as `[B, H, N, K]`."""
    return array.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention(a: Any, w: Any, v: Any, o: Any) -> Any:
    return a.mean(1)


def _dispersion(a: Any, w: Any, v: Any, o: Any) -> Any:
    return a.std(1, correction=0)


def _value_norm(a: Any, w: Any, v: Any, o: Any) -> Any:
    moved = v @ w  # [B, H, N, D]
    gram = (moved.transpose(1, 2) @ moved.transpose(1, 2).mT).permute(0, 2, 3, 1)  # [B, H, G, N]
    total = 0
    for head in range(a.shape[1]):
        total = total + a[:, head] * (gram[:, head, :, None] * a).sum(1)
    return total.clamp_min(0).sqrt()


def _gradient(a: Any, w: Any, v: Any, o: Any, g: Any) -> Any:
    return (a * (g @ v.mT)).relu().mean(1)


def _leave_one_out(a: Any, w: Any, v: Any, o: Any) -> Any:
    metric = w @ w.mT
    centre = v.mean(-2, keepdim=True)
    v, o = v - centre, o - centre
    output = o @ metric
    own_output = (output * o).sum(-1)[..., :, None]
    own_value = ((v @ metric) * v).sum(-1)[..., None, :]
    distance = (own_output - 2 * output @ v.mT + own_value).relu()
    return ((a / (1 - a)).square() * distance).sum(1).sqrt()


def _edge(a: Any, w: Any, v: Any, o: Any, g: Any) -> Any:
    along = (g * o).sum(-1)[..., :, None]
    return (a / (1 - a) * (along - g @ v.mT)).sum(1).abs()


def _roll(maps: list[Any]) -> list[Any]:
    import torch

    rolled: list[Any] = []
    for layer in maps:
        mixed = 0.5 * layer + 0.5 * torch.eye(layer.shape[-1]).to(layer)
        rolled.append(mixed @ rolled[-1] if rolled else mixed)
    return rolled


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "attention": _attention,
    "dispersion": _dispersion,
    "value_norm": _value_norm,
    "gradient": _gradient,
    "leave_one_out": _leave_one_out,
    "edge": _edge,
    "rollout": _attention,
}
