"""Every setting of a training run with its default, and what is checked before anything compiles.

A file in `configs/` starts from `default_config()` and changes what its experiment changes; the
command line changes the rest: `--config.optimizer.name=lion`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vit_interact.models.config import ViTConfig

# Settings that may differ when a run goes on: they change no number that the run computes.
FREE = (
    "log_every", "checkpoint", "data.workers", "data.threads", "data.cache", "data.test",
    "data.corrupt", "eval", "eval_only", "profile", "compile_cache", "tensorboard", "interactions",
    "sharding", "on_change", "stop_after", "winft.hard",
)  # fmt: skip

CHOICES = {
    "data.cache": ("none", "memory", "device"),
    "data.corrupt": ("skip", "error"),
    "augment.where": ("auto", "device", "host"),
    "optimizer.name": ("adamw", "sgd", "lion"),
    "schedule.kind": ("cosine", "linear", "constant"),
    "loss.kind": ("softmax", "sigmoid"),
    "distill.kind": ("soft", "hard"),
    "winft.windows": ("", "predicted", "local", "shifted", "random", "offset", "teacher"),
    "winft.guide": ("", "self", "teacher", "file"),
    "sharding.strategy": ("replicate", "fsdp", "tensor"),
    "checkpoint.export": ("best", "last", "none"),
    "on_change": ("error", "continue"),
}


def default_config() -> ConfigDict:
    """All settings; what each means stands beside it."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256  # images in a step, over all processes and devices
    config.epochs = 10.0  # length of the run, unless `steps` is given
    config.steps = 0
    # What to start from when the workdir holds no checkpoint: "" for random weights, the workdir
    # of another run, or anything that vi.load_model reads.
    config.init = ""
    config.eval_only = False
    config.log_every = 50  # steps
    config.compile_cache = ""  # folder; "" for the user's cache folder, "off" for none
    config.tensorboard = True
    config.on_change = "error"  # or "continue": go on although the config has changed
    config.stop_after = 0  # end this session cleanly at that step; 0 runs to the end

    config.data = ConfigDict()
    config.data.source = ""  # folder, tfds:NAME or .npz; see docs/training.md
    config.data.train = "train"
    config.data.val = ""  # split that choices are made on
    config.data.test = ""  # split that is read once, after training
    config.data.holdout = 0.0  # share of `train` to choose on, when there is no `val`
    config.data.limit = 0  # training images to take, the same for a seed; 0 takes all
    config.data.per_class = 0  # training images of a class to take, after holding out; 0 takes all
    config.data.cache = "none"  # "memory" or "device": decode once, keep as uint8
    config.data.side = 0  # pixels of decoded images when they are augmented on the device
    config.data.workers = -1  # processes that decode; -1: cores - 2
    config.data.threads = 4
    config.data.corrupt = "skip"  # damaged images are counted and named; "error" stops
    # Of evaluation, and all of training's normalisation; () and 0 take the weights' own.
    config.data.mean = ()
    config.data.std = ()
    config.data.crop_pct = 0.0
    config.data.crop = ""  # see data/preprocess.py
    config.data.interpolation = ""

    # Fields of data/augment.py's Augment; where "auto" is the host on a CPU, else the device.
    config.augment = ConfigDict()
    config.augment.where = "auto"
    config.augment.crop = (0.08, 1.0)  # shares of the area; () for none
    config.augment.ratio = (0.75, 4 / 3)
    config.augment.flip = True
    config.augment.pad = 0
    config.augment.rand_augment = 0
    config.augment.magnitude = 9.0
    config.augment.magnitude_std = 0.5
    config.augment.brightness = 0.0
    config.augment.contrast = 0.0
    config.augment.saturation = 0.0
    config.augment.hue = 0.0
    config.augment.erase = 0.0
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0

    config.model = ConfigDict()
    config.model.name = "vit_s16"  # of vi.list_models(); "" takes the architecture of `init`
    config.model.image_size = (224, 224)
    # Any other fields of ViTConfig; None keeps the architecture's own.
    config.model.fields = _fields()
    config.model.dtype = "float32"  # of computation; "bfloat16" on accelerators

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.b1 = 0.9  # adamw, lion
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.momentum = 0.9  # sgd, Nesterov
    config.optimizer.weight_decay = 0.05  # times the learning rate
    # Regular expressions, searched in paths such as Transformer/encoderblock_0/MlpBlock_0/...
    config.optimizer.no_decay = r"(bias|scale|pos_embedding|cls|reg|dist|ls1|ls2|probe)$"
    config.optimizer.freeze = ""
    config.optimizer.clip = 1.0  # global norm of the gradient; 0 for none
    config.optimizer.layer_decay = (
        1.0  # factor of the learning rate from each block to the one below
    )
    config.optimizer.head_rate = 1.0  # factor of the learning rate of the head
    config.optimizer.window_rate = 1.0  # factor for what predicts windows
    config.optimizer.accumulate = 1  # parts that a batch is computed in

    config.schedule = ConfigDict()
    config.schedule.kind = "cosine"
    config.schedule.rate = 1e-3  # peak learning rate
    config.schedule.warmup = 0.0  # epochs of linear rise
    config.schedule.final = 0.0  # learning rate at the end

    config.loss = ConfigDict()
    config.loss.kind = "softmax"
    config.loss.smoothing = 0.0
    config.ema = 0.0  # decay of averaged parameters, which are then evaluated; 0 for none

    config.distill = ConfigDict()
    config.distill.teacher = ""  # anything that vi.load_model reads, of the same classes
    config.distill.kind = "soft"
    config.distill.weight = 0.5  # of the teacher's part of the loss
    config.distill.temperature = 1.0

    # Windows that patches attend within; see train/windows.py.
    config.winft = ConfigDict()
    config.winft.windows = ""  # "" none, "predicted", or one of what that is compared with
    config.winft.layers = ()  # () for all
    config.winft.size = (5, 5)  # patches; of "local", "shifted" and "random" windows
    config.winft.groups = 1  # windows of a patch, for as many groups of heads
    config.winft.reach = 5.0  # patches beyond the grid, before training
    config.winft.start = 3.0  # logit of every distance, before training
    config.winft.sharpness = (1.0, 1.0)  # patches, at the first and the last step; geometric
    # Evaluation attends within whole patches of predicted windows, without the soft border.
    config.winft.hard = False
    # What teaches predicted windows: the model itself, a teacher, a file, or "" for the task only.
    config.winft.guide = "self"
    # Guidance, and the task by way of the windows, change the windows' heads and not the backbone.
    config.winft.detach = False
    config.winft.weight = (1.0, 1.0)  # of the guidance loss at the first and last step; linear
    config.winft.every = 8  # one of so many images of a batch guides
    config.winft.teacher = ""  # anything that vi.load_model reads, of the same depth and grid
    config.winft.file = ""  # a store of vit-interact statistics
    config.winft.indicator = "leave_one_out"
    config.winft.coverage = 0.9

    config.sharding = ConfigDict()
    config.sharding.strategy = "replicate"  # "fsdp", "tensor"
    config.sharding.fsdp = 0  # devices along that axis; 0: all under that strategy, else 1
    config.sharding.model = 0

    config.eval = ConfigDict()
    config.eval.every = 0  # steps; 0: each epoch
    config.eval.batch_size = 0  # 0: that of training

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 0  # steps; 0: each epoch
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_best = 1
    config.checkpoint.export = "best"  # which weights model.safetensors gets at the end

    config.interactions = ConfigDict()
    config.interactions.every = 0  # steps; 0 for never
    config.interactions.indicators = ("attention",)
    config.interactions.images = 16  # the first of evaluation, or of training without one
    config.interactions.coverages = (0.9,)

    config.profile = ConfigDict()
    config.profile.first = 0  # step to begin a trace at; 0 for none
    config.profile.steps = 5
    return config.lock()


