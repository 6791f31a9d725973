"""Where weights come from: files, folders, the Hugging Face hub; never a pickle.

`open_source` finds the files and reads names; arrays are read later, and only those asked for, so
that CLIP's text tower is never loaded. What a file is, its first bytes tell, not its suffix.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import pathlib
import shlex
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

EMBEDDED = "vit_s14_caltech101"
INDEX = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


class WeightsError(ValueError):
    """Weights that cannot be loaded; one line says what is wrong and the way out."""


@dataclasses.dataclass(frozen=True)
class RawWeights:
    """Weights before anyone has looked at what their names mean.

    Attributes:
      label: the source as the user wrote it.
      files: the files, in name order.
      where: name of each array to the file that holds it.
      metadata: the safetensors header's own text entries.
      config: `config.json` beside the file, or empty.
      preprocessor: `preprocessor_config.json` beside the file, or empty.
    """

    label: str
    files: tuple[pathlib.Path, ...]
    where: Mapping[str, pathlib.Path]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The named arrays as float32, each file opened once.

        Raises:
          WeightsError: for arrays that are damaged or hold pickled objects.
        """
        by_file: dict[pathlib.Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.where[name], []).append(name)
        arrays = {}
        for path, members in by_file.items():
            reader = _read_npz if _kind(path) == "npz" else _read_safetensors
            arrays.update(reader(path, members))
        return arrays

    def sha256(self) -> str:
        """SHA-256 of the file, or of all files one after the other, in hexadecimal."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def open_source(source: str | pathlib.Path) -> RawWeights:
    """Finds the files of a source and the names in them.

    Args:
      source: a file, a folder, `hf:owner/name` (with `@revision` or without), or the name of the
        embedded weights.

    Raises:
      WeightsError: when there is nothing there that can be read, with the way out.
    """
    label = str(source)
    if label == EMBEDDED:
        path = _embedded()
    elif label.startswith("hf:"):
        path = _download(label)
    else:
        path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise WeightsError(_nothing_there(label))
    if path.is_dir():
        files, folder = _files_of_folder(path), path
    else:
        files, folder = _files_of_index(path) if path.suffix == ".json" else (path,), path.parent
    where: dict[str, pathlib.Path] = {}
    metadata: dict[str, str] = {}
    for file in files:
        names, texts = _header(file)
        where.update(dict.fromkeys(names, file))
        metadata.update(texts)
    # A stray config.json beside an .npz or an embedded file belongs to something else.
    beside = _kind(files[0]) == "safetensors" and label != EMBEDDED
    return RawWeights(
        label=label,
        files=tuple(sorted(files)),
        where=where,
        metadata=metadata,
        config=_json(folder / "config.json") if beside else {},
        preprocessor=_json(folder / "preprocessor_config.json") if beside else {},
    )


def _embedded() -> pathlib.Path:
    from vit_interact.data import samples

    try:
        return pathlib.Path(samples.sample_weights())
    except FileNotFoundError as error:
        raise WeightsError(str(error)) from error


def _nothing_there(label: str) -> str:
    from vit_interact.models.zoo import list_models

    if label in list_models():
        return (
            f"{label!r} names an architecture, not weights: give a file, a folder or hf:owner/name "
            f"with arch={label!r}, or begin with random weights by create_model({label!r})"
        )
    return (
        f"{label}: no such file or folder; weights can be a .npz or .safetensors file, a folder, "
        f"hf:owner/name, or the embedded {EMBEDDED!r}"
    )


def conversion_command(path: pathlib.Path) -> str:
    """The shell command that turns a PyTorch pickle into safetensors, safely.

    `weights_only=True` makes torch refuse anything but tensors.
    """
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"s = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        "s = s.get('state_dict', s.get('model', s)); "
        "save_file({k: v.clone().contiguous() for k, v in s.items() if torch.is_tensor(v)}, "
        f"{str(path.with_suffix('.safetensors'))!r})"
    )
    return f"python -c {shlex.quote(code)}"


def _refuse_pickle(path: pathlib.Path) -> WeightsError:
    return WeightsError(
        f"{path} is a pickle, which can run any code when it is read, and is not loaded; "
        f"convert it where PyTorch is installed: {conversion_command(path)}"
    )


def _kind(path: pathlib.Path) -> Literal["npz", "safetensors"]:
    """What a file is by its content.

    Raises:
      WeightsError: for pickles, Git LFS pointers, empty files and everything else.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise WeightsError(f"{path} is empty; download it again")
    if head.startswith(b"PK"):
        try:
            members = zipfile.ZipFile(path).namelist()
        except zipfile.BadZipFile:
            members = []
        if any(name.endswith("data.pkl") for name in members):
            raise _refuse_pickle(path)
        if members and all(name.endswith(".npy") for name in members):
            return "npz"
        if path.suffix in _PICKLE_SUFFIXES:
            raise _refuse_pickle(path)
        what = "holds other files than arrays" if members else "is damaged or cut short"
        raise WeightsError(f"{path} is a zip archive that {what}; download it again")
    # Protocol 2 and later start with 0x80 and the protocol's number; a safetensors header that
    # started so would announce its length as more than it can be, but byte 8 decides.
    opens_header = head[8:9] == b"{"
    if not opens_header and ((head[0] == 0x80 and head[1] <= 5) or path.suffix in _PICKLE_SUFFIXES):
        raise _refuse_pickle(path)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
    if not opens_header:
        raise WeightsError(
            f"{path} is not a weights file: it is neither .npz nor .safetensors inside"
        )
    return "safetensors"


