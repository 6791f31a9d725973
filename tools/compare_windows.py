"""Trains every arm of the window comparison with several seeds, and makes its table.

Each run is a run of `vit_interact.train` in a folder of its own: finished ones are kept, a killed
one goes on. Runs that fail are listed and do not stop the others. A table made before, perhaps on
another machine, can be gone on with: all its runs stay in the new one. What an arm gains over `vit`
is given with its 95 % interval by Student's t over the seeds that both have, paired: a seed draws
the same images for all arms.

Examples:
  python tools/compare_windows.py --data /data/cifar10 --out runs --arms vit,local,winft --seeds 0
  python tools/compare_windows.py --data /data/cifar10 --out runs --jobs 2
  python tools/compare_windows.py --data /data/cifar10 --out more --known runs/table.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import platform
import queue
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TAUGHT = ("offset", "teacher", "taught")


def main() -> None:
    """Runs what is not done and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(name: str, words: str, **more: Any) -> None:
        shown = words if more.get("required") else f"{words}; default: %(default)s"
        parser.add_argument(name, help=shown, **more)

    option(
        "--config", "without an arm; its ARMS can be run", default="configs/winft_cifar10_cpu.py"
    )
    option("--data", "as config.data.source", required=True)
    option("--out", "folder of the runs and the table", type=Path, required=True)
    option("--arms", "some of the config's", default="all")
    option("--seeds", "of each arm", type=_seeds, default="0,1,2")
    option("--jobs", "runs at a time, each on its own cores", type=_count, default=1)
    parser.add_argument("--known", help="a table of the same config and settings", type=Path)
    parser.add_argument("--test", action="store_true", help="read the test split, at the very end")
    parser.add_argument("settings", nargs="*", help="further settings, such as epochs=3")
    arguments = parser.parse_intermixed_args()
    seeds = arguments.seeds
    try:
        every_arm = _arms_of(arguments.config)
        arms = list(every_arm) if arguments.arms == "all" else arguments.arms.split(",")
        if unknown := sorted(set(arms) - set(every_arm)):
            raise ValueError(f"--arms {', '.join(unknown)}: there are {', '.join(every_arm)}")
        known = _runs_of("--known", arguments.known, arguments)
        own = arguments.out / "table.json"
        _runs_of("--out", own if own.exists() else None, arguments)  # it is about to be replaced
    except ValueError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)

    cores: queue.Queue[set[int]] = queue.Queue()
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(arguments.jobs):
        cores.put(set(mine[job :: arguments.jobs]))

    # Teachers first: others wait for theirs.
    order = sorted(
        ((arm, seed) for seed in seeds for arm in arms if (arm, seed) not in known),
        key=lambda run: run[0] in TAUGHT,
    )
    failed: dict[str, str] = {}
    done = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for taught in (False, True):
            runs = [run for run in order if (run[0] in TAUGHT) == taught]
            futures = {pool.submit(_run, arguments, *run, cores): run for run in runs}
            try:
                for future in concurrent.futures.as_completed(futures):
                    arm, seed = futures[future]
                    done += 1
                    error = future.result()
                    if error:
                        failed[f"{arm}_{seed}"] = error
                    print(f"{done}/{len(order)} {arm}_{seed}: {error or 'done'}", flush=True)
            except KeyboardInterrupt:
                # The terminal tells the runs, too; those that wait would begin when these end.
                pool.shutdown(wait=False, cancel_futures=True)
                print("stopped; the same command goes on", file=sys.stderr)
                raise SystemExit(130) from None
    table = _table(arguments, every_arm, arms, seeds, failed, known)
    (arguments.out / "table.json").write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    _print(table)
    if table["arms"]:
        _draw(table, arguments.out)
    raise SystemExit(1 if failed else 0)


def _seeds(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers such as 0,1,2") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more")
    return int(text)


