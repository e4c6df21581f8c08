"""Tables of the benchmarks: as text for a terminal, as Markdown, and filled into a document between its markers."""

import re
from collections.abc import Callable
from dataclasses import dataclass

# A table stands in a document between these two lines.
PLACE = re.compile(r"<!-- table ([a-z0-9_]+) -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    text: a template that a row's values are filled into, as "{ours:.2f}", or a function of the row.
    needs: a key; rows that have None there get a dash.
    """

    title: str
    text: str | Callable
    needs: str | None = None

    def cell(self, row):
        """What stands in this column for a row, a dict."""
        if self.needs is not None and row[self.needs] is None:
            return "-"
        return str(self.text(row)) if callable(self.text) else self.text.format_map(row)


def peak_megabytes(row):
    """The most memory that a call holds, ours / published, in MB."""
    return f"{row['ours_peak_bytes'] / 1e6:.0f} / {row['published_peak_bytes'] / 1e6:.0f}"


def text_table(rows, columns):
    """Rows (dicts) as aligned text: the first column to the left, the others to the right."""
    lines = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    text = []
    for first, *others in lines:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        text.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join(text)


def markdown_table(rows, columns):
    """Rows (dicts) as a Markdown table."""
    return markdown([column.title for column in columns], [[column.cell(row) for column in columns] for row in rows])


def markdown(titles, lines):
    """A Markdown table of lists of cells."""
    whole = [titles, ["---"] * len(titles), *lines]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in whole)


def table_names(document):
    """The names of the tables that a document has places for."""
    return PLACE.findall(document)


def filled(document, table):
    """The document with the Markdown that `table(name)` gives in every place."""

    def place(match):
        return f"<!-- table {match[1]} -->\n{table(match[1])}<!-- end -->"

    return PLACE.sub(place, document)
