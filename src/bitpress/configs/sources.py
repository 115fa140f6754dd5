"""Rows of calibration data from a table `[dataset_spec]`: files, templates over columns, or a class of the user's.

`spec_class` is left out, or its last part is one of these (`training_wizard.specs.dataset.Seq2SeqDatasourceSpec`):

| SimpleDataSourceSpec           | rows as they are                                     |
| Seq2SeqDatasourceSpec          | source_template and target_template make pairs       |
| TemplateInstructDatasourceSpec | messages_template makes messages                     |
| MultiDataSourceSpec            | the rows of its parents, one after the other         |

or it is the dotted path of a class or function of the user's. It is called with the table's other keys by name, tables
that have a `spec_class` being made first, and gives the rows: itself, or its attribute `dataset`.
"""

from __future__ import annotations

import bisect
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from glob import glob, has_magic
from itertools import accumulate
from pathlib import Path
from typing import Any

from bitpress.configs import dotted
from bitpress.configs.check import Checker, fits
from bitpress.configs.keys import DatasetKeys, LengthFilterKeys, PreprocessingKeys
from bitpress.data.local import cause_of
from bitpress.errors import DataError, did_you_mean

SPECS = {
    "SimpleDataSourceSpec": (),
    "Seq2SeqDatasourceSpec": (),
    "TemplateInstructDatasourceSpec": ("messages_template",),
    "MultiDataSourceSpec": ("parents",),
}  # what each cannot do without
OURS = ("bitpress.", "training_wizard.")
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
           ".txt": "text"}  # fmt: skip
RESERVED = ("path", "data_files", "split")
Row = Mapping[str, Any]


class Rows(Sequence[Any]):
    """Rows of several sets, each with a function that makes of a row what it should be; made when it is read."""

    def __init__(self, parts: Sequence[tuple[Any, Callable[[Any], Any] | None]]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(rows) for rows, _ in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self.ends, index)
        rows, change = self.parts[part]
        row = rows[index - (self.ends[part - 1] if part else 0)]
        return row if change is None else change(row)

    @property
    def dataset(self) -> Rows:
        """Itself: what a class of the user's takes from its parent."""
        return self


