"""Runs that a configuration file describes: read, held against the keys there are, and handed to `oneshot`.

`document` reads a file with its lines, `check` holds a table against a dataclass, `keys` names the keys, `wizard`
translates the keys of training wizards, `sources` and `dotted` make rows of `[dataset_spec]`, `runs` does it.
"""

from bitpress.configs.runs import run

__all__ = ["run"]
