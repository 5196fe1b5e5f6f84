"""Checkpoints on the Hugging Face Hub: ``owner/repo@revision``, kept in the cache of the node.

Nothing is stored here: the files lie in the cache of ``huggingface_hub`` (``HF_HOME``), whose locks
let one process download a file while others wait for it. A private repository is read with the
token that ``HF_TOKEN`` or ``hf auth login`` gives.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from distsampler.errors import ConfigError

FILES = (  # that hold the weights of a revision, by preference; the last two name their parts
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX = ".index.json"  # ending of a file that names the parts of weights in several pieces
_NAME = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)")
_PATIENCE = 5.0  # seconds until a Hub that does not answer counts as out of reach


@dataclass(frozen=True)
class Revision:
    """A revision of a repository of models."""

    repo: str  # as in "EleutherAI/pythia-70m"
    revision: str  # a branch, tag or commit, as in "step1000"

    @classmethod
    def of(cls, name: str) -> "Revision | None":
        """Return the revision that a name means; None: it is no such name."""
        match = _NAME.fullmatch(name)
        return match and cls(match[1], match[2])

    @property
    def label(self) -> str:
        """What it is called among checkpoints: it can name a folder."""
        return f"{self.repo.rpartition('/')[2]}@{self.revision.replace('/', '-')}"

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"

    def file(self) -> Path:
        """Return the file of its weights, or the index of their parts, all of them on this node.

        Raises:
            ConfigError: if there is no such revision, it holds no weights, or it is neither in the
                cache nor can the Hub be reached.
        """
        return _downloaded(self.repo, self.revision)


def parts(index: Path) -> list[Path]:
    """Return the files that an index names, which lie beside it.

    Raises:
        ConfigError: if it is no index.
    """
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
        return [index.parent / name for name in sorted(named)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"checkpoint {index} must name the parts of the weights under 'weight_map', and gave "
            f"{type(error).__name__}: {error}"
        ) from error


@functools.cache  # a sweep asks once for each revision: its cells make no request
def _downloaded(repo: str, revision: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(
            f"checkpoint {repo}@{revision} is on the Hugging Face Hub, whose client is not "
            "installed: pip install 'distsampler[hf]', or give a local file or folder"
        ) from None
    name, cached = _asked(repo, revision)
    if cached is None:
        try:
            cached = Path(hf_hub_download(repo, name, revision=revision))
            if name.endswith(INDEX):
                for part in parts(cached):  # of the same commit, should the branch move
                    hf_hub_download(repo, part.name, revision=cached.parent.name)
        except ConfigError:
            raise
        except Exception as error:  # of the client, its HTTP library, or the disk
            raise ConfigError(
                f"checkpoint {repo}@{revision} could not be downloaded: {type(error).__name__}: "
                f"{_first_line(error)}; what was loaded so far is kept: start again, or give a "
                "local folder"
            ) from error
    return cached


def _asked(repo: str, revision: str) -> tuple[str, Path | None]:
    """The file of a revision's weights; where it is, if only the cache could be asked.

    The Hub is asked once for each name, without the client's own 20 seconds of tries.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    for name in FILES:
        try:
            url = hf_hub_url(repo, name, revision=revision)
            get_hf_file_metadata(url, timeout=_PATIENCE)
        except errors.RevisionNotFoundError:
            raise ConfigError(
                f"checkpoint {repo}@{revision}: the repository has no revision {revision!r}; see "
                f"its branches and tags at {hf_hub_url(repo, '').partition('/resolve/')[0]}"
            ) from None
        except errors.RepositoryNotFoundError:
            raise ConfigError(
                f"checkpoint {repo}@{revision}: the Hub shows no repository {repo!r}, and no such "
                "file or folder is here; if it is private or gated, log in with 'hf auth login' or "
                "set HF_TOKEN"
            ) from None
        except errors.EntryNotFoundError:
            continue
        except Exception as error:  # of whichever HTTP library the client has: out of reach
            return _from_cache(repo, revision, error)
        return name, None
    raise ConfigError(
        f"checkpoint {repo}@{revision} must hold one of {', '.join(FILES)}, and has none: give load"
    )


def _from_cache(repo: str, revision: str, error: Exception) -> tuple[str, Path]:
    """What an earlier download left, all parts of it."""
    from huggingface_hub import constants, try_to_load_from_cache

    for name in FILES:
        file = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(file, str) and _is_whole(Path(file)):
            return name, Path(file)
    raise ConfigError(
        f"checkpoint {repo}@{revision} is neither a local path nor in the cache "
        f"{constants.HF_HUB_CACHE}, and the Hub at {constants.ENDPOINT} cannot be reached "
        f"({type(error).__name__}: {_first_line(error)}): give a local folder with one of "
        f"{', '.join(FILES)}, or set HF_HOME to a cache that has it"
    ) from None


def _is_whole(file: Path) -> bool:
    return not file.name.endswith(INDEX) or all(part.exists() for part in parts(file))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
