"""Checkpoints of one model: files, folders of steps, revisions on the Hub; read and checked."""

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
from distsampler.sweeps import hub
from distsampler.sweeps.hub import INDEX, Revision
from distsampler.sweeps.keys import fitted

CheckpointWeights = Mapping[str, Tensor] | nn.Module
Load = Callable[[str], CheckpointWeights]
CheckpointSource = CheckpointWeights | str | Path | Revision
Sources = str | Path | Sequence[str | Path] | Mapping[str, CheckpointSource] | None
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
IN_FOLDER = (*hub.FILES, "model.pt")  # of a step, by preference
WRAPPED = ("state_dict", "model_state_dict", "model")  # where a training loop may put it


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights of one checkpoint come from."""

    name: str  # its label
    # a file, a revision, the weights themselves, or, for ``load``, a name; None: the model's own
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
            ``checkpoint-500``) that hold ``model.safetensors`` or ``pytorch_model.bin``, or the
            index of their parts; ``owner/repo@revision`` on the Hugging Face Hub, where that is no
            file here; a list of those; a mapping from names to files, revisions, state dicts or
            models; None: the model as it is. What a folder or a glob gives is sorted by the number
            that each name ends in.
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
    return [each for name in listed for each in _meant(name, folder)]


def check(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint fits the model; what ``load`` gives is checked when it is read.

    Raises:
        ConfigError: names the keys that are missing or unexpected, and the shapes that differ.
    """
    weights = None if checkpoint.load else _weights(checkpoint, "meta")
    if weights is not None:
        fitted(model, weights, checkpoint.name)


def loaded(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Return a copy of the model with the weights of a checkpoint.

    Raises:
        ConfigError: as ``check``, or if it cannot be read.
    """
    weights = _weights(checkpoint, "cpu")
    if weights is None:
        return model
    weights = fitted(model, weights, checkpoint.name)
    if isinstance(weights, nn.Module):
        return weights
    filled = copied(model)
    filled.load_state_dict(weights, strict=False)
    return filled


def _named(name: str, source: CheckpointSource, load: Load | None, folder: Path) -> Checkpoint:
    if load is not None or not isinstance(source, str | Path):
        return Checkpoint(name, source, load)
    each = _meant(source, folder)
    if len(each) != 1:
        raise ConfigError(f"checkpoint {name!r} must be one file, got {len(each)}: {source}")
    return Checkpoint(name, each[0].source)


def _meant(source: str | Path, folder: Path) -> list[Checkpoint]:
    """The checkpoints that a path, a folder, a glob or a name on the Hub means."""
    revision = Revision.of(str(source))
    if revision is not None and not (folder / source).exists():
        return [Checkpoint(revision.label, revision)]
    return [Checkpoint(_label(path), path) for path in _files(source, folder)]


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
        "a checkpoint must be a file or folder that exists, a glob, or owner/repo@revision on the "
        f"Hugging Face Hub: got {source}, and there is no {path}"
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
            f"of {', '.join(IN_FOLDER)} each; {path} holds none"
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
        if isinstance(source, Revision):
            source = source.file()
        return _read(Path(source), device) if isinstance(source, str | Path) else source
    try:
        return checkpoint.load(source)  # type: ignore[arg-type]  # what it was given as a name
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            f"checkpoint {checkpoint.name!r}: load({source!r}) raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _read(path: Path, device: str) -> Mapping[str, Tensor]:
    """A state dict from a file, or from those that an index names."""
    if path.name.endswith(INDEX):
        return {key: w for part in hub.parts(path) for key, w in _read(part, device).items()}
    advice = "give load, a function from a name to a state dict"
    content: Any  # whatever the file holds
    try:
        if path.suffix == ".safetensors":
            content = _read_safetensors(path, device)
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


def _read_safetensors(path: Path, device: str) -> dict[str, Tensor]:
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file
    except ImportError:
        raise ConfigError(
            f"checkpoint {path} needs the package safetensors: install it, or give load"
        ) from None
    if device != "meta":
        return dict(load_file(path))
    with safe_open(path, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (no mapping)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
