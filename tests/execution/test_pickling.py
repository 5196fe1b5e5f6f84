"""What is sent to actors by value: code that they cannot import."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from distsampler.execution.pickling import send_values
from tests.problems import squared_error


def loaded(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that was loaded from its file, by hand."""
    file.write_text("value = 1")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_modules_that_were_loaded_from_files_are_sent_whoever_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = loaded("a_helper", tmp_path / "a_helper.py", monkeypatch)
    shadow = loaded("colorsys", tmp_path / "colors.py", monkeypatch)  # a name that Python has too
    sent = list[ModuleType]()
    send_values([squared_error], sent.append)
    assert helper in sent
    assert shadow in sent
    assert not {"torch", "numpy", "distsampler", "tests", "typing"} & {m.__name__ for m in sent}


def test_a_module_that_imports_another_when_it_is_asked_does_not_break_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of transformers do, which load their parts when they are used."""

    class Lazy(ModuleType):
        def __getattribute__(self, name: str) -> object:
            if name == "__spec__":
                sys.modules.setdefault("a_part_of_it", ModuleType("a_part_of_it"))
            return super().__getattribute__(name)

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.delitem(sys.modules, "a_part_of_it", raising=False)
    try:
        send_values([squared_error], [].append)
    finally:
        assert sys.modules.pop("a_part_of_it", None) is not None
