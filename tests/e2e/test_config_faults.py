"""`bitpress run`: all that is wrong with a configuration is told at once, and nothing that is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bitpress import BitpressError
from bitpress.configs import run
from bitpress.configs.document import read
from bitpress.configs.runs import load
from conftest import build, save
from helpers import WORDS, make_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with a chat template."""
    folder = save(build("llama", hidden_size=64, intermediate_size=128), tmp_path_factory.mktemp("model") / "m")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def head(base, tmp_path, monkeypatch):
    """Keys of a run that is right, in a folder with rows."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"source": " ".join(WORDS[i : i + 8]), "target": " ".join(WORDS[i + 3 : i + 9])} for i in range(9)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return {"model": str(base), "output_dir": "out", "scheme": "W4A16", "group_size": 16, "max_seq_length": 32}


def written(keys):
    Path("run.yaml").write_text(yaml.safe_dump(keys))
    return Path("run.yaml")


def faults(keys, *overrides):
    """What is told, without file and line, in order of the keys."""
    with pytest.raises(BitpressError) as caught:
        run(written(keys), overrides)
    assert not Path("out").exists()
    return sorted(p.split(": ", 1)[1] if p.startswith("run.yaml") else p for p in caught.value.problems)


SPEC = {"data_files": "pairs.jsonl"}
TAKE = "dataset_spec.take: must be at least 1, got "


def test_steps_and_templates_are_told_together(head):
    bad = {"take": -3, "target_template": "{a", "token_length_filter": {"column": "source", "max_length": -1}}
    told = [TAKE + "-3", "dataset_spec.target_template: not a template",
            "dataset_spec.token_length_filter.max_length: must be at least 1, got -1"]  # fmt: skip
    for files in ("pairs.jsonl", "none.jsonl"):
        found = faults({**head, "dataset_spec": {"data_files": files, **bad}})
        also = ["dataset_spec.data_files: none.jsonl: no such file"] if files == "none.jsonl" else []
        expected = sorted([*also, *told])
        assert len(found) == len(expected) and all(map(str.startswith, found, expected)), found
    assert faults({**head, "dataset_spec": {**SPEC, "take": 0}}) == [TAKE + "0"]
    assert faults({**head, "dataset_spec": {**SPEC, "preprocessing": {"take": 0}}})[0].endswith("got 0")


def test_columns_are_told_together(head):
    more = {"select_columns": ["sorce", "target"], "rename_columns": {"sorce": "de", "taget": "en"},
            "token_length_filter": {"column": ["de", "fr"], "max_length": 9},
            "source_template": "{de} {source}", "target_template": "{en} {trget}"}  # fmt: skip
    no = "the rows have no column"
    assert faults({**head, "dataset_spec": {**SPEC, **more}}) == [
        f"dataset_spec.rename_columns: {no} 'taget'. Columns: source, target. Did you mean 'target'?",
        f"dataset_spec.select_columns: {no} 'sorce'. Columns: source, target. Did you mean 'source'?",
        f"dataset_spec.target_template: {no} 'trget'. Columns: source, target. Did you mean 'target'?",
        f"dataset_spec.token_length_filter.column: {no} 'fr'. Columns: source, target.",
    ]
    (said,) = faults({**head, "dataset_spec": {**SPEC, "rename_columns": {"source": "target"}}})
    assert said == "dataset_spec.rename_columns: there would be two columns 'target'"
    (said,) = faults(
        {**head, "dataset_spec": {**SPEC, "rename_columns": {"source": "de"}}}, "dataset_spec.text_template={source}!"
    )
    assert said.startswith(f"--set dataset_spec.text_template: {no} 'source'. Columns: target, de.")


def test_templates(base, head):
    start = f"model: {base}\noutput_dir: out\nscheme: W4A16\ngroup_size: 16\ndataset_spec:\n  data_files: pairs.jsonl\n"
    for more, said in (
        ("  source_template: '{sorce}'\n", "line 7: dataset_spec.source_template: the rows have no column 'sorce'. "
         "Columns: source, target. Did you mean 'source'?"),
        ("  text_template: '{source'\n", "line 7: dataset_spec.text_template: not a template"),
        ("  messages_template: [{role: user, content: '{}'}]\n", "messages_template.0.content: {} names no column"),
        ("  messages_template: [{role: user}]\n", "messages_template.0: expected role and content"),
        ("  select_columns: [src]\n", "dataset_spec.select_columns: the rows have no column 'src'"),
        ("  token_length_filter: {column: source, max_length: 2}\n", "all 9 rows have more than 2 tokens"),
        ("  spec_class: bitpress.Seq2SqDatasourceSpec\n", "Did you mean 'Seq2SeqDatasourceSpec'?"),
    ):  # fmt: skip
        Path("bad.yaml").write_text(start + more)
        with pytest.raises(BitpressError) as caught:
            run("bad.yaml")
        assert said in str(caught.value), more


def test_right_steps_are_taken(head):
    swap = {"source": "target", "target": "source"}
    later = {"take": 2, "rename_columns": {"source": "a"}}
    spec = {**SPEC, "select_columns": [*swap], "rename_columns": swap, "preprocessing": later}
    spec["text_template"] = "{a}|{target}"
    rows = load(written({**head, "dataset_spec": spec})).arguments["dataset"]
    first = json.loads(Path("pairs.jsonl").read_text().splitlines()[0])
    assert len(rows) == 2 and rows[0] == {"text": f"{first['target']}|{first['source']}"}


def test_a_conflict_hides_nothing(head):
    keys = {**head, "dataset": "pairs.jsonl", "dataset_spec": {**SPEC, "shufle": True}}
    keys["recipe"] = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16}}
    found = "\n".join(faults(keys))
    assert "dataset_spec: cannot go with dataset" in found
    assert "dataset_spec.shufle: unknown key. Did you mean 'shuffle'?" in found
    assert "scheme, group_size: cannot go with recipe" in found, found


def test_the_length_that_was_written_is_told(head):
    keys = {**head, "max_seq_length": "big", "tokenizer": {"max_length": 16}}
    assert faults(keys) == [
        "max_seq_length: expected a whole number, got 'big'",
        "tokenizer.max_length: max_seq_length says 'big'; give one",
    ]


def test_an_override_that_is_none_hides_no_other(head):
    found = faults({**head, "batch_size": 0}, "take", "schem=W8A8")
    assert found[0].startswith("--set schem: unknown key. Did you mean 'scheme'?")
    assert found[1].startswith("--set take: write it as key=value")
    assert found[2] == "batch_size: must be at least 1, got 0"


def test_null_takes_a_key_back(head):
    keys = {**head, "generation": {"max_new_tokens": 3, "top_k": 1}, "tokenizer": {"max_length": 9}}
    path = written({**keys, "seed": 7, "smoothing_strength": 0.5, "dataset_spec": {**SPEC, "take": 3}})
    found = load(path, ["generation=null", "tokenizer=null", "seed=null", "dataset_spec.take=null", "stage=null"])
    assert found.generation == {} and "seed" not in found.arguments and found.arguments["max_seq_length"] == 32
    assert len(found.arguments["dataset"]) == 9
    assert load(path, ["tokenizer=null", "generation=null", "generation.top_k=50"]).generation == {"top_k": 50}
    assert load(written({**head, "sheme": 1}), ["sheme=null"]).arguments["output_dir"] == "out"
    path = written(keys)
    assert read(path, ["training.max_steps=null"]).data == read(path).data  # no table is made of it
    assert faults(
        keys, "tokenizer=null", "output_dir=null", "generation.top_k=null", "schem=null", "generaton.top_k=null"
    ) == [
        "--set generaton: unknown key. Did you mean 'generation'?",
        "--set output_dir: missing",
        "--set schem: unknown key. Did you mean 'scheme'?",
    ]


def test_values_of_the_tokenizer_and_of_generation(head):
    generation = {"max_new_tokens": "abc", "do_sample": "maybe", "top_k": 3, "top_p": "1"}
    generation |= {"eos_token_id": "x", "stop_strings": 3}
    found = faults({**head, "tokenizer": {"truncation": "maybe", "padding": "wide"}, "generation": generation})
    assert found == [
        "generation.do_sample: expected true or false, got 'maybe'",
        "generation.eos_token_id: expected a whole number or a list (a whole number each), got 'x'",
        "generation.max_new_tokens: expected a whole number, got 'abc'",
        "generation.stop_strings: expected a text or a list (a text each), got 3",
        "generation.top_p: expected a number, got '1'",
        "tokenizer.padding: expected true or false or 'longest' or 'max_length' or 'do_not_pad', got 'wide'",
        "tokenizer.truncation: expected true or false or 'longest_first' or 'only_first' or 'only_second' or "
        "'do_not_truncate', got 'maybe'",
    ]
    found = faults({**head, "generation": {"max_new_tokens": 0, "cache_implementation": "disk", "top_k": 3}})
    starts = ("cache_implementation: Invalid", "max_new_tokens: `max_new_tokens` must be greater", "top_k: `do_sample`")
    assert len(found) == 3 and all(f.startswith(f"generation.{s}") for f, s in zip(found, starts, strict=True)), found


def test_a_message_without_content_is_told(head):
    chats = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}], [{"role": "usr"}]]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": c}) for c in chats))
    for data in ({"dataset": "chats.jsonl"}, {"dataset_spec": {"data_files": "chats.jsonl"}}):
        (said,) = faults({**head, **data})
        assert "row 1: a message of 'usr' has no 'content'. Give role and content" in said


def test_an_encoder_decoder_is_refused(head):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained("t5")
    Path("run.yaml").write_text("model: t5\noutput_dir: out\nscheme: W8A8\ndataset: pairs.jsonl\n")
    with pytest.raises(BitpressError, match="an encoder-decoder; bitpress compresses decoder language models"):
        run("run.yaml")
