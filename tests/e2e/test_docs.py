"""The documentation: its commands run in order, its tables have everything, its messages are those of the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import typer

from bitpress.cli import app
from bitpress.modifiers import MODIFIERS
from bitpress.schemes import PRESETS
from conftest import build, save
from helpers import make_tokenizer
from snippets import blocks, run

DOCS = Path(__file__).parents[2] / "docs"
MODEL = "runs/demo/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny model in the place of the demo's."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512, "num_hidden_layers": 1}
    make_tokenizer(save(build("llama", torch.bfloat16, **sizes), tmp_path / MODEL))
    return tmp_path


@pytest.mark.parametrize(
    ("pages", "files", "count"),
    [
        (["quickstart.md", "views.md"], [], 6 + 2 + 5),
        (["recipes.md", "schemes.md"], [], 2),
        (["howto/w4a16.md"], [], 1),
        (["howto/sparse-int4.md"], [], 2),
        (["howto/stages.md"], ["staged.yaml"], 4),
        (["howto/methods.md"], [], 5),
        (["howto/walkthrough.md"], [], 11),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value and value[0].endswith(".md") else "",
)
def test_the_commands_of_a_page_run(place, pages, files, count, capsys):
    assert sum(run(DOCS / page, tuple(files)) for page in pages) == count


def test_no_page_is_left_out():
    run_here = {"quickstart.md", "views.md", "recipes.md", "schemes.md", "howto/w4a16.md", "howto/sparse-int4.md",
                "howto/stages.md", "howto/methods.md", "howto/walkthrough.md"}  # fmt: skip
    # what these show has tests of its own: test_configs.py, test_processes.py, test_command_line.py
    elsewhere = {"configs.md", "several-gpus.md", "command-line.md"}
    menu = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS))
        shown = {language for language, _ in blocks(page)} & {"bash", "python"}
        assert not shown or name in run_here | elsewhere, f"{name}: run it above, or say here which test does"
        assert name in menu, f"{name}: in no menu of mkdocs.yml"


def test_the_reference_of_recipes_is_whole(hooks):
    page = hooks.on_page_markdown((DOCS / "recipes.md").read_text())
    for name, kind in MODIFIERS.items():
        assert f"## {name}" in page
        about, keys = hooks.described(kind)
        assert len(about) > 30
        for field in dataclasses.fields(kind):
            assert len(keys[field.name]) > 5, (name, field.name)
            assert f"| `{field.name}` |" in page
        assert set(keys) == {field.name for field in dataclasses.fields(kind)}, name


def test_the_table_of_schemes_is_whole(hooks):
    page = hooks.on_page_markdown((DOCS / "schemes.md").read_text())
    for name in PRESETS:
        assert f"| `{name}` |" in page
    row = next(line for line in page.splitlines() if line.startswith("| `W3A16` |"))
    assert "int3" in row and "pack-quantized" in row and "vLLM serves 4 and 8 bits only" in row


def test_the_reference_of_commands_is_whole(hooks):
    page = hooks.on_page_markdown((DOCS / "command-line.md").read_text())
    for name, command in typer.main.get_command(app).commands.items():
        part = page.split(f"### bitpress {name}\n")[1].split("\n### ")[0]
        for option in command.params:
            for word in option.opts if option.param_type_name == "argument" else (*option.opts, *option.secondary_opts):
                assert word.upper() in part or f"`{word}`" in part, (name, word)
            assert option.hidden or option.help, f"{name}: {option.name} says nothing"


def test_links_out_of_the_documentation_become_text(hooks):
    page = hooks.on_page_markdown("a [file](../src/bitpress/cli.py), [`code`](../../examples/x.yaml), [page](views.md)")
    assert page == "a `file`, `code`, [page](views.md)"


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    source = "\n".join(f.read_text() for f in (DOCS.parent / "src/bitpress").rglob("*.py"))
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)
    source = re.sub(r"\{[^{}]*\}", "...", re.sub(r"\.\{did_you_mean[^}]*\}", ". Did you mean", source))
    rows = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for message in rows:
        for part in re.split(r"\.\.\.|'[^']*'|\d+", message):
            if len(part.split()) >= 2:
                assert part.strip() in source, (message, part)


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'bitpress[docs]'")
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    config = load_config(str(DOCS.parent / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build_site(config)
    page = (tmp_path / "site/recipes/index.html").read_text()
    assert "GPTQModifier" in page and "dampening_frac" in page and "generated:" not in page
    for built in (tmp_path / "site").rglob("*.html"):  # code blocks are code
        assert "``" not in built.read_text(), built
