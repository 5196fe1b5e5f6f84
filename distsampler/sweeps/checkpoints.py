"""Checkpoints of one model: looked up as files, folders of steps or by name; read; checked."""

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distsampler.errors import ConfigError
from distsampler.models.copies import copied

CheckpointWeights = Mapping[str, Tensor] | nn.Module
Load = Callable[[str], CheckpointWeights]
CheckpointSource = CheckpointWeights | str | Path
Sources = str | Path | Sequence[str | Path] | Mapping[str, CheckpointSource] | None
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
IN_FOLDER = ("model.safetensors", "pytorch_model.bin", "model.pt")  # of a step, by preference
WRAPPED = ("state_dict", "model_state_dict", "model")  # where a training loop may put it
SHOWN = 5  # keys in an error


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights of one checkpoint come from."""

    name: str  # its label
    # a file, the weights themselves, or, for ``load``, a name; None: the model's own
    source: CheckpointSource | None
    load: Load | None = None  # reads what the source names; None: it is a file or the weights

    @property
    def step(self) -> int | None:
        """The number that the name ends in."""
        digits = re.search(r"\d+$", self.name)
        return int(digits[0]) if digits else None


def find(sources: Sources, load: Load | None = None, folder: Path = Path()) -> list[Checkpoint]:
    """Return the checkpoints that are meant, in their order.

    Args:
        sources: a file; a glob; a folder of files, or of folders of steps (``step1000``,
            ``checkpoint-500``) that hold ``model.safetensors`` or ``pytorch_model.bin``; a list of
            those; a mapping from names to files, state dicts or models; None: the model as it is.
            What a folder or a glob gives is sorted by the number that each name ends in.
        load: reads the weights by each name of a list or mapping; no file is looked up then.
        folder: where relative paths start.

    Raises:
        ConfigError: if there is no such file, or a folder holds none.
    """
    if sources is None:
        return [Checkpoint("model", None)]
    if isinstance(sources, Mapping):
        return [_named(name, source, load, folder) for name, source in sources.items()]
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    if load is not None:
        return [Checkpoint(str(name), str(name), load) for name in listed]
    return [Checkpoint(_label(path), path) for name in listed for path in _files(name, folder)]


def check(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint fits the model; what ``load`` gives is checked when it is read.

    Raises:
        ConfigError: names the keys that are missing or unexpected, and the shapes that differ.
    """
    weights = None if checkpoint.load else _weights(checkpoint, "meta")
    if weights is not None:
        _check_fit(model, weights, checkpoint.name)


def loaded(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Return a copy of the model with the weights of a checkpoint.

    Raises:
        ConfigError: as ``check``, or if it cannot be read.
    """
    weights = _weights(checkpoint, "cpu")
    if weights is None:
        return model
    _check_fit(model, weights, checkpoint.name)
    if isinstance(weights, nn.Module):
        return weights
    filled = copied(model)
    filled.load_state_dict(weights, strict=False)
    return filled


def _named(name: str, source: CheckpointSource, load: Load | None, folder: Path) -> Checkpoint:
    if load is not None or not isinstance(source, str | Path):
        return Checkpoint(name, source, load)
    files = _files(source, folder)
    if len(files) != 1:
        raise ConfigError(f"checkpoint {name!r} must be one file, got {len(files)}: {source}")
    return Checkpoint(name, files[0])


def _files(source: str | Path, folder: Path) -> list[Path]:
    """The files that a path, a folder or a glob means."""
    path = folder / Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_folder(path)
    if glob.has_magic(str(source)):
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)), key=_order)
        if matches:
            return [file for match in matches for file in _files(match, Path())]
    raise ConfigError(
        f"a checkpoint must be a file or folder that exists, or a glob: got {source}, and there is "
        f"no {path}"
    )


def _in_folder(path: Path) -> list[Path]:
    """The weights of a step; or the files, else the steps, of a folder."""
    for name in IN_FOLDER:
        if (path / name).is_file():
            return [path / name]
    files = [each for each in path.iterdir() if each.suffix in SUFFIXES and each.is_file()]
    steps = [each for each in path.iterdir() if any((each / name).is_file() for name in IN_FOLDER)]
    if not files and not steps:
        raise ConfigError(
            f"a folder of checkpoints must hold files ({', '.join(SUFFIXES)}), or folders with one "
            f"of {', '.join(IN_FOLDER)} each; {path} holds none (weights in several pieces: give "
            "load)"
        )
    return sorted(files or [_in_folder(step)[0] for step in steps], key=_order)


def _label(path: Path) -> str:
    """A file's name without its ending; for the weights of a step, the folder's name."""
    return path.parent.name if path.name in IN_FOLDER else path.stem


def _order(path: Path) -> tuple[int, str]:
    return Checkpoint(_label(path), None).step or 0, str(path)


def _weights(checkpoint: Checkpoint, device: str) -> CheckpointWeights | None:
    """What a checkpoint holds, if anything; of a file on device "meta" only names and shapes."""
    source = checkpoint.source
    if checkpoint.load is None:
        return _read(Path(source), device) if isinstance(source, str | Path) else source
    try:
        return checkpoint.load(source)  # type: ignore[arg-type]  # what it was given as a name
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            f"checkpoint {checkpoint.name!r}: load({source!r}) raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _read(path: Path, device: str) -> Mapping[str, Tensor]:
    """A state dict from a file."""
    advice = "give load, a function from a name to a state dict"
    try:
        if path.suffix == ".safetensors":
            content = _read_safetensors(path)
        else:
            content = torch.load(path, map_location=device, weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file gives any error
        raise ConfigError(
            f"checkpoint {path} must be a state dict that torch.load(weights_only=True) reads, and "
            f"it gave {type(error).__name__}: {str(error).splitlines()[0]}; {advice}"
        ) from error
    for key in WRAPPED:
        if isinstance(content, dict) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
        raise ConfigError(f"checkpoint {path} must hold a state dict, and does not: {advice}")
    return content


def _read_safetensors(path: Path) -> Any:  # noqa: ANN401 (the package may be absent)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ConfigError(
            f"checkpoint {path} needs the package safetensors: install it, or give load"
        ) from None
    return load_file(path)


def _check_fit(model: nn.Module, weights: object, name: str) -> None:
    """Check that weights have the keys and shapes of a model."""
    own = model.state_dict()
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if not isinstance(weights, Mapping):
        raise ConfigError(
            f"checkpoint {name!r} must be a state dict or a module, got {type(weights).__name__}"
        )
    shared = {own[key].data_ptr() for key in own if key in weights}
    differences = {
        "missing keys": [  # one of several tied weights is enough
            key for key in own if key not in weights and own[key].data_ptr() not in shared
        ],
        "unexpected keys": [key for key in weights if key not in own],
        "other shapes": [
            f"{key}: {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in weights and weights[key].shape != own[key].shape
        ],
    }
    lines = [f"{what}: {_shortened(keys)}" for what, keys in differences.items() if keys]
    if lines:
        raise ConfigError(
            f"checkpoint {name!r} must have the architecture of the model, {type(model).__name__}, "
            f"and does not; {'; '.join(lines)}"
        )


def _shortened(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
