"""`vit-interact verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vit_interact.cli.shell import (
    DEFAULT_MODEL,
    Arch,
    BatchSize,
    Dtype,
    ImageSize,
    Limit,
    Model,
    Skip,
    among,
    command,
    load,
    names_of,
    numbers_of,
    one_line_errors,
    progress,
    warn_left_out,
    watched,
)


@command(
    "vit-interact verify --limit 16 --indicators leave_one_out,attention",
    "vit-interact verify --model vit.safetensors --data imagenet/val --limit 500 --out checked",
)
def verify(
    model: Model = DEFAULT_MODEL,
    data: Annotated[
        str, typer.Option(help="A folder of class folders, tfds:NAME[:SPLIT], or 'embedded'.")
    ] = "embedded",
    indicators: Annotated[
        str | None, typer.Option(help="Names such as attention,edge; all seven if unset.")
    ] = None,
    tests: Annotated[
        str, typer.Option(help="Of windows, removal, faithfulness.")
    ] = "windows,removal",
    coverages: Annotated[
        str, typer.Option(help="Shares of impact that windows hold, in (0, 1].")
    ] = "0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,1.0",
    power: Annotated[
        float, typer.Option(help="Rows are raised to it before windows are made: see docs.")
    ] = 1.0,
    variants: Annotated[
        str, typer.Option(help="Windows: layers, staged, shared, data; see docs.")
    ] = "layers,staged,shared,data",
    controls: Annotated[
        str, typer.Option(help="Boxes to compare with: centred, random, lowest, grid; or none.")
    ] = "centred,random,lowest,grid",
    orders: Annotated[
        str, typer.Option(help="Of removal: lowest, patches, highest, staged: see docs.")
    ] = "lowest,patches,highest,staged",
    shares: Annotated[
        str, typer.Option(help="Shares of patches removed, in (0, 1).")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    interventions: Annotated[
        str, typer.Option(help="How patches are removed: drop, mask, zero.")
    ] = "drop,mask,zero",
    limit: Limit = None,
    skip: Skip = 0,
    seed: Annotated[int, typer.Option(help="Of random controls.")] = 0,
    batch_size: BatchSize = 8,
    image_size: ImageSize = None,
    arch: Arch = None,
    dtype: Dtype = "float32",
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("vit-interact-verify"),
) -> None:
    """Check indicators: accuracy inside their windows, and without the patches they call needless.

    Leaves [bold]verify.json[/bold], [bold]verify.csv[/bold] and curves as PNG. Finished parts are
    kept: the same command goes on after a kill.
    """
    with one_line_errors():
        from vit_interact.data.sources import open_examples
        from vit_interact.verify.removal import INTERVENTIONS, ORDERS
        from vit_interact.verify.run import TESTS, Plan
        from vit_interact.verify.session import Verification
        from vit_interact.verify.windows import CONTROLS, VARIANTS

        if not 0 < power <= 4:
            raise ValueError(f"--power {power}: expected a number above 0, up to 4")
        plan = Plan(
            names_of(indicators),
            among("--tests", tests, TESTS),
            numbers_of("--coverages", coverages),
            among("--variants", variants, VARIANTS),
            () if controls == "none" else among("--controls", controls, CONTROLS),
            among("--orders", orders, ORDERS),
            numbers_of("--shares", shares, below=True),
            among("--interventions", interventions, INTERVENTIONS),
            seed,
            batch_size,
            power,
        )
        checkpoint = load(model, image_size=image_size, arch=arch, dtype=dtype)
        config = checkpoint.model.config
        if not config.has_classes:
            raise ValueError(f"{model} has no classes: verification needs a classifier")
        examples, left_out = open_examples(
            data, checkpoint.class_names, config.num_classes, skip, limit, watched("reading images")
        )
        work = Verification(checkpoint, examples, plan, out, skip, left_out)
        warn_left_out(left_out)
        one, left = work.estimate()
        print(
            f"{len(examples)} images, {work.passes:.0f} forward passes each, {one:.3f} s a pass: "
            f"about {_duration(left)} to go"
        )
        batches = -(-len(examples) // batch_size)
        with progress("verifying", round(work.passes * batches)) as advance:
            report = work.run(lambda passes: advance(passes))
    _report(report, out)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _report(report: dict[str, Any], out: Path) -> None:
    """Tables that rank indicators."""
    from rich.console import Console
    from rich.table import Table

    from vit_interact.verify.results import rank_removal, rank_windows

    base, console = report["base"], Console()
    low, high = base["top1_95"]
    print(f"top-1 of the whole model: {base['top1']:.1%} ({low:.1%} to {high:.1%})")
    if report["windows"]:
        ranked = rank_windows(report)
        table = Table(title="top-1 inside windows, mean over areas of 5 to 50 % of the grid")
        table.add_column("indicator", no_wrap=True)
        columns = [name for name in ranked[0] if name != "indicator"]
        columns.sort(key=lambda name: (not name.endswith("indicator"), name))
        titles = {
            "layers/indicator": "its windows",
            "staged/indicator": "measured again",
            "shared/indicator": "one for all layers",
            "data/indicator": "one for all images",
        }
        for name in columns:
            variant, kind = name.split("/")
            again = " (again)" if variant == "staged" else ""
            table.add_column(titles.get(name, kind + again), justify="right")
        for row in ranked:
            table.add_row(row["indicator"], *(f"{row[name]:.1%}" for name in columns))
        console.print(table)
    if report["removal_auc"]:
        hows = list(report["options"]["interventions"])
        best: dict[str, dict[str, Any]] = {}
        for row in rank_removal(report):
            best.setdefault(row["order"], {})[row["intervention"]] = row
        table = Table(title="removal: area under top-1 against the share removed, 95 % interval")
        table.add_column("order", no_wrap=True)
        for how in hows:
            table.add_column(how, justify="right", no_wrap=True)
        for order, found in sorted(best.items(), key=lambda item: -item[1][hows[0]]["auc"]):
            cells = [found[how] for how in hows]
            table.add_row(order, *(
                f"{c['auc']:.1%} ({c['auc_95'][0]:.1%}-{c['auc_95'][1]:.1%})" for c in cells
            ))  # fmt: skip
        console.print(table)
    if report["faithfulness"]:
        console.print(_faithfulness_table(report))
    if "windows_speed" in report:
        print(
            f"a pass inside windows takes {report['windows_speed']['ratio']:.2f} times a whole one "
            "here, where windows are a mask; attention_flops is what a kernel would need"
        )
    if "drop_speed" in report:
        speed = report["drop_speed"]
        print(f"without {speed['share']:.0%} of the patches: {speed['speed_up']:.1f} times faster")
    print(f"all figures in {out / 'verify.json'}")


def _faithfulness_table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    share = 0.05
    table = Table(title=f"faithfulness: edges really cut, and {share:.0%} of all edges masked")
    table.add_column("indicator", no_wrap=True)
    for title in ("rho, 95 % interval", "strongest", "weakest", "random"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in sorted(report["faithfulness"], key=lambda row: -row["rho"]):
        low, high = row["rho_95"]
        change = {
            one["kind"]: f"{one['change']:+.2f}"
            for one in report["groups"]
            if one["indicator"] == row["indicator"] and one["share"] == share
        }
        table.add_row(
            row["indicator"], f"{row['rho']:.3f} ({low:.3f}-{high:.3f})",
            change["top"], change["bottom"], change["random"],
        )  # fmt: skip
    table.caption = "strongest, weakest, random: change of the predicted class's logit"
    return table
