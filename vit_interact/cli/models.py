"""`vit-interact models` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vit_interact.cli.shell import DEFAULT_MODEL, command, load, one_line_errors


@command(
    "vit-interact models",
    "vit-interact models --json",
)
def models(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the architectures that can be created by name."""
    import json

    from vit_interact.models.zoo import list_models, model_config

    rows: list[dict[str, Any]] = []
    for name in list_models():
        config = model_config(name)
        rows.append(
            {
                "name": name,
                "parameters": config.count_parameters(),
                "image_size": list(config.image_size),
                "patch_size": list(config.patch_size),
                "layers": config.depth,
                "heads": config.heads,
                "width": config.width,
                "prefix_tokens": config.prefix,
                "outputs": config.num_classes,
            }
        )
    if json_:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    for head in ("params", "image", "patch", "layers", "heads", "outputs"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"], f"{row['parameters'] / 1e6:.1f} M", str(row["image_size"][0]),
            str(row["patch_size"][0]), str(row["layers"]), str(row["heads"]),
            str(row["outputs"] or "features"),
        )  # fmt: skip
    Console().print(table)
    print(f"weights that come with the package: {DEFAULT_MODEL}")


@command(
    "vit-interact convert ViT-B_16.npz vit_b16.safetensors",
    "vit-interact convert hf:facebook/deit-small-patch16-224 deit.safetensors --dtype float16",
)
def convert(
    source: Annotated[str, typer.Argument(help="Anything that --model takes.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write (timm names).")],
    image_size: Annotated[int | None, typer.Option(help="Resize positions to this size.")] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture when the file is unclear.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Convert weights to timm-named safetensors, preprocessing and class names included."""
    with one_line_errors():
        if target.suffix != ".safetensors":
            raise ValueError(f"{target}: the file to write must end in .safetensors")
        if target.exists() and not force:
            raise ValueError(f"{target} exists; --force replaces it")
        from vit_interact.models.weights import export_timm

        loaded = load(source, image_size=image_size, arch=arch)
        export_timm(
            loaded.model, loaded.params, target,
            preprocess=loaded.preprocess, class_names=loaded.class_names, dtype=dtype,
        )  # fmt: skip
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