def _header(path: pathlib.Path) -> tuple[list[str], dict[str, str]]:
    """Names of the arrays in a file and its metadata."""
    if _kind(path) == "npz":
        with np.load(path, allow_pickle=False) as file:
            return file.files, {}
    with _safetensors(path) as file:
        return list(file.keys()), file.metadata() or {}


def _safetensors(path: pathlib.Path) -> Any:
    import safetensors

    # NumPy knows the name bfloat16 once this has been imported.
    importlib.import_module("ml_dtypes")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path} is damaged or cut short ({error}); download it again"
        ) from error


def _read_safetensors(path: pathlib.Path, names: list[str]) -> dict[str, np.ndarray]:
    with _safetensors(path) as file:
        return {name: np.asarray(file.get_tensor(name), np.float32) for name in names}


def _read_npz(path: pathlib.Path, names: list[str]) -> dict[str, np.ndarray]:
    arrays = {}
    with np.load(path, allow_pickle=False) as file:
        for name in names:
            try:
                array = file[name]
                # big_vision stores bfloat16 as two raw bytes.
                if array.dtype == np.dtype("V2"):
                    array = array.view(importlib.import_module("ml_dtypes").bfloat16)
                arrays[name] = array.astype(np.float32)
            except ValueError as error:
                if "pickle" not in str(error):
                    raise WeightsError(f"{path}: {name} is no array of numbers") from error
                raise WeightsError(
                    f"{path}: {name} holds pickled objects, which can run any code when they are "
                    "read, and is not loaded; save plain arrays with np.savez(path, **arrays)"
                ) from error
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise WeightsError(
                    f"{path} is damaged: {name} cannot be read ({error}); download it again"
                ) from error
    return arrays


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return value


def _files_of_folder(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    if (folder / INDEX).is_file():
        return _files_of_index(folder / INDEX)
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.npz")])
    if len(found) == 1:
        return (found[0],)
    if found:
        names = ", ".join(path.name for path in found)
        raise WeightsError(f"{folder} holds several weights files ({names}); name the one to load")
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise _refuse_pickle(pickles[0])
    raise WeightsError(f"{folder} holds no .safetensors and no .npz file")


def _files_of_index(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise WeightsError(f"{index} is no index of shards: it has no weight_map")
    files = sorted({index.parent / pathlib.PurePath(str(name)).name for name in shards.values()})
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise WeightsError(f"{index} names shards that are not beside it: {', '.join(missing)}")
    return tuple(files)


def _download(label: str) -> pathlib.Path:
    """Fetches a repository's weights and configs, from the cache when they are there."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise WeightsError(
            f"{label} needs huggingface_hub: pip install 'vit-interact[hub]'"
        ) from error
    repository, _, revision = label.removeprefix("hf:").partition("@")
    unreachable: Exception | None = None

    def fetch(name: str) -> pathlib.Path | None:
        nonlocal unreachable
        try:
            # Where the network failed once, only the cache is asked: each try takes long.
            return pathlib.Path(
                hub.hf_hub_download(
                    repository,
                    name,
                    revision=revision or None,
                    local_files_only=unreachable is not None,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            unreachable = error
        except errors.EntryNotFoundError:
            pass
        except errors.RevisionNotFoundError as error:
            raise WeightsError(f"{label}: the repository has no revision {revision!r}") from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise WeightsError(
                f"{label}: no such repository, or it is private or gated; log in with "
                "`hf auth login`"
            ) from error
        except OSError as error:
            unreachable = error
        return None

    found = fetch("model.safetensors")
    if found is None and (index := fetch(INDEX)):
        shards = sorted(set(_json(index).get("weight_map", {}).values()))
        found = index if all([fetch(str(shard)) for shard in shards]) else None
    if found is None and unreachable is not None:
        raise WeightsError(
            f"{label} is not in the cache and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set); download it once where there is a network with "
            f"`hf download {repository}` and give the folder"
        ) from unreachable
    if found is None:
        raise WeightsError(f"{label} has no model.safetensors; convert its weights first")
    fetch("config.json")
    fetch("preprocessor_config.json")
    return found.parent
