"""`vit-interact report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vit_interact.cli.shell import command, one_line_errors, progress

if TYPE_CHECKING:
    import xarray as xr


@command(
    "vit-interact report vit-interact-out/analysis.zarr --out report.html",
    "vit-interact report out --images 'cats/*' --images dog.jpg --out animals.html",
    "vit-interact report out --verify checked/verify.json --statistics stats.zarr --out all.html",
)
def report(
    analysis: Annotated[
        Path, typer.Argument(help="analysis.zarr, or the folder of analyze that holds it.")
    ],
    images: Annotated[
        list[str] | None,
        typer.Option(help="Names, or patterns such as 'cats/*'; all that fit 80 MB if unset."),
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="A verify.json, or its folder, as a tab of its own.")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="A store of vit-interact statistics, as a tab.")
    ] = None,
    bits: Annotated[
        int, typer.Option(help="Bits of an entry, 8 or 16: closer, and twice the size.")
    ] = 8,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Make one interactive HTML file that works offline.

    Pointing at a patch shows what it takes from and gives to every other patch, in every layer and
    for every indicator that [bold]analyze --indicator a,b[/bold] measured.
    """
    with one_line_errors():
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; expected a file such as {out}/report.html")
        data = _open(analysis)
        chosen = _choose(data, images)
        results = _results(verify, statistics)
        from vit_interact.viz.pack import Pack, fitting
        from vit_interact.viz.page import report_page

        kept = chosen if images else chosen[: fitting(data, bits)]
        pack = Pack(data.isel(image=kept), bits)
        with progress("writing", len(kept), first="") as advance:
            report_page(pack, out, results, advance)
    size = out.stat().st_size / 1e6
    counts = {"image": len(kept), "indicator": len(pack.indicators)}
    told = (f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items())
    print(f"wrote {out}: {', '.join(told)}, {size:.1f} MB")
    if len(kept) < len(chosen):
        print(
            f"  {len(chosen) - len(kept)} images are left out to keep it under 80 MB; choose with "
            "--images"
        )


def _open(path: Path) -> xr.Dataset:
    inside = path / "analysis.zarr"
    store = inside if inside.is_dir() else path
    if not store.is_dir():
        raise ValueError(f"{path}: there is no such store; expected analysis.zarr of analyze")
    try:
        return _open_quietly(store)
    except Exception as error:  # zarr raises many kinds for what is no store
        raise ValueError(f"{store}: is no store of vit-interact analyze ({error})") from error


def _open_quietly(store: Path) -> xr.Dataset:
    """Without a warning that metadata is not gathered: a survey or a killed run is whole so."""
    import warnings

    import xarray as xr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to open Zarr store with consolidated")
        return xr.open_zarr(store, chunks=None)


def _choose(data: xr.Dataset, wanted: list[str] | None) -> list[int]:
    """Places of the images; each pattern must find some."""
    import difflib
    import fnmatch

    if "image" not in data.dims:
        raise ValueError("the store holds no images; expected analysis.zarr of analyze")
    names = [str(name) for name in data["image"].values]
    if not wanted:
        return list(range(len(names)))
    found: dict[int, None] = {}
    for pattern in wanted:
        some = [k for k, n in enumerate(names) if n == pattern or fnmatch.fnmatch(n, pattern)]
        if not some:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"--images {pattern!r}: no image is called so; there is {near}")
        found |= dict.fromkeys(some)
    return list(found)


def _results(verify: Path | None, statistics: Path | None) -> dict[str, Any]:
    """Tabs beside the images."""
    import json

    tabs: dict[str, Any] = {}
    if verify is not None:
        from vit_interact.viz.results import verification_tab

        file = verify / "verify.json" if verify.is_dir() else verify
        try:
            tabs["verification"] = verification_tab(json.loads(file.read_text("utf-8")))
        except OSError as error:
            raise ValueError(
                f"--verify {file}: {error.strerror}; expected verify.json of vit-interact verify, "
                "or its folder"
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(f"--verify {file}: is no JSON ({error})") from error
        except ValueError as error:
            raise ValueError(f"--verify {file}: {error}") from error
    if statistics is not None:
        from vit_interact.survey.store import load_survey
        from vit_interact.viz.results import survey_tab

        load_survey(statistics)  # says what is wrong with a store
        try:
            tabs["statistics"] = survey_tab(_open_quietly(statistics))
        except ValueError as error:
            raise ValueError(f"--statistics {statistics}: {error}") from error
    return tabs
