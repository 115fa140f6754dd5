"""A comparison of checkpoints as a page."""

from __future__ import annotations

from bitpress.compare import Compared, Comparison
from bitpress.evaluate import windows_of
from bitpress.tables import COMPARED
from bitpress.views.page import Cell, Html, answers, bullets, page, paragraph, safe, section, table, versions

# figures of which the largest fills its bar
_BARRED = {"size": "bytes", "KL, mean (nats)": "kl", "forward (tokens/s)": "tokens_per_second"}


def comparison_page(result: Comparison) -> str:
    """The page: figures, answers side by side, what failed, notes, versions."""
    models = (result.base, *result.checkpoints)
    about = f"{windows_of(result.windows, result.length, result.text)}, in {result.dtype}"
    parts = [section("Figures", _figures(models), paragraph(LEGEND, dim=True))]
    if result.failed:
        parts.append(section("Failed", bullets(f"{m.name}: {m.error}" for m in result.failed)))
    if result.prompts:
        about_them = paragraph("Greedy. Marked: from where it differs from the base.", dim=True)
        said = [
            answers(prompt, {m.name: m.answers[i] for m in models if m.answers})
            for i, prompt in enumerate(result.prompts)
        ]
        parts.append(section("Generations", about_them, *said))
    if notes := [f"{m.name}: {note}" for m in models for note in m.notes]:
        parts.append(section("Notes", bullets(notes)))
    parts.append(versions(result.versions))
    return page(f"{result.base.name} and what was made of it", about, parts)


LEGEND = (
    "Bits/weight are of the quantized linears, scales and zero points counted; bits/parameter of all that is "
    "stored. KL is that of the next-token distribution to the base's, over all positions. Speeds and load time are of "
    "this machine, run in this dtype through transformers, not of a serving engine."
)


def _figures(models: tuple[Compared, ...]) -> Html:
    shown = {name: value for name, value in COMPARED.items() if any(map(value, models))}
    most = {key: max((getattr(m, key) or 0) for m in models) for key in _BARRED.values()}

    def cell(name: str, model: Compared) -> str | Cell:
        text, key = Html("<br>".join(map(safe, shown[name](model).split("\n")))), _BARRED.get(name)
        return Cell(text, (getattr(model, key) or 0) / most[key]) if key and text and most[key] else text

    return table(("", *(m.name for m in models)), ([name, *(cell(name, m) for m in models)] for name in shown))
