"""`vit-interact statistics` and `merge-statistics`."""

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
    "vit-interact statistics --limit 64 --out stats.zarr",
    "vit-interact statistics --model vit.safetensors --data imagenet/val --indicators "
    "attention,leave_one_out --coverages none --out stats.zarr --resume",
)
def statistics(
    model: Model = DEFAULT_MODEL,
    data: Annotated[
        str, typer.Option(help="A folder of images, tfds:NAME, or 'embedded'.")
    ] = "embedded",
    out: Annotated[Path, typer.Option(help="The store to write.")] = Path("stats.zarr"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out holds.")] = False,
    indicators: Annotated[str, typer.Option(help="Names such as attention,edge.")] = "attention",
    coverages: Annotated[
        str, typer.Option(help="Shares of impact that windows hold, in (0, 1]; or none.")
    ] = "0.9",
    limit: Limit = None,
    skip: Skip = 0,
    batch_size: BatchSize = 8,
    save_every: Annotated[float, typer.Option(help="Seconds between saves.")] = 30.0,
    image_size: ImageSize = None,
    arch: Arch = None,
    dtype: Dtype = "float32",
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0; 'auto' on a TPU pod.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Processes in all.")] = None,
    process: Annotated[int | None, typer.Option(help="Number of this one, from 0.")] = None,
) -> None:
    """Count what patches do to each other over a data set, in fixed memory.

    Leaves a zarr store with count, mean, variance, range and histogram of every quantity by layer,
    and a folder of figures beside it. Progress is saved: after a kill --resume goes on.
    """
    with one_line_errors():
        _join(coordinator, processes, process)
        from vit_interact.data.sources import open_examples
        from vit_interact.survey.quantities import Design
        from vit_interact.survey.session import Survey

        chosen = names_of(indicators)
        shares = () if coverages == "none" else numbers_of("--coverages", coverages)
        checkpoint = load(model, image_size=image_size, arch=arch, dtype=dtype)
        examples, left_out = open_examples(data, None, None, skip, limit, watched("reading images"))
        warn_left_out(left_out)
        design = Design.of(checkpoint.model, indicators=chosen, coverages=shares)
        survey = Survey(
            checkpoint,
            examples,
            design,
            out,
            data,
            skip,
            batch_size,
            resume,
            left_out=left_out,
            save_every=save_every,
        )
        with progress("surveying", len(examples)) as advance:
            dataset = survey.run(advance)
        _figures(dataset, out)
    print(f"{survey.done} images in {out}")


@command(
    "vit-interact merge-statistics a.zarr b.zarr --out all.zarr",
)
def merge_statistics(
    stores: Annotated[list[Path], typer.Argument(help="Stores of the same model and options.")],
    out: Annotated[Path, typer.Option(help="The store to write.")],
) -> None:
    """Join surveys of different images of one model, as if one run had seen them all."""
    with one_line_errors():
        from vit_interact.survey.store import load_survey, merge_surveys

        dataset = merge_surveys(stores, out)
        _figures(dataset, out)
        images = load_survey(out)[2]["images"]
    print(f"{images} images in {out}")


def _join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins a group of processes before anything else touches a device."""
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError("--processes and --process need --coordinator HOST:PORT")
        return
    import jax

    if coordinator == "auto":
        jax.distributed.initialize()
    elif processes is None or process is None or not 0 <= process < processes:
        raise ValueError("--coordinator needs --processes N and --process 0 to N - 1")
    else:
        jax.distributed.initialize(coordinator, processes, process)


def _figures(dataset: Any, out: Path) -> None:
    import jax

    if jax.process_index() == 0:
        from vit_interact.viz.survey import draw_survey

        for path in draw_survey(dataset, out.with_name(out.stem + "_figures")):
            print(path)