def _arms_of(path: str) -> tuple[str, ...]:
    """What a config can be given after a colon.

    Raises:
      ValueError: when it is not there or takes nothing.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: there is no such file")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it, which runs the config
    arms = runpy.run_path(path).get("ARMS")
    if not arms:
        raise ValueError(f"--config {path}: has no ARMS; configs/winft_cifar10_cpu.py has some")
    return tuple(arms)


def _runs_of(
    option: str, path: Path | None, arguments: Any
) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs of an earlier table by arm and seed.

    Raises:
      ValueError: when it cannot be read, or its runs are of other settings.
    """
    if path is None:
        return {}
    try:
        table = json.loads(path.read_text("utf-8"))
        runs = {
            (arm, int(seed)): run
            for arm, row in table["arms"].items()
            for seed, run in row["runs"].items()
        }
        made = table["config"], sorted(table["settings"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{option} {path}: is no table.json of this tool ({error!r})") from error
    if made != (arguments.config, sorted(arguments.settings)):
        raise ValueError(
            f"{option} {path} is of --config {' '.join([made[0], *made[1]])}: "
            "give the same settings" + (" or another folder" if option == "--out" else "")
        )
    if (
        option == "--known"
        and arguments.test
        and (unread := [run for run, row in runs.items() if row["test"] is None])
    ):
        raise ValueError(f"--known {path} has no test accuracy of {unread[0][0]}_{unread[0][1]}")
    return runs


def _run(arguments: Any, arm: str, seed: int, cores: queue.Queue[set[int]]) -> str:
    """One run; returns what went wrong."""
    folder = arguments.out / f"{arm}_{seed}"
    settings = [f"data.source={arguments.data}", f"seed={seed}", *arguments.settings]
    if not arguments.test:
        settings.append("data.test=")
    teacher = arguments.out / f"vit_{seed}"
    mine = cores.get()
    try:
        if arm in TAUGHT and not (teacher / "model.safetensors").exists():
            return f"its teacher {teacher} is not there"
        if arm in ("teacher", "taught"):
            settings.append(f"winft.teacher={teacher}")
        if arm == "offset":
            store = arguments.out / f"vit_{seed}.zarr"
            settings.append(f"winft.file={store}")
            survey = [
                "-m", "vit_interact.cli", "statistics", "--model", str(teacher),
                "--data", f"{arguments.data}/train", "--limit", "1000",
                "--indicators", "leave_one_out", "--out", str(store),
            ]  # fmt: skip
            if store.exists():
                survey.append("--resume")
            if error := _call(survey, folder, mine):
                return error
        command = ["-m", "vit_interact.train", f"--config={arguments.config}:{arm}"]
        command += [f"--workdir={folder}", *(f"--config.{setting}" for setting in settings)]
        if error := _call(command, folder, mine):
            return error
        # The trainer saves and ends well when it is told to stop.
        return "" if (folder / "val.json").exists() else "stopped before its end: run it again"
    finally:
        cores.put(mine)


def _call(command: list[str], folder: Path, cores: set[int]) -> str:
    folder.mkdir(parents=True, exist_ok=True)

    def pin() -> None:
        if cores:
            os.sched_setaffinity(0, cores)

    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(
            [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, preexec_fn=pin
        ).returncode
    last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
    return f"exit {code}: {' '.join(last)}" if code else ""


def _table(
    arguments: Any,
    every_arm: tuple[str, ...],
    arms: list[str],
    seeds: list[int],
    failed: dict[str, str],
    known: dict[tuple[str, int], dict[str, Any]],
) -> dict[str, Any]:
    import jax

    rows: dict[str, Any] = {}
    others = {arm for arm, _ in known}
    for arm in [arm for arm in every_arm if arm in arms or arm in others]:
        runs = {seed: run for (own, seed), run in sorted(known.items()) if own == arm}
        for seed in seeds if arm in arms else ():
            if seed not in runs and f"{arm}_{seed}" not in failed:
                runs[seed] = _figures(arguments.out / f"{arm}_{seed}")
        if runs:
            rows[arm] = {"runs": runs, **_pooled(list(runs.values()))}
    plain = rows.get("vit", {}).get("runs", {})
    for arm, row in rows.items():
        if arm != "vit":
            row["gain"] = {name: _gain(row["runs"], plain, name) for name in ("val", "test")}
    return {
        "command": " ".join(["python", *sys.argv]),
        "config": arguments.config,
        "settings": arguments.settings,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"{arguments.jobs} runs at a time",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "arms": rows,
        "failed": failed,
    }


def _figures(folder: Path) -> dict[str, Any]:
    """What one run gave: held-out accuracy by epoch, and the rest at the last step."""
    from vit_interact.models.config import ViTConfig
    from vit_interact.train.speed import forward_flops

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train/loss" in line]
    held = [line for line in lines if "val/accuracy" in line]
    epoch = train[-1]["train/epoch"] / train[-1]["step"]
    config = ViTConfig.from_dict(json.loads((folder / "experiment.json").read_text())["model"])
    rates = [line["speed/images_per_s"] for line in train if "speed/images_per_s" in line]
    test = folder / "test.json"
    return {
        "val": held[-1]["val/accuracy"],
        "val_by_epoch": [(epoch * line["step"], line["val/accuracy"]) for line in held],
        "test": json.loads(test.read_text())["accuracy"] if test.exists() else None,
        "train_loss": train[-1]["train/loss"],
        "parameters": config.count_parameters(),
        "forward_gflops": forward_flops(config) / 1e9,
        "images_per_s": statistics.median(rates) if rates else None,
        **{key: value for key, value in train[-1].items() if key.startswith("windows/")},
    }


def _pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name in ("val", "test"):
        values = [run[name] for run in runs if run[name] is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            found[name] = {"mean": statistics.mean(values), "deviation": spread}
    return found


def _gain(
    runs: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]], name: str
) -> dict[str, Any] | None:
    """Mean difference over the seeds that both have, and its 95 % interval from two seeds on."""
    from scipy.stats import t

    seeds = [
        seed for seed in runs
        if seed in plain and runs[seed][name] is not None and plain[seed][name] is not None
    ]  # fmt: skip
    if not seeds:
        return None
    each = [runs[seed][name] - plain[seed][name] for seed in seeds]
    mean, interval = statistics.mean(each), None
    if len(each) > 1:
        half = t.ppf(0.975, len(each) - 1) * statistics.stdev(each) / len(each) ** 0.5
        interval = (mean - half, mean + half)
    return {"seeds": seeds, "mean": mean, "interval": interval}


def _draw(table: dict[str, Any], folder: Path) -> None:
    from vit_interact.viz.png import save
    from vit_interact.viz.training import draw_arms, draw_window_areas

    runs = {arm: list(row["runs"].values()) for arm, row in table["arms"].items()}
    save(draw_arms({arm: [r["val_by_epoch"] for r in own] for arm, own in runs.items()}),
         folder / "curves.png")  # fmt: skip
    areas = {arm: found for arm, own in runs.items() if all(found := [_areas(r) for r in own])}
    if areas:
        save(draw_window_areas(areas), folder / "areas.png")


def _areas(run: dict[str, Any]) -> list[tuple[int, float]]:
    """Area of predicted windows by layer; nothing for other windows."""
    head = "windows/area/layer_"
    return [(int(key.removeprefix(head)), run[key]) for key in sorted(run) if key.startswith(head)]


def _print(table: dict[str, Any]) -> None:
    print(f"{'arm':12} {'runs':>4} {'held-out':>16} {'over vit':>26} {'area':>6} {'images/s':>9}")
    for arm, row in table["arms"].items():
        val, runs = row["val"], list(row["runs"].values())
        spread = "" if val["deviation"] is None else f" ± {val['deviation']:.2%}"
        gain = ""
        if found := row.get("gain", {}).get("val"):
            gain = f"{found['mean']:+.2%}"
            if found["interval"]:
                gain += " ({:+.2%} to {:+.2%})".format(*found["interval"])
        area = runs[0].get("windows/area")
        area = "" if area is None else f"{area:.0%}"
        speed = runs[0]["images_per_s"] or 0
        held_out = f"{val['mean']:9.2%}{spread:>7}"
        print(f"{arm:12} {len(runs):4} {held_out} {gain:>26} {area:>6} {speed:9.1f}")
    for run, error in table["failed"].items():
        print(f"failed: {run}: {error}")


if __name__ == "__main__":
    main()
