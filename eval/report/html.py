"""The page as HTML: `page.html.jinja` with `style.css` and `script.js` inside, so that the file needs nothing else.

Jinja escapes everything that it writes. As a second wall, the page's own policy (CSP) lets a browser load nothing but
embedded pictures, and run no script but ours, by its hash.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from corpora.targets import REPORT
from eval.report.page import Report
from eval.tables.compare import BANDS
from eval.tables.render import plain, signed

__all__ = ["html_of"]

HERE = Path(__file__).parent
# A verdict's sign, and what it means: colour alone would tell some readers nothing.
VERDICTS = {
    "agrees": ("✓", f"within {BANDS['agrees']:g} scatter of the published figure"),
    "near": ("≈", f"within {BANDS['near']:g}"),
    "off": ("✗", "further away"),
}


def html_of(report: Report, *, made: str, command: str) -> str:
    """One HTML file. made: when, in words; command: what makes it again."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "plain": plain,
        "signed": signed,
        "bar": _bar,
        "capital": lambda text: text[:1].upper() + text[1:],
    }
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return environment.get_template("page.html.jinja").render(
        report=report,
        made=made,
        command=command,
        mark=REPORT,
        verdicts=VERDICTS,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
    )


def _hash(text: str) -> str:
    """Of what stands between the tags, as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _bar(value: float, chart: Any) -> tuple[float, float]:
    """Start and width of a bar in hundredths of the chart's width."""
    width = (50.0 if chart.zero == 50 else 100.0) * abs(value) / chart.reach
    return round(chart.zero - width if value < 0 else chart.zero, 2), round(width, 2)
