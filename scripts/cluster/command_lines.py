"""The command lines that files hold, each parsed by the program that it calls, without running it.

python -m scripts.cluster.command_lines FILE... prints how many are understood, and which are not.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer
import yaml

OPERATORS = frozenset(";&|()<>")


def commands(path: Path, programs: tuple[str, ...], name: str = "") -> Iterator[list[str]]:
    """Yield the command lines in a file that call one of some programs, from the program on."""
    for line in _lines(path):
        for words in _simple_commands(line):
            for i, word in enumerate(words[:-1]):
                called = word in programs and re.match(r"[a-z]", words[i + 1])
                if called and name in ("", words[i + 1]):
                    yield words[i:]


def _lines(path: Path) -> Iterator[str]:
    """Yield what a file gives to a shell."""
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
    """Yield the commands of a line, and those that are quoted in it."""
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


def check(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each command line of distsampler and of Ray in a file, and its mistake or ""."""
    from ray.scripts.scripts import cli as ray

    from distsampler.cli import app

    groups: dict[str, Any] = {"distsampler": typer.main.get_command(app), "ray": ray}
    for program, *words in commands(path, tuple(groups)):
        reason = ""
        try:
            _parse(groups[program], words)
        except click.exceptions.Exit:
            reason = "does nothing"
        except Exception as error:  # click's own or typer's copy of it
            reason = str(getattr(error, "message", "") or error)
        yield shlex.join([program, *words]), reason


def _parse(group: click.Group, words: list[str]) -> None:
    """Parse a command line; a variable stands for 1, which is a number and a name."""
    name, *rest = [re.sub(r"\$\{?\w+\}?", "1", word) for word in words]
    if name == "symmetric-run":  # what it does not know it gives to `ray start`
        if "--" not in rest:
            raise ValueError("no -- before the command")
        rest = rest[: rest.index("--")]
        own, context = group.commands[name], click.Context(group)
        known = own.make_context(name, [*rest, "--", "true"], parent=context).params
        name, rest = "start", [word for word in known["ray_args_and_entrypoint"] if word != "true"]
    command = group.get_command(click.Context(group), name)
    if command is None:
        raise ValueError(f"no such command: {name}")
    context = command.make_context(name, rest)
    if isinstance(command, click.Group):
        _parse(command, [*context._protected_args, *context.args])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    lines = [(path, *line) for path in parser.parse_args().files for line in check(path)]
    wrong = [line for line in lines if line[2]]
    for path, line, reason in wrong:
        print(f"{path.name}: {line}: {reason}", file=sys.stderr)
    print(f"{len(lines) - len(wrong)} of {len(lines)} command lines are understood")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
