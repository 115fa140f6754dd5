"""Calibration data: open what the user names, turn its rows into token ids, cut or keep them.

`table` names the registered datasets, `splits` picks a split, `sources` and `local` open the data, `rows`
reads a row, `calibration` and `training` tokenize and pack.
"""

from bitpress.data.calibration import CalibrationData, default_text, load_calibration

__all__ = ["CalibrationData", "default_text", "load_calibration"]
