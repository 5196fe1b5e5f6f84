"""The command lines that a file holds, and whether the program that one calls understands it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import yaml

OPERATORS = frozenset(";&|()<>")


def commands(path: Path, programs: tuple[str, ...], name: str = "") -> Iterator[list[str]]:
    """The command lines in a file that call one of some programs, from the program on."""
    for line in _lines(path):
        for words in _simple_commands(line):
            for i, word in enumerate(words[:-1]):
                called = word in programs and re.match(r"[a-z]", words[i + 1])
                if called and name in ("", words[i + 1]):
                    yield words[i:]


def _lines(path: Path) -> Iterator[str]:
    """What a file gives to a shell."""
    text = path.read_text()
    if path.suffix == ".yaml":
        uncommented = re.sub(r"^#gcp ", "", text, flags=re.MULTILINE)
        for document in yaml.safe_load_all(text):
            yield from _strings(document)
        if uncommented != text:
            yield from _strings(yaml.safe_load(uncommented))
    elif path.suffix == ".md":
        for span, block in re.findall(r"`([^`\n]+)`|^    (.*)$", text, re.MULTILINE):
            if block or span.count(" ") > 1:  # two words in a sentence are a command's name
                yield block or span
    else:
        yield from text.replace("\\\n", " ").splitlines()


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _simple_commands(line: str) -> Iterator[list[str]]:
    """The commands of a line, and those that are quoted in it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="".join(OPERATORS))
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= OPERATORS:
            yield words
            words = []
            continue
        words.append(word)
        if " " in word:
            yield from _simple_commands(word)


def understand(group: click.Group, words: list[str]) -> None:
    """Parses a command line without running it; raises what its program would say.

    A variable stands for 1, which is a number and a name.
    """
    name, *rest = [re.sub(r"\$\{?\w+\}?", "1", word) for word in words]
    if name == "symmetric-run":  # what it does not know it gives to `ray start`
        if "--" not in rest:
            raise ValueError("no -- before the command")
        rest = rest[: rest.index("--")]
        own, context = group.commands[name], click.Context(group)
        given = own.make_context(name, [*rest, "--", "true"], parent=context).params
        name, rest = "start", [word for word in given["ray_args_and_entrypoint"] if word != "true"]
    command = group.get_command(click.Context(group), name)
    if command is None:
        raise ValueError(f"no such command: {name}")
    context = command.make_context(name, rest)
    if isinstance(command, click.Group):
        understand(command, [*context._protected_args, *context.args])
