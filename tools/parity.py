"""Compares our models with those of `transformers` and prints the table of docs/models.md.

    python -m tools.parity            # real sizes: minutes on two cores, up to 6 GB of memory
    python -m tools.parity --tiny     # the sizes of the tests: seconds
    python -m tools.parity --timm     # timm's own models, two layers each, and export back to timm

Each model is built there with random weights, saved with `save_pretrained`, loaded here, and run
on the same random images, on its own image size and on another that is not square.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import tempfile
from typing import Any

import numpy as np

from tools import peers
from vit_interact.models.weights import export_timm, load_checkpoint


def compare(name: str, full: bool) -> str:
    """One line of the table, for one peer."""
    theirs = peers.build(name, full=full)
    figures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        peers.save(name, theirs, pathlib.Path(folder))
        native = load_checkpoint(folder).model.config
        own, patch = native.image_size, native.patch_size[0]
        other = (own[0] + 2 * patch, own[1] - patch)
        for size in (own, other):
            ours = load_checkpoint(folder, image_size=size)
            images = peers.pictures(size, batch=1 if full else 2)
            logits, attention = peers.run_ours(ours.model, ours.params, images)
            expected, maps = peers.run(name, theirs, images)
            figures += [
                "x".join(str(side) for side in size),
                f"{np.abs(logits - expected).max():.1e}",
                f"{np.abs(attention - maps).max():.1e}",
            ]
            largest = np.abs(expected).max()
            config = ours.model.config
            del ours, attention, maps
            gc.collect()
    sizes = f"{config.width} wide, {config.depth} layers, patch {patch}"
    return f"| {peers.PEERS[name].model} ({sizes}) | {largest:.1f} | {' | '.join(figures)} |"


# timm's names, how they are built, and what their files do not tell.
TIMM_MODELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}, {}),
    ("vit_tiny_patch16_224", {"qk_norm": True}, {}),
    ("vit_tiny_patch16_224", {"global_pool": "avg"}, {}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}, {}),
    ("deit_tiny_distilled_patch16_224", {}, {}),
    ("vit_small_patch14_dinov2", {"img_size": 224}, {}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 224}, {}),
    ("vit_giant_patch14_dinov2", {"img_size": 224}, {}),
    ("vit_base_patch32_clip_224", {}, {}),
    ("vit_base_patch32_clip_quickgelu_224", {}, {"activation": "gelu_quick"}),
]


def compare_timm(name: str, settings: dict[str, Any], known: dict[str, Any]) -> str:
    """One line for a timm model: outputs, and whether export gives its own file back."""
    import timm
    from safetensors.numpy import load_file, save_file

    theirs = timm.create_model(name, depth=2, **settings).eval()
    peers.randomise(theirs, seed=0)
    arrays = {key: value.numpy() for key, value in theirs.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "w.safetensors"
        save_file(arrays, path)
        ours = load_checkpoint(path, **known)
        export_timm(ours.model, ours.params, path)
        again = load_file(path)
    same = arrays.keys() == again.keys() and all(
        np.array_equal(arrays[key], again[key]) for key in arrays
    )
    images = peers.pictures(ours.model.config.image_size)
    difference = np.abs(
        peers.run_ours(ours.model, ours.params, images)[0] - peers.run_timm(theirs, images)
    ).max()
    options = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"| {name} | {options} | {difference:.1e} | {'the same' if same else 'another'} |"


def main() -> None:
    """Prints versions and the table."""
    import jax
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the sizes of the tests")
    parser.add_argument("--timm", action="store_true", help="timm instead of transformers")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(peers.PEERS)}; default all")
    arguments = parser.parse_args()
    if arguments.timm:
        import timm

        print(f"timm {timm.__version__}\n\n| model | options | outputs | exported file |")
        print("|---|---|---|---|")
        for case in TIMM_MODELS:
            print(compare_timm(*case), flush=True)
        return
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, jax "
        f"{jax.__version__}, float32, {jax.default_backend()}; largest absolute difference\n"
    )
    print(
        "| model | largest output | own size | outputs | attention "
        "| other size | outputs | attention |\n|---|---|---|---|---|---|---|---|"
    )
    for name in arguments.names or peers.PEERS:
        print(compare(name, full=not arguments.tiny), flush=True)


if __name__ == "__main__":
    main()