def _fields() -> ConfigDict:
    """A place for each field of ViTConfig that has no setting of its own, with its type."""
    fields = ConfigDict()
    for field in dataclasses.fields(ViTConfig):
        if field.name not in ("image_size", "num_classes", "dtype", "windows"):
            kind = float if field.default is None else type(field.default)
            fields[field.name] = placeholder(kind)
    return fields


def check_config(config: ConfigDict) -> None:
    """Refuses what cannot run.

    Raises:
      ValueError: in one line, naming the setting and what it should be.
    """
    # A ConfigDict is no Mapping.
    given = config.to_dict()
    _check_keys(given, default_config().to_dict(), "config")
    for name, known in CHOICES.items():
        if (value := _get(given, name)) not in known:
            raise ValueError(f"config.{name}={value!r}: expected one of {', '.join(known)}")
    for name in ("batch_size", "log_every", "optimizer.accumulate", "checkpoint.keep_last"):
        if _get(given, name) < 1:
            raise ValueError(f"config.{name}={_get(given, name)}: expected at least 1")
    for name in ("loss.smoothing", "ema", "distill.weight", "data.holdout"):
        if not 0 <= _get(given, name) < 1 and not (
            name == "distill.weight" and _get(given, name) == 1
        ):
            raise ValueError(f"config.{name}={_get(given, name)}: expected a share in [0, 1)")
    for name in ("optimizer.layer_decay", "schedule.rate", "distill.temperature"):
        if _get(given, name) <= 0:
            raise ValueError(f"config.{name}={_get(given, name)}: expected more than 0")
    if not config.steps and config.epochs <= 0:
        raise ValueError("config.epochs and config.steps are 0: how long shall it run?")
    if config.batch_size % config.optimizer.accumulate:
        raise ValueError(
            f"config.batch_size={config.batch_size} is not a multiple of "
            f"config.optimizer.accumulate={config.optimizer.accumulate}"
        )
    if config.data.val and config.data.holdout:
        raise ValueError("give config.data.val or config.data.holdout, not both")
    if not config.model.name and not config.init:
        raise ValueError("config.model.name is empty: name one, or give weights in config.init")


def _check_keys(given: Mapping[str, Any], known: Mapping[str, Any], path: str) -> None:
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else ""
            raise ValueError(f"{path}.{name}: no such setting{hint}")
        default = known[name]
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}.{name}={value!r}: expected settings of its own")
            # Fields of ViTConfig are checked by it.
            if name != "fields":
                _check_keys(value, default, f"{path}.{name}")
        elif not _fits(value, default):
            raise ValueError(
                f"{path}.{name}={value!r} is a {type(value).__name__}; expected "
                f"{type(default).__name__}, such as {default!r}"
            )


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple):
        return isinstance(value, tuple | list)
    return isinstance(value, type(default))


def _get(config: Mapping[str, Any], path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it, for files and comparisons."""
    return dict(json.loads(config.to_json_best_effort()))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Settings that differ and matter, as `name: old, now new`."""
    told: list[str] = []
    for name in sorted({*old, *new}):
        place = f"{path}{name}"
        if place in FREE or old.get(name) == new.get(name):
            continue
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            told += differences(before, now, f"{place}.")
        else:
            told.append(f"config.{place}: {before!r}, now {now!r}")
    return told


def completed(old: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An older version's config, and what it lacks by default: new defaults change nothing."""
    known = as_json(default_config()) if known is None else known
    found = {**known, **old}
    for name, default in known.items():
        if isinstance(default, Mapping) and isinstance(old.get(name), Mapping):
            found[name] = completed(old[name], default)
    return found
