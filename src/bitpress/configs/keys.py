"""The keys of a configuration, beside the arguments of `bitpress.oneshot`, which are keys too. Plain data.

A key of the same name means the same wherever it stands; what each is for is said at its field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Loader = Literal["json", "csv", "text", "parquet", "arrow"]


@dataclass(frozen=True)
class RunKeys:
    """Keys of a run that `oneshot` does not have.

    Attributes:
        smoothing_strength: with scheme: of a SmoothQuantModifier before the quantizer; 0 leaves it out. None: 0.8 where
            the scheme's activations are integers (W8A8) or a `recipe_class` asks for it, else left out.
        separator_token: text between the two halves of a pair.
        add_eos_token: close a pair with the tokenizer's end-of-text token.
        generation: arguments of generation (also `generation_args`), for the checkpoint's generation_config.json.
        tokenizer: see `TokenizerKeys`; or the folder or hub id of a tokenizer.
        dataset_spec: see `DatasetKeys`.
        preprocessing_func: dotted path of a function that maps a row to a row.
        training: arguments of training stages, as of `bitpress.train`.
        trust_remote_code: of model and data at once.
    """

    smoothing_strength: float | None = None
    separator_token: str = "<sep>"
    add_eos_token: bool = True
    generation: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | str | None = None
    dataset_spec: dict[str, Any] | None = None
    preprocessing_func: str | None = None
    training: dict[str, Any] | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TokenizerKeys:
    """The table `[tokenizer]`.

    Attributes:
        name: folder or hub id; None: the model's.
        max_length: tokens of a sequence, as `max_seq_length`.
        truncation: rows are cut to that length. Memory is planned for it, so it cannot be false.
        padding_side, padding: nothing is padded here; the side is saved with the checkpoint's tokenizer.
        chat_template: Jinja text, in place of the tokenizer's.
        chat_template_kwargs: more arguments of the chat template.
        init_kwargs: more arguments of AutoTokenizer.from_pretrained.
    """

    name: str | None = None
    max_length: int | None = None
    truncation: bool | Literal["longest_first", "only_first", "only_second", "do_not_truncate"] = True
    padding_side: Literal["left", "right"] | None = None
    padding: bool | Literal["longest", "max_length", "do_not_pad"] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    init_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LengthFilterKeys:
    """The table `token_length_filter`: rows with more tokens are left out.

    Attributes:
        column: whose text is counted, one or several.
        max_length: most tokens.
        pretrained_name: whose tokenizer counts; None: the run's.
        aggregation: of several columns, the "sum" or the "max" of their tokens.
    """

    column: str | list[str]
    max_length: int
    pretrained_name: str | None = None
    aggregation: Literal["sum", "max"] = "sum"


@dataclass(frozen=True)
class PreprocessingKeys:
    """What is done to rows, in this order; in `dataset_spec` itself or in its table `preprocessing`.

    Attributes:
        select_columns: columns that are kept.
        rename_columns: new names by old ones.
        shuffle: in an order drawn by the run's seed.
        take: the first rows.
        token_length_filter: see `LengthFilterKeys`.
    """

    select_columns: list[str] | None = None
    rename_columns: dict[str, str] | None = None
    shuffle: bool | None = None
    take: int | None = None
    token_length_filter: dict[str, Any] | None = None


@dataclass(frozen=True)
class DatasetKeys(PreprocessingKeys):
    """The table `[dataset_spec]`, where its `spec_class` is none of the user's own.

    Rows come from one of data_files, dataset, parent and parents; then they are preprocessed; then a template makes
    pairs, messages or text of them.

    Attributes:
        spec_class: see `bitpress.configs.sources`.
        data_files: a file or a list, with wildcards.
        loader: kind of the files; None: by their suffix.
        load_dataset_kwargs: more arguments of `datasets.load_dataset`.
        dataset: what `dataset` of the run takes, in place of files.
        split: of `dataset`.
        parent, parents: other tables of this kind, whose rows are taken, one after the other.
        preprocessing: see `PreprocessingKeys`.
        source_template, target_template: make a pair of a row; its columns in braces.
        messages_template: makes messages of a row: a list of {role, content}.
        text_template: makes a text of a row.
        output_column: where messages go.
        keep_columns: accepted: what no one reads is not kept.
    """

    spec_class: str | None = None
    data_files: str | list[str] | None = None
    loader: Loader | None = None
    load_dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    split: str | None = None
    parent: dict[str, Any] | None = None
    parents: list[dict[str, Any]] | None = None
    preprocessing: dict[str, Any] | None = None
    source_template: str | None = None
    target_template: str | None = None
    messages_template: list[dict[str, str]] | None = None
    text_template: str | None = None
    output_column: str = "messages"
    keep_columns: list[str] = field(default_factory=list)
