"""Training from the first line to the last; read it top to bottom."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from clu.parameter_overview import get_parameter_overview

from vit_interact.compile_cache import keep_compiled
from vit_interact.data.labelled import Labelled
from vit_interact.models.winft import window_layers
from vit_interact.processes import claimed
from vit_interact.train.alongside import Alongside
from vit_interact.train.checkpoint import Checkpoints, write_record
from vit_interact.train.config import as_json, check_config
from vit_interact.train.evaluate import evaluate, scalars
from vit_interact.train.inputs import EvalFeed, Feed, Inputs, make_augment, on_device
from vit_interact.train.log import Log, read_lines
from vit_interact.train.meter import Interrupt, Meter
from vit_interact.train.optimizer import frozen_leaves, make_optimizer, make_schedule
from vit_interact.train.results import describe, draw, export, overview, write_figures
from vit_interact.train.sharding import check_mesh, make_mesh, replicated
from vit_interact.train.showing import Showing
from vit_interact.train.start import choose_start, load_teacher
from vit_interact.train.state import abstract_state, create_state, param_shapes
from vit_interact.train.step import Recipe, make_eval_step, make_train_step
from vit_interact.train.windows import check_windows, frozen_windows, plan_windows

Watch = Callable[[Iterable[Any], int], Iterable[Any]]


def train(
    config: Any,
    workdir: str | Path,
    data: Mapping[str, Labelled] | None = None,
    watch: Watch = lambda items, total: items,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
    """Trains, or goes on with what is in the workdir.

    What it starts from, in this order: the newest whole checkpoint in `workdir`; the weights or run
    in `config.init`; random parameters.

    Args:
      config: `default_config()` with changes.
      workdir: where checkpoints, figures and `model.safetensors` go.
      data: splits by name in memory or of your own making (see `data.labelled.Labelled`), instead
        of `config.data.source`.
      watch: gets photographs that are decoded in advance and their number, and gives them on.
      devices: to train on instead of all.

    Returns:
      `step`, `finished`, and the last figures of `val` and `test`, where there are such splits.

    Raises:
      ValueError: for settings, data or a workdir that cannot be used, before anything compiles.
      DivergedError: when the loss becomes NaN or infinite; names the last good checkpoint.
    """
    check_config(config)
    folder = _writable(workdir)
    # Two runs in one folder would mix their logs and delete each other's checkpoints.
    alone = claimed(folder) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone:
        return _train(config, folder, data, watch, devices)


def _train(
    config: Any,
    workdir: Path,
    data: Mapping[str, Labelled] | None,
    watch: Watch,
    devices: Sequence[jax.Device] | None,
) -> dict[str, Any]:
    # What is asked for, and whether it can be done.
    inputs = Inputs(config, data)
    # Read at the end, but what is wrong with it should not wait till then.
    test = inputs.open_test()
    start = choose_start(config, inputs.class_names)
    sharding = config.sharding
    mesh = make_mesh(sharding.strategy, sharding.fsdp, sharding.model, devices)
    parts = config.optimizer.accumulate
    check_mesh(mesh, config.batch_size, parts, start.model.config.heads)
    check_windows(config.winft, config.batch_size // parts)
    augment = make_augment(config.augment)
    epoch = len(inputs.train) / config.batch_size
    steps = config.steps or math.ceil(config.epochs * epoch)
    schedule = make_schedule(config.schedule, steps, epoch)
    windowing = plan_windows(config, start.model, start.params, steps)
    model, preprocess = windowing.model, start.preprocess
    teacher = load_teacher(config, model, inputs.class_names)
    shapes = param_shapes(model)
    optimizer = make_optimizer(config.optimizer, schedule, shapes, model.config.depth)
    frozen = frozen_leaves(shapes, config.optimizer.freeze)
    keep_compiled(config.compile_cache)

    recipe = Recipe(
        model, optimizer, frozen, augment, on_device(config), preprocess, config.seed, parts,
        config.log_every, config.loss.smoothing, config.loss.kind, config.ema, teacher,
        windowing.guide, windowing.attend, windowing.weight, windowing.sharpness,
    )  # fmt: skip
    teachers = {"classes": teacher and teacher.params, "windows": windowing.teaching}
    teaching = jax.device_put(teachers, replicated(mesh))

    # Where the run stands.
    checkpoints = Checkpoints(workdir, config.checkpoint.keep_last, config.checkpoint.keep_best)
    abstract = abstract_state(model, optimizer, mesh, config.ema > 0, recipe.nothing())
    record = describe(as_json(config), model, preprocess, inputs, steps)
    found = checkpoints.resume(abstract, record["config"], config.on_change)
    if found is None:
        lines = start.lines
        state = create_state(
            model, optimizer, mesh, config.seed, config.ema > 0, windowing.params,
            recipe.nothing(), windowing.prepare,
        )  # fmt: skip
    else:
        state = found
        lines = (f"going on from step {int(state.step)} in {workdir}",)
        checkpoints.drop_after(int(state.step))
    step = first = int(state.step)
    log = Log(workdir, step, config.tensorboard, jax.process_index() == 0)
    lines = (*lines, *frozen_windows(model, frozen))
    for line in (*lines, overview(model, mesh, inputs, config.batch_size, steps)):
        log.say(line)
    eval_step = jax.jit(
        make_eval_step(windowing.judged, preprocess, windowing.attend),
        out_shardings=replicated(mesh),
    )
    val = None if inputs.val is None else EvalFeed(inputs.val, config, mesh, preprocess)
    result: dict[str, Any] = {"step": step, "finished": step >= steps}

    def judge(split: str, feed: EvalFeed, curve: bool = False) -> float:
        now = int(state.step)
        # What was trained by another run keeps the sharpness that it ended with.
        foreign = config.eval_only and found is None
        sharpness = None if foreign else windowing.sharpness_at(now)
        seen = functools.partial(eval_step, sharpness=sharpness, teaching=teaching)
        figures = evaluate(seen, state.best_params, feed.batches())
        last = not curve or now == steps
        write_figures(workdir, split, figures, inputs.class_names, log, now, curve, last)
        result[split] = scalars(figures)
        return float(figures["accuracy"])

    if config.eval_only:
        if found is None and not config.init:
            raise ValueError(f"config.eval_only: {workdir} has no checkpoint, config.init is empty")
        if val is None and test is None:
            raise ValueError("config.eval_only needs config.data.val, .holdout or .test")
        if val is not None:
            judge("val", val)
        if test is not None:
            judge("test", EvalFeed(test, config, mesh, preprocess))
        return result
    if log.writes:
        write_record(workdir, record)
        (workdir / "parameters.txt").write_text(get_parameter_overview(state.params), "utf-8")

    # The programs and what feeds them.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    train_step = jax.jit(
        make_train_step(recipe),
        donate_argnames="state",
        out_shardings=(shardings, replicated(mesh)),
    )
    feed = Feed(inputs.train, config, mesh, model.config.image_size, watch)
    if feed.kept_bytes:
        log.say(f"{feed.kept_bytes / 2**30:.2f} GiB of decoded images kept in memory")
    alongside = None
    shown = EvalFeed(inputs.val or inputs.train, config, mesh, preprocess)
    if config.interactions.every:
        alongside = Alongside.of(config.interactions, model, preprocess, mesh, shown)
    showing = Showing(recipe, mesh, shown) if window_layers(model) else None
    meter = Meter(
        log, model, frozen, schedule, config.batch_size, steps, epoch, mesh.size, checkpoints.newest
    )
    each_epoch = math.ceil(epoch)
    save_every = config.checkpoint.every or each_epoch
    eval_every = config.eval.every or each_epoch
    # Another process may be about to drop later lines.
    known = [line for line in read_lines(log.path) if line["step"] <= step]
    best = max((line.get("val/accuracy", -1.0) for line in known), default=-1.0)
    end = min(steps, config.stop_after or steps)

    log.say(
        f"compiling the first step; MFU is the share of {meter.peak / 1e12:.3g} TFLOP/s, "
        f"{meter.peak_from}"
    )

    # The loop. The log is written one step behind, so that the devices don't wait for it.
    with Interrupt() as interrupt:
        for batch in meter.waiting(feed.batches(range(step, end))):
            if config.profile.first and step == config.profile.first:
                jax.profiler.start_trace(str(workdir / "profile"))
            if alongside is not None and step % config.interactions.every == 0:
                alongside.begin(step, state.params, windowing.sharpness_at(step))
            state, running = train_step(state, batch, feed.store, teaching)
            step += 1
            if step == first + 1:
                jax.block_until_ready(running)
                meter.restart(step)
            meter.report()
            if step % config.log_every == 0 or step == steps:
                meter.note(step, running, alongside)
            if config.profile.first and step == config.profile.first + config.profile.steps:
                jax.block_until_ready(running)
                jax.profiler.stop_trace()
            if showing is not None and (step % each_epoch == 0 or step == steps):
                sharpness = windowing.sharpness_at(step)
                showing.look(step, state.best_params, sharpness, teaching["windows"])
                log.write_images(step, showing.images())
            evaluates = val is not None and (step % eval_every == 0 or step == steps)
            stops = interrupt.asked(step) or step == end
            if not (evaluates or stops or step % save_every == 0):
                continue
            # What is saved must be sound, so the log catches up first.
            meter.report()
            meter.check(running, step)
            accuracy = judge("val", val, curve=True) if evaluates and val is not None else None
            checkpoints.save(state, record, accuracy)
            better = accuracy is not None and accuracy > best
            if config.checkpoint.export == "last" or better or (val is None and stops):
                export(
                    workdir, state, windowing.model_at(step), preprocess, inputs.class_names, mesh
                )
            best = max(best, -1.0 if accuracy is None else accuracy)
            meter.restart(step)
            if stops and step < steps:
                log.say(f"stopped at step {step} of {steps}; run it again to go on")
                break

    # The end, and the test split, which is read once.
    checkpoints.wait()
    result.update(step=step, finished=step >= steps, done=step - first)
    if test is not None and step >= steps:
        chosen = checkpoints.best_step() if config.checkpoint.export == "best" else None
        if chosen is not None and chosen != step:
            state = checkpoints.load(chosen, abstract)
        judge("test", EvalFeed(test, config, mesh, preprocess))
    draw(workdir, log, showing)
    checkpoints.close()
    log.close()
    return result


def _writable(name: str | Path) -> Path:
    if "://" in str(name):
        raise ValueError(f"--workdir {name}: expected a folder on a disk or a mounted bucket")
    workdir = Path(name)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--workdir {workdir}: {error.strerror or error}") from error
    return workdir