@dataclass
class Builder:
    """Makes the rows of a table, and notes every fault with its place.

    Args:
        folder: of the configuration; classes of the user are looked for here too.
        tokenizer: counts tokens for `token_length_filter`; None if there is none.
        seed: of the shuffle.
    """

    checker: Checker
    folder: Path
    tokenizer: Any
    seed: int
    meant: set[str] = field(default_factory=set, init=False)  # columns there would be but for what is noted already

    def rows(self, table: Any, path: tuple[str, ...]) -> Any:
        """The rows; None if anything is wrong, which is noted."""
        if not isinstance(table, Mapping):
            self.checker.fault(path, f"expected a table of keys, got {table!r}")
            return None
        name = table.get("spec_class")
        if isinstance(name, str) and name.rsplit(".", 1)[-1] not in SPECS and not name.startswith(OURS):
            return self._users(name, table, path)
        before = len(self.checker.faults)
        keys = self.checker.table(DatasetKeys, table, path)
        last = "SimpleDataSourceSpec" if name is None else str(name).rsplit(".", 1)[-1]
        if last not in SPECS:
            self.checker.fault((*path, "spec_class"), f"'{name}' is unknown.{did_you_mean(last, SPECS)}")
            return None
        for key in SPECS[last]:
            if key not in table:
                self.checker.fault((*path, key), f"missing; {last} needs it")
        if keys is None:
            return None
        steps: list[tuple[PreprocessingKeys, tuple[str, ...]]] = [(keys, path)]
        if keys.preprocessing is not None:
            at = (*path, "preprocessing")
            inner = self.checker.table(PreprocessingKeys, keys.preprocessing, at, also=("spec_class",))
            steps += [(inner, at)] if inner is not None else []
        templates = self._templates(keys, last, path)
        found = self._base(keys, path)
        if found is not None and any(_asked(step) for step, _ in steps):
            found = self._table(found, path)
        columns, self.meant = None if found is None else columns_of(found), set()
        for step, at in steps:
            columns = self._checked(step, columns, at)
        for at, named in self._named_in(templates, path):
            self._there(named, columns, at)
        for step, at in steps:
            if found is None or len(self.checker.faults) > before:
                return None
            found = self._preprocessed(found, step, at)
        return None if found is None else _templated(found, keys, templates)

    def _base(self, keys: DatasetKeys, path: tuple[str, ...]) -> Any:
        given = [k for k in ("data_files", "dataset", "parent", "parents") if getattr(keys, k) is not None]
        if len(given) != 1:
            what = f"{', '.join(given)}: give one of them" if given else "missing; give data_files, dataset or parent"
            self.checker.fault((*path, given[1]) if given else (*path, "data_files"), what)
            return None
        if keys.parent is not None:
            return self.rows(keys.parent, (*path, "parent"))
        if keys.parents is not None:
            made = [self.rows(p, (*path, "parents", str(i))) for i, p in enumerate(keys.parents)]
            return None if any(m is None for m in made) else Rows([(m, None) for m in made])
        try:
            return self._files(keys, path) if keys.data_files is not None else self._named(keys)
        except DataError as error:
            for problem in error.problems:
                self.checker.fault((*path, given[0]), problem)
            return None

    def _named(self, keys: DatasetKeys) -> Any:
        from bitpress.data.sources import Wanted, open_source

        rows = open_source(keys.dataset, Wanted(split=keys.split)).rows
        return rows if hasattr(rows, "__len__") else list(rows)

    def _files(self, keys: DatasetKeys, path: tuple[str, ...]) -> Any:
        import datasets

        wanted = [keys.data_files] if isinstance(keys.data_files, str) else keys.data_files or []
        if reserved := [k for k in RESERVED if k in keys.load_dataset_kwargs]:
            at = (*path, "load_dataset_kwargs", reserved[0])
            self.checker.fault(at, "cannot be given here; see data_files")
            return None
        files = []
        for one in wanted:
            matching = sorted(glob(one, recursive=True)) if has_magic(one) else [one] * Path(one).is_file()
            if not matching:
                raise DataError(f"{one}: no such file{'' if Path(one).is_absolute() else f' in {Path.cwd()}'}")
            files += matching
        if not files:
            raise DataError("names no file")
        suffixes = {Path(f).suffix.lower() for f in files}
        loader: str = keys.loader or next((LOADERS[s] for s in sorted(suffixes) if s in LOADERS), "json")
        options = {"sep": "\t"} if suffixes == {".tsv"} and loader == "csv" else {}
        try:
            return datasets.load_dataset(
                loader, data_files=files, split="train", **{**options, **keys.load_dataset_kwargs}
            )
        except Exception as error:  # the loaders raise many unrelated types; the reason is kept
            raise DataError(f"{', '.join(files[:3])}: cannot be read as {loader}: {cause_of(error)}") from None

    def _table(self, rows: Any, path: tuple[str, ...]) -> Any:
        """The rows as a table, of which columns can be taken."""
        import datasets

        if isinstance(rows, datasets.Dataset):
            return rows
        each = list(rows)
        if not all(isinstance(row, Mapping) for row in each):
            self.checker.fault(path, "the rows have no columns, so nothing of this can be done to them")
            return None
        return datasets.Dataset.from_list(each)

    def _checked(self, keys: PreprocessingKeys, columns: list[str] | None, path: tuple[str, ...]) -> list[str] | None:
        """The columns after these steps, of rows with such columns; what is wrong with a step hides no later one.

        Args:
            columns: None where they are not known.
        """
        right = True
        if keys.select_columns is not None:
            wrong = self._there(keys.select_columns, columns, (*path, "select_columns"))
            self.meant |= set(wrong)
            right = not wrong
            if columns is not None and right:  # else the wrong name may be meant for any of them
                columns = keys.select_columns
        if keys.rename_columns is not None:
            at, new = (*path, "rename_columns"), list(keys.rename_columns.values())
            self._there(keys.rename_columns, columns, at)
            kept = [c for c in columns or () if c not in keys.rename_columns]
            for name in dict.fromkeys(new):
                if not name:
                    self.checker.fault(at, "a new name is empty")
                elif new.count(name) > 1 or (right and name in kept):
                    self.checker.fault(at, f"there would be two columns '{name}'")
            if columns is not None:
                self.meant |= {n for old, n in keys.rename_columns.items() if old not in columns}
                columns = [*kept, *(n for old, n in keys.rename_columns.items() if old in columns)]
        if keys.take is not None and keys.take < 1:
            self.checker.fault((*path, "take"), f"must be at least 1, got {keys.take}")
        if keys.token_length_filter is not None:
            at = (*path, "token_length_filter")
            rule = self.checker.table(LengthFilterKeys, keys.token_length_filter, at)
            most = keys.token_length_filter.get("max_length")
            if isinstance(most, int) and fits(most, int) and most < 1:
                self.checker.fault((*at, "max_length"), f"must be at least 1, got {most}")
            if rule is not None and not rule.column:
                self.checker.fault((*at, "column"), "names no column")
            elif rule is not None:
                self._there(_of(rule), columns, (*at, "column"))
        return columns

    def _there(self, named: Iterable[str], columns: Sequence[str] | None, path: tuple[str, ...]) -> list[str]:
        """Those that are not among the columns; notes them."""
        known = columns or ()
        missing = [] if columns is None else [c for c in dict.fromkeys(named) if c not in {*known, *self.meant}]
        for column in missing:
            hint = did_you_mean(column, known)
            hint = hint if "Did you mean" in hint else ""
            self.checker.fault(path, f"the rows have no column '{column}'. Columns: {', '.join(known)}.{hint}")
        return missing

    def _preprocessed(self, rows: Any, keys: PreprocessingKeys, path: tuple[str, ...]) -> Any:
        """The rows after steps that are right."""
        if keys.select_columns is not None:
            rows = rows.select_columns(keys.select_columns)
        if keys.rename_columns is not None:
            rows = rows.rename_columns(keys.rename_columns)
        if keys.shuffle:
            rows = rows.shuffle(seed=self.seed)
        if keys.take is not None:
            rows = rows.select(range(min(keys.take, len(rows))))
        if keys.token_length_filter is not None:
            rows = self._short(rows, LengthFilterKeys(**keys.token_length_filter), (*path, "token_length_filter"))
        return rows

    def _short(self, rows: Any, keys: LengthFilterKeys, path: tuple[str, ...]) -> Any:
        """The rows that are not too long."""
        tokenizer = self.tokenizer
        if keys.pretrained_name is not None:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(keys.pretrained_name)
            except (OSError, ValueError, KeyError) as error:
                self.checker.fault((*path, "pretrained_name"), f"'{keys.pretrained_name}': {cause_of(error)}")
                return None
        if tokenizer is None:
            self.checker.fault(path, "there is no tokenizer to count tokens with; give pretrained_name")
            return None
        join = sum if keys.aggregation == "sum" else max

        def short(batch: Mapping[str, list[Any]]) -> list[bool]:
            counts = [[len(i) for i in tokenizer([str(t) for t in batch[c]])["input_ids"]] for c in _of(keys)]
            return [join(row) <= keys.max_length for row in zip(*counts, strict=True)]

        kept = rows.filter(short, batched=True, keep_in_memory=True, load_from_cache_file=False)
        if not len(kept):
            self.checker.fault((*path, "max_length"), f"all {len(rows)} rows have more than {keys.max_length} tokens")
            return None
        return kept

    def _templates(self, keys: DatasetKeys, name: str, path: tuple[str, ...]) -> dict[tuple[str, ...], str]:
        """The templates that rows are made with, by their place in the table."""
        pairs = name == "Seq2SeqDatasourceSpec" or keys.source_template is not None or keys.target_template is not None
        chat, text = keys.messages_template, keys.text_template
        several = (pairs, chat is not None, text is not None).count(True) > 1
        if several:
            self.checker.fault(path, "source_template, messages_template and text_template: give one kind")
        found: dict[tuple[str, ...], str] = {}
        if pairs:
            given = {"source": keys.source_template, "target": keys.target_template}
            found = {(f"{c}_template",): t or f"{{{c}}}" for c, t in given.items() if t or not several}
        for i, message in enumerate(chat or ()):
            if set(message) != {"role", "content"}:
                self.checker.fault((*path, "messages_template", str(i)), "expected role and content")
            found["messages_template", str(i), "content"] = message.get("content", "")
        if text is not None:
            found["text_template",] = text
        return found

    def _named_in(
        self, templates: Mapping[tuple[str, ...], str], path: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """The place of each template and the columns that it names; notes those that are none."""
        for place, template in templates.items():
            at = (*path, *place)
            try:
                columns = [
                    c.split(".")[0].split("[")[0] for _, c, _, _ in string.Formatter().parse(template) if c is not None
                ]
            except ValueError as error:
                self.checker.fault(at, f"not a template: {error}; braces of the text itself are doubled")
                continue
            if "" in columns:
                self.checker.fault(at, "{} names no column; write {column}, and braces of the text doubled")
            else:
                yield at, columns

    def _users(self, name: str, table: Mapping[str, Any], path: tuple[str, ...]) -> Any:
        """The rows of a class or function of the user's."""
        before = len(self.checker.faults)
        given = {k: v for k, v in table.items() if k != "spec_class"}
        for key, value in given.items():
            if isinstance(value, Mapping) and "spec_class" in value:
                inner = self.rows(value, (*path, key))
                given[key] = inner if inner is None or hasattr(inner, "dataset") else Rows([(inner, None)])
        found = dotted.made(self.checker, name, given, path, self.folder)
        return found if len(self.checker.faults) == before else None


def _asked(keys: PreprocessingKeys) -> bool:
    """Whether anything is done to the rows."""
    return any(getattr(keys, f.name) not in (None, False) for f in fields(PreprocessingKeys))


def _of(rule: LengthFilterKeys) -> list[str]:
    """The columns whose tokens are counted."""
    return [rule.column] if isinstance(rule.column, str) else rule.column


def _templated(rows: Any, keys: DatasetKeys, templates: Mapping[tuple[str, ...], str]) -> Any:
    """Rows with what the templates make of their columns; they are filled in when a row is read."""
    if "source_template" in {at[0] for at in templates}:
        source, target = templates.values()
        return Rows([(rows, lambda r: {"source": filled(source, r), "target": filled(target, r)})])
    if keys.messages_template is not None:
        made = [(m["role"], m["content"]) for m in keys.messages_template]
        return Rows([(rows, lambda r: {keys.output_column: [
            {"role": role, "content": filled(content, r)} for role, content in made
        ]})])  # fmt: skip
    text = keys.text_template
    return rows if text is None else Rows([(rows, lambda r: {"text": filled(text, r)})])


def filled(template: str, row: Row) -> str:
    """The template with the columns of a row; a column without a value reads as nothing."""
    try:
        return template.format(**{k: "" if v is None else v for k, v in row.items()})
    except (KeyError, IndexError, AttributeError) as error:
        raise DataError(f"the template {template!r} cannot be filled from a row: {cause_of(error)}") from None


def columns_of(rows: Any) -> list[str] | None:
    """The columns of rows, from the first of them; None if rows have none."""
    names = getattr(rows, "column_names", None)
    if isinstance(names, list):
        return [str(n) for n in names]
    first = next(iter(rows), None) if hasattr(rows, "__len__") else None
    return [str(k) for k in first] if isinstance(first, Mapping) else None
