"""Makes the golden files of `tests/models/goldens` from tiny random models of other libraries.

    python -m tools.make_goldens

needs PyTorch, transformers, timm and SciPy. The tests check the files everywhere, and check on
machines that have those libraries that the files are still what the libraries say.
"""

from __future__ import annotations

import pathlib

import numpy as np

from tools import peers

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "models" / "goldens"
# Not the models' own 16x16, and not square.
OTHER_SIZE = (24, 20)


def make_peer(name: str, folder: pathlib.Path) -> None:
    """Weights as `save_pretrained` writes them, and `expected.npz` with inputs and outputs."""
    model = peers.build(name)
    peers.save(name, model, folder)
    images, other = peers.pictures((16, 16)), peers.pictures(OTHER_SIZE, batch=1)
    logits, attention = peers.run(name, model, images)
    other_logits, other_attention = peers.run(name, model, other)
    np.savez_compressed(
        folder / "expected.npz",
        images=images, logits=logits, attention=attention,
        other_images=other, other_logits=other_logits,
        # One layer and image of the larger map are enough and keep the file small.
        other_attention=other_attention[-1, 0],
    )  # fmt: skip


def make_timm(name: str, folder: pathlib.Path) -> None:
    """The same of a timm model, whose files have no `config.json`."""
    from safetensors.torch import save_file

    model = peers.build_timm(name)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    images, other = peers.pictures((16, 16)), peers.pictures(OTHER_SIZE, batch=1)
    np.savez_compressed(
        folder / "expected.npz",
        images=images, logits=peers.run_timm(model, images),
        other_images=other, other_logits=peers.run_timm(model, other),
    )  # fmt: skip


def make_posembed(path: pathlib.Path) -> None:
    """Resized position embeddings by torch and SciPy."""
    import torch
    from scipy import ndimage

    arrays: dict[str, np.ndarray] = {}
    for case, (old, new) in enumerate([((4, 4), (7, 5)), ((7, 6), (3, 4))]):
        rng = np.random.default_rng(case)
        pos = rng.normal(size=(1, 1 + old[0] * old[1], 6)).astype(np.float32)
        arrays |= {f"pos_{case}": pos, f"old_{case}": np.array(old), f"new_{case}": np.array(new)}
        grid = pos[0, 1:].reshape(*old, -1)
        channels = torch.from_numpy(grid.transpose(2, 0, 1)[None].copy())
        for name, antialias in (("bicubic_antialias", True), ("bicubic", False)):
            resized = torch.nn.functional.interpolate(
                channels, size=new, mode="bicubic", align_corners=False, antialias=antialias
            )
            arrays[f"{name}_{case}"] = _rows(pos, resized[0].numpy().transpose(1, 2, 0))
        zoom = (new[0] / old[0], new[1] / old[1], 1)
        arrays[f"bilinear_{case}"] = _rows(pos, ndimage.zoom(grid, zoom, order=1))
    np.savez_compressed(path, **arrays)


def _rows(pos: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return np.concatenate([pos[:, :1], grid.reshape(1, -1, grid.shape[-1])], axis=1)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_posembed(FOLDER / "posembed.npz")
    for peer in peers.PEERS:
        make_peer(peer, FOLDER / peer)
    for peer in peers.TIMM_PEERS:
        make_timm(peer, FOLDER / peer)
    count = len(peers.PEERS) + len(peers.TIMM_PEERS) + 1
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{count} golden files, {size / 1024:.0f} KiB, in {FOLDER}")
