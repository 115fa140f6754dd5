"""The public face of the package."""

import ast
import importlib
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import bitpress


def run(code):
    """The last line that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_all_is_sorted_and_complete():
    assert bitpress.__all__ == sorted(set(bitpress.__all__))
    assert set(bitpress.__all__) == set(bitpress._PUBLIC)
    # what type checkers see is the same
    tree = ast.parse(Path(bitpress.__file__).read_text())
    checked = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    names = {
        (alias.name, node.module) for part in checked for node in ast.walk(part) if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert names == {(name, f"bitpress.{module}") for name, module in bitpress._PUBLIC.items()}


@pytest.mark.parametrize("name", bitpress.__all__)
def test_every_name_is_there(name):
    module = importlib.import_module(f"bitpress.{bitpress._PUBLIC[name]}")
    assert getattr(bitpress, name) is getattr(module, name)
    assert callable(getattr(bitpress, name))


def test_errors_are_public():
    errors = importlib.import_module("bitpress.errors")
    kinds = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, errors.BitpressError)}
    assert kinds <= set(bitpress.__all__)


@pytest.mark.parametrize(
    "place",
    ["awq.AWQModifier", "gptq.GPTQModifier", "obcq.SparseGPTModifier", "transform.AWQModifier",
     "transform.SmoothQuantModifier", "transform.awq.AWQMapping", "transform.awq.AWQModifier",
     "transform.smoothquant.SmoothQuantModifier"],
)  # fmt: skip
def test_modifiers_under_the_module_names_of_other_tools(place):
    module, _, name = place.rpartition(".")
    found = getattr(importlib.import_module(f"bitpress.modifiers.{module}"), name)
    assert name == "AWQMapping" or found is getattr(importlib.import_module("bitpress.modifiers"), name)


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'bitpress' has no attribute 'one_shot'"):
        _ = bitpress.one_shot


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'pydantic', 'rich', 'typer', 'yaml', 'safetensors'}"
    assert run(f"import sys, bitpress; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_a_function_stays_one_when_its_module_is_imported():
    code = """
import bitpress.evaluate, bitpress.oneshot
from bitpress import evaluate, oneshot
from bitpress.oneshot import Arguments
print(type(evaluate).__name__, type(oneshot).__name__, bitpress.oneshot is oneshot, Arguments.__name__)
"""
    assert run(code) == "function function True Arguments"


def test_package_data():
    assert files("bitpress").joinpath("py.typed").is_file()
    assert files("bitpress").joinpath("assets", "evaluation.txt").is_file()
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '"py.typed"' in project.read_text()
    assert isinstance(bitpress.__version__, str)
    assert f'version = "{bitpress.__version__}"' in project.read_text()
