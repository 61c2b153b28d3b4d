"""Pages of numbers: tables, and the part of a page that a benchmark renews."""

from __future__ import annotations

import os
import platform

import torch


def table(header, rows):
    """Return a table in Markdown with aligned columns."""
    lines = [header, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells):
        first, *others = (
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def machine():
    """Return a description of this machine."""
    threads = torch.get_num_threads()
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {threads} thread{'s' * (threads > 1)}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def renew(path, script, text):
    """Replace the text between the marks of a script in a page; make the page if there is none."""
    begin, end = f"<!-- {script} -->", f"<!-- end of {script} -->"
    page = path.read_text(encoding="utf-8") if path.exists() else f"{begin}{end}\n"
    if begin not in page:
        raise SystemExit(f"{path} has no line {begin} to write after.")
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
