"""Checkpoints of one model: found as files, folders of steps or by name; read; held against it."""

from __future__ import annotations

import copy
import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distsampler.errors import ConfigError

Weights = Mapping[str, Tensor] | nn.Module
Load = Callable[[str], Weights]
Source = Weights | str | Path
Sources = str | Path | Sequence[str | Path] | Mapping[str, Source] | None
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
IN_FOLDER = ("model.safetensors", "pytorch_model.bin", "model.pt")  # of a step, by preference
WRAPPED = ("state_dict", "model_state_dict", "model")  # where a training loop may put it
SHOWN = 5  # keys in an error


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights of one checkpoint come from.

    Args:
        name: its label.
        source: a file, the weights themselves, or, for ``load``, a name.
        load: reads what the source names; None: it is a file or the weights.
    """

    name: str
    source: Source | None
    load: Load | None = None

    @property
    def step(self) -> int | None:
        """The number that its name ends in."""
        found = re.search(r"(\d+)$", self.name)
        return int(found[1]) if found else None


def find(given: Sources, load: Load | None = None, folder: Path = Path()) -> list[Checkpoint]:
    """The checkpoints that are meant, in their order.

    Args:
        given: a file; a glob; a folder of files, or of folders of steps (``step1000``,
            ``checkpoint-500``) that hold ``model.safetensors`` or ``pytorch_model.bin``; a list of
            those; a mapping from names to files, state dicts or models; None: the model as it is.
            What a folder or a glob gives is sorted by the number that each name ends in.
        load: what reads a name of a list or mapping; then nothing is looked for.
        folder: that paths start from.

    Raises:
        ConfigError: if there is no such file, or a folder holds none.
    """
    if given is None:
        return [Checkpoint("model", None)]
    if isinstance(given, Mapping):
        return [_of(name, source, load, folder) for name, source in given.items()]
    listed = [given] if isinstance(given, str | Path) else list(given)
    if load is not None:
        return [Checkpoint(str(name), str(name), load) for name in listed]
    return [Checkpoint(_label(path), path) for name in listed for path in _files(name, folder)]


def check(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Sees that a checkpoint is one of the model; what only ``load`` knows is seen when it is read.

    Raises:
        ConfigError: names the keys that are missing or unexpected, and the shapes that differ.
    """
    if checkpoint.load is None and checkpoint.source is not None:
        source = checkpoint.source
        weights = _read(source, "meta") if isinstance(source, str | Path) else source
        _compare(model, weights, checkpoint.name)


def loaded(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """A copy of the model, with the weights of a checkpoint.

    Raises:
        ConfigError: as ``check``, or if it cannot be read.
    """
    weights = _weights(checkpoint)
    if weights is None:
        return model
    _compare(model, weights, checkpoint.name)
    if isinstance(weights, nn.Module):
        return weights
    filled = copy.deepcopy(model)
    filled.load_state_dict(weights, strict=False)
    return filled


def _of(name: str, source: Source, load: Load | None, folder: Path) -> Checkpoint:
    if load is not None:
        return Checkpoint(name, source, load)
    if not isinstance(source, str | Path):
        return Checkpoint(name, source)
    found = _files(source, folder)
    if len(found) != 1:
        raise ConfigError(f"checkpoint {name!r} must be one file, got {len(found)}: {source}")
    return Checkpoint(name, found[0])


def _files(given: str | Path, folder: Path) -> list[Path]:
    """The files that a path, a folder or a glob means."""
    path = folder / Path(given).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_folder(path)
    if glob.has_magic(str(given)):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)), key=_order)
        if found:
            return [file for each in found for file in _files(each, Path())]
    raise ConfigError(
        f"a checkpoint must be a file or folder that exists, or a glob: got {given}, and there is "
        f"no {path}"
    )


def _in_folder(path: Path) -> list[Path]:
    """The weights of a step; or the files, else the steps, of a folder."""
    for name in IN_FOLDER:
        if (path / name).is_file():
            return [path / name]
    files = [each for each in path.iterdir() if each.suffix in SUFFIXES and each.is_file()]
    steps = [each for each in path.iterdir() if any((each / name).is_file() for name in IN_FOLDER)]
    found = files or [_in_folder(each)[0] for each in steps]
    if not found:
        raise ConfigError(
            f"a folder of checkpoints must hold files ({', '.join(SUFFIXES)}), or folders with one "
            f"of {', '.join(IN_FOLDER)} each; {path} holds none (weights in several pieces: give "
            "load)"
        )
    return sorted(found, key=_order)


def _label(path: Path) -> str:
    """A file's name without its ending; of a step's weights, the folder's name."""
    return path.parent.name if path.name in IN_FOLDER else path.stem


def _order(path: Path) -> tuple[int, str]:
    return Checkpoint(_label(path), None).step or 0, str(path)


def _weights(checkpoint: Checkpoint) -> Weights | None:
    source = checkpoint.source
    if checkpoint.load is not None:
        try:
            return checkpoint.load(source)  # type: ignore[arg-type]  # what it was given as a name
        except Exception as error:  # the user's code: anything can come
            raise ConfigError(
                f"checkpoint {checkpoint.name!r}: load({source!r}) raised "
                f"{type(error).__name__}: {error}"
            ) from error
    return _read(source, "cpu") if isinstance(source, str | Path) else source


def _read(path: str | Path, device: str) -> Mapping[str, Tensor]:
    """A state dict from a file; on device "meta" only its names and shapes."""
    how = "give load, a function from a name to a state dict"
    try:
        found = _safe(Path(path)) if Path(path).suffix == ".safetensors" else _torch(path, device)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file gives any error
        raise ConfigError(
            f"checkpoint {path} must be a state dict that torch.load(weights_only=True) reads, and "
            f"it gave {type(error).__name__}: {str(error).splitlines()[0]}; {how}"
        ) from error
    for key in WRAPPED:
        if isinstance(found, dict) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(map(torch.is_tensor, found.values())):
        raise ConfigError(f"checkpoint {path} must hold a state dict, and does not: {how}")
    return found


def _torch(path: str | Path, device: str) -> Any:  # noqa: ANN401 (whatever was saved)
    return torch.load(path, map_location=device, weights_only=True)


def _safe(path: Path) -> Mapping[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ConfigError(
            f"checkpoint {path} needs the package safetensors: install it, or give load"
        ) from None
    return load_file(path)  # type: ignore[no-any-return]  # the package may be absent


def _compare(model: nn.Module, weights: object, name: str) -> None:
    """Sees that weights have the keys and shapes of a model."""
    own = model.state_dict()
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if not isinstance(weights, Mapping):
        raise ConfigError(
            f"checkpoint {name!r} must be a state dict or a module, got {type(weights).__name__}"
        )
    shared = {own[key].data_ptr() for key in own if key in weights}
    missing = [k for k in own if k not in weights and own[k].data_ptr() not in shared]  # tied: not
    unexpected = [key for key in weights if key not in own]
    shapes = [
        f"{key}: {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    parts = {"missing keys": missing, "unexpected keys": unexpected, "other shapes": shapes}
    told = [f"{what}: {_first(keys)}" for what, keys in parts.items() if keys]
    if told:
        raise ConfigError(
            f"checkpoint {name!r} must have the architecture of the model, {type(model).__name__}, "
            f"and does not; {'; '.join(told)}"
        )


def _first(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
