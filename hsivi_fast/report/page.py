"""One self-contained HTML page: everything in it, nothing fetched, for a phone as for a desk, by day and by night."""

import base64
import html
import re
import struct

LONG = 28  # characters of a table's cell that may break into lines

STYLE = """
:root {
  color-scheme: light dark;
  --text: #1d2430; --back: #fff; --line: #d7dce3; --card: #f5f7fa; --link: #0b57b7;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ee; --back: #14181e; --line: #384150; --card: #1d232c; --link: #8ab8ff; }
}
body {
  font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
a { color: var(--link); }
nav ul {
  display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none;
  margin: 0; padding: .6rem .9rem; background: var(--card); border-radius: 4px;
}
.scroll { overflow-x: auto; }
table {
  border-collapse: separate; border-spacing: 0;
  font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal;
}
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
td { white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; max-width: 16rem; }
th:first-child, td:first-child {
  text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--back);
}
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.pictures img { width: 100%; image-rendering: pixelated; }
figcaption { font-size: .9rem; }
summary { cursor: pointer; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: .85rem; overflow-wrap: normal; }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
{contents}{sections}
</body></html>
"""


def html_page(title, summary, sections, contents=False):
    """The page's bytes. sections: {heading: its HTML}; contents: whether links to them stand above."""
    anchors = {heading: re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") for heading in sections}
    body = [
        f'<h2 id="{anchors[heading]}">{html.escape(heading)}</h2>\n{content}' for heading, content in sections.items()
    ]
    page = PAGE.format(
        title=html.escape(title),
        style=STYLE,
        summary=html.escape(summary),
        contents=_links(anchors) if contents else "",
        sections="\n".join(body),
    )
    return page.encode()


def _links(anchors):
    """{heading: anchor} as a list of links."""
    links = [f'<li><a href="#{anchor}">{html.escape(heading)}</a></li>' for heading, anchor in anchors.items()]
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>\n'


def paragraph(text):
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def subheading(text):
    """A heading inside a section."""
    return f"<h3>{html.escape(text)}</h3>"


def picture(png, description):
    """An image with its alternative text; png: bytes."""
    width, height = _size(png)
    data = base64.b64encode(png).decode()
    alt = html.escape(description)
    return f'<img alt="{alt}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def chart(png, description):
    """A picture with writing in it.

    Where the page is narrow it shrinks as long as it can be read, and scrolls sideways from there.
    """
    smallest = _size(png)[0] * 6 // 10
    image = picture(png, description)
    return f'<div class="scroll" tabindex="0"><div style="min-width: {smallest}px">{image}</div></div>'


def _size(png):
    """(width, height) in pixels, from where every PNG file says them."""
    return struct.unpack(">II", png[16:24])


def gallery(pictures):
    """{title: PNG bytes} side by side, as many as fit, titles below."""
    shown = [
        f"<figure>{picture(png, title)}<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, png in pictures.items()
    ]
    return f'<div class="pictures">{"".join(shown)}</div>'


def html_table(lines):
    """Lists of cells, the heading first, in a box that scrolls sideways where it is too wide."""
    heading, *body = lines
    rows = ["".join(f"<th>{html.escape(str(text))}</th>" for text in heading)]
    rows += ["".join(_cell(str(text)) for text in line) for line in body]
    return '<div class="scroll" tabindex="0"><table>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>"


def _cell(text):
    tag = '<td class="long">' if len(text) > LONG else "<td>"
    return f"{tag}{html.escape(text)}</td>"


def preformatted(text):
    """Text with its line breaks."""
    return f"<pre>{html.escape(text)}</pre>"


def folded(title, content):
    """HTML that opens on a click."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"
