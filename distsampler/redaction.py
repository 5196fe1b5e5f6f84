"""Secrets of a user: found by their names and by how they look, and kept out of all that is kept.

Whatever is written (run.json, sweep.json, events.jsonl, configs in a store, reports), printed or
raised on purpose passes through ``redacted``. A run that is continued from its store asks for what
was taken out (``missing``); one that is given its config again does not notice.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

REDACTED = "<redacted>"
T = TypeVar("T")

# As secrets look: tokens of services, passwords in URLs, signed parameters of URLs, HTTP headers.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-(?:(?:proj|ant|svcacct)-[\w-]{20,}|[A-Za-z0-9]{32,})|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,})"
)
_IN_URL = re.compile(
    r"((?<![\w+.-])[A-Za-z][\w+.-]{0,20}://)(?:[^/\s@:'\"]*:[^/\s@'\"]+|[^/\s@:'\"]{20,})@"
)
_PARAMETER = re.compile(
    r"([?&;](?:[\w-]*token|sig|[\w-]*signature|[\w-]*credential|pass(?:word|wd)|[\w-]*secret"
    r"|(?:\w*[_-])?(?:api|access|account|secret)[_-]?key(?:[_-]?id)?|key)=)[^&;#\s'\"<]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(Bearer |Basic )[\w.+/=-]{12,}")

# As secrets are called, in words of a name.
_SECRET = re.compile("passw(or)?d|passphrase|secret|credential|authorization|apikey")
_KEYS = {"api", "access", "account", "private", "secret", "auth"}  # before "key"
_OF_TEXT = {  # before "token": a piece of text
    *("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "audio", "video", "special"),
    *("prefix", "suffix", "start", "end", "stop", "first", "last"),
}
# Keys below which names are the user's, and not those of parameters or labels.
_USERS = re.compile(r"kwargs$|^(?:runtime_env|env_vars|storage_options)$")


def redacted(value: T, *, named: bool = False) -> T:
    """Return a value without what looks like a secret, or is called one by the user.

    Args:
        value: text, or lists, tuples and mappings of it; anything else is returned as it is.
        named: whether the mapping's keys are a user's names (options, environment variables), by
            which values are judged; below keys such as ``model_kwargs`` and ``env_vars`` they are.

    Example:
        >>> redacted({"model_kwargs": {"token": "abc", "layers": 2}})
        {'model_kwargs': {'token': '<redacted>', 'layers': 2}}
    """
    clean: Any = value
    if isinstance(value, str):
        clean = _without_secrets(value)
    elif isinstance(value, Mapping):
        clean = {
            key: _hidden(each)
            if named and _is_secret(key)
            else redacted(each, named=named or _is_users(key))
            for key, each in value.items()
        }
    elif type(value) in (list, tuple):
        clean = type(value)(redacted(each, named=named) for each in value)  # type: ignore[call-arg, attr-defined]
    return clean  # type: ignore[no-any-return]


def scrubbed(text: str, options: Mapping[str, Any]) -> str:
    """Return a text, such as a user's own error, without the secrets among some options."""
    for secret in sorted(_secrets(options), key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return redacted(text)


def missing(value: object, where: str = "") -> Iterator[str]:
    """Yield the paths at which a value, read from a store, lacks a secret."""
    if isinstance(value, str) and REDACTED in value:
        yield where
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from missing(each, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from missing(each, f"{where}.{index}")


def _without_secrets(text: str) -> str:
    text = _TOKEN.sub(REDACTED, text)
    for pattern, kept in ((_IN_URL, rf"\1{REDACTED}@"), (_PARAMETER, rf"\1{REDACTED}")):
        text = pattern.sub(kept, text)
    return _HEADER.sub(rf"\1{REDACTED}", text)


def _is_users(key: object) -> bool:
    return isinstance(key, str) and bool(_USERS.search(key))


def _is_secret(name: object) -> bool:
    """Whether a name is that of a secret, as HF_TOKEN, apiKey and password are; not pad_token."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", str(name)).lower()
    words = re.findall(r"[a-z]+", apart)
    pairs = list(zip(["", *words], words, strict=False))
    token = words[-1:] == ["token"] and pairs[-1][0] not in _OF_TEXT
    key = any(second == "key" and first in _KEYS for first, second in pairs)
    return token or key or _SECRET.search(apart) is not None


def _hidden(value: Any) -> Any:  # noqa: ANN401 (whatever a user named so)
    """A secret, or all that is in it; a flag or nothing says nothing: ``token: true``."""
    if isinstance(value, Mapping):
        return {key: _hidden(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(each) for each in value]
    return value if value is None or isinstance(value, bool) or value == "" else REDACTED


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    """The texts that are secrets by their names; short ones would be found in any text."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif _is_secret(key) and isinstance(value, str) and len(value) > 3:
            yield value
