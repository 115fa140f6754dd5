"""Commands that have a file of their own; `cli` names them all."""
