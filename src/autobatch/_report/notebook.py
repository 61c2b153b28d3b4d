"""A report as HTML for notebooks."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Final

from autobatch._report.layout import UNCOLOURED, console, renderable
from autobatch._report.text import page
from autobatch.errors import AutobatchError

if TYPE_CHECKING:
    from autobatch._report import TuningReport

_TEXT: Final = (
    '<pre style="font-family:monospace;line-height:normal;white-space:pre;overflow-x:auto;'
    'background:none">{code}</pre>'
)
_DOTS_PER_INCH: Final = 100  # of the figure: about the width of a notebook


def to_html(report: TuningReport) -> str:
    """Return text and figure of a report, in the colours of the notebook around it."""
    content = page(report)
    output = console(io.StringIO(), UNCOLOURED, record=True)
    output.print(renderable(content))
    text = output.export_html(inline_styles=True, code_format=_TEXT)
    try:
        figure = report.plot()
    except AutobatchError:  # matplotlib is not installed
        return text
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DOTS_PER_INCH)
    source = f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
    return f'{text}<img alt="{escape(content.answer)}" style="max-width:100%" src="{source}">'
