"""Figures as text: aligned tables for a terminal, numbers with their intervals, and a page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence

from tailcache.storage.bootstrap import Figure

__all__ = ["aligned", "number", "page", "percent"]

_MAX_COLUMNS = 4


def number(figure: Figure, digits: int, *, sign: bool = False) -> str:
    """A figure with so many decimals, e.g. `1.234 [1.200, 1.270]`; very large and very small ones as powers of ten."""

    def text(x: float) -> str:
        if x != 0 and (abs(x) >= 1e6 or abs(x) < 10.0**-digits):
            return f"{x:{'+' if sign else ''}.3g}"
        return f"{x:{'+' if sign else ''},.{digits}f}"

    return _with_interval(figure, text)


def percent(figure: Figure, *, sign: bool = False) -> str:
    """A share in percent, without the sign."""
    return _with_interval(figure, lambda x: f"{100 * x:{'+' if sign else ''}.2f}")


def _with_interval(figure: Figure, text: Callable[[float], str]) -> str:
    if figure.low is None or figure.high is None:
        return text(figure.value)
    return f"{text(figure.value)} [{text(figure.low)}, {text(figure.high)}]"


def aligned(table: Sequence[Sequence[str]], max_columns: int = _MAX_COLUMNS) -> list[str]:
    """The table in columns, some at a time, each part headed by its first row and followed by an empty line."""
    lines = []
    for first in range(1, len(table[0]), max_columns):
        part = [[row[0], *row[first : first + max_columns]] for row in table]
        widths = [max(len(row[c]) for row in part) for c in range(len(part[0]))]
        text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in part]
        lines += [text[0], "-" * len(text[0]), *text[1:], ""]
    return lines


def page(title: str, text: str, plots: Mapping[str, bytes]) -> str:
    """One HTML page with a text as it is and some plots.

    Args:
      title: of the page.
      text: for a terminal.
      plots: PNG files by name, shown in this order.
    """
    images = "\n".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in plots.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        "<style>body{font:15px system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
        "pre{overflow-x:auto;font-size:13px}img{max-width:100%;display:block;margin:1em 0}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n<pre>{html.escape(text)}</pre>\n{images}\n</body></html>\n"
    )
