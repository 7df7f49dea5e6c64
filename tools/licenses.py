"""Writes docs/licenses.md: `python -m tools.licenses`; with `--texts` prints the texts of what is installed here."""

from __future__ import annotations

import sys
from pathlib import Path

import jinja2

from tools.shipped import RUNTIME, Shipped, shipped

PAGE = Path(__file__).parents[1] / "docs" / "licenses.md"
_TEMPLATE = Path(__file__).with_name("licenses.md.j2")


def page(distributions: list[Shipped]) -> str:
    """docs/licenses.md."""
    template = jinja2.Template(_TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    return template.render(rows="".join(map(row, distributions)))


def row(one: Shipped) -> str:
    """A line of the table; it names no version, so that it need not change with each."""
    inside = "".join(f"; its wheel carries {name} ({licence})" for name, licence in one.bundled)
    return f"| [{one.name}]({one.home}) | {one.licence}{inside} | {', '.join(one.needed_by)} |\n"


def texts(distributions: list[Shipped]) -> str:
    """The licence texts of all of them, each under its name and version."""
    parts = []
    for one in distributions:
        parts.append(f"{'=' * 100}\n{one.name} {one.version}: {one.licence}\n{one.home}\n")
        parts += [f"{'-' * 100}\n{name}\n\n{text}" for name, text in one.texts.items()]
        if not one.texts:
            parts.append(f"(The distribution holds no text; the licence is {one.licence}.)\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    """--texts prints the texts; without it the page is written."""
    distributions = shipped()
    if arguments == ["--texts"]:
        print(texts(distributions))
        return
    PAGE.write_text(page(distributions), encoding="utf-8")
    print(f"{PAGE}: what {RUNTIME} brings are {len(distributions)} distributions", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
