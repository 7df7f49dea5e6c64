"""What `pip install gqsa-runtime` brings, as the distributions that are installed here say themselves."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PROJECT = Path(__file__).parents[1] / "runtime" / "pyproject.toml"
RUNTIME = "gqsa-runtime"
EXTRAS = ("signature",)  # of the runtime
# Licences that old metadata names by a trove classifier alone.
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
}
# How wheels that carry other libraries list them in their licence.
_BUNDLED = re.compile(r"^Name: (.+)\n(?:.*\n){0,6}?License: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Shipped:
    """A distribution. licence: an SPDX expression. bundled: (library, licence) of what its wheel carries beside it.

    needed_by: names of the distributions that ask for it, in order; the runtime's extras as "gqsa-runtime[signature]".
    texts: file name -> licence text. requires: names.
    """

    name: str
    version: str
    licence: str
    home: str
    needed_by: tuple[str, ...]
    bundled: tuple[tuple[str, str], ...]
    texts: dict[str, str]
    requires: tuple[str, ...]


def shipped() -> list[Shipped]:
    """The runtime's dependencies, theirs, and those of its extras, by name; the runtime itself is not among them.

    Markers are evaluated for this Python and system. Raises PackageNotFoundError for one that is not installed.
    """
    asked: dict[str, set[str]] = {}
    needs: dict[str, set[str]] = {}
    waiting = [(RUNTIME, "", RUNTIME), *((RUNTIME, extra, f"{RUNTIME}[{extra}]") for extra in EXTRAS)]
    done = set()
    while waiting:
        name, extra, label = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        for text in _requirements(name):
            requirement = Requirement(text)
            if requirement.marker is not None:
                # What an extra asks for, and not what is asked for without it, too.
                if not requirement.marker.evaluate({"extra": extra}):
                    continue
                if extra and requirement.marker.evaluate({"extra": ""}):
                    continue
            elif extra:
                continue
            other = canonicalize_name(requirement.name)
            asked.setdefault(other, set()).add(label)
            needs.setdefault(name, set()).add(other)
            waiting += [(other, each, other) for each in ("", *requirement.extras)]
    return [_describe(name, tuple(sorted(asked[name])), tuple(sorted(needs.get(name, ())))) for name in sorted(asked)]


def _requirements(name: str) -> list[str]:
    if name != RUNTIME:
        return importlib.metadata.requires(name) or []
    project = tomllib.loads(PROJECT.read_text())["project"]  # what is installed may be older
    extras = project["optional-dependencies"]
    assert set(extras) == set(EXTRAS), extras
    return project["dependencies"] + [f'{text}; extra == "{extra}"' for extra in extras for text in extras[extra]]


def _describe(name: str, needed_by: tuple[str, ...], requires: tuple[str, ...]) -> Shipped:
    found = importlib.metadata.distribution(name)
    texts = {
        str(file): Path(found.locate_file(file)).read_text(encoding="utf-8", errors="replace")
        for file in found.files or ()
        if ".dist-info" in file.parts[0] and re.match(r"(LICEN[CS]E|COPYING|NOTICE)", file.name, re.IGNORECASE)
    }
    bundled = sorted({pair for text in texts.values() for pair in _BUNDLED.findall(text)})
    return Shipped(
        name, found.version, _licence(found.metadata), _home(found.metadata), needed_by, tuple(bundled), texts, requires
    )


def _licence(metadata) -> str:
    if expression := metadata.get("License-Expression"):
        return expression
    written = (metadata.get("License") or "").strip()
    if written and len(written) < 60 and "\n" not in written:
        return written
    for classifier in metadata.get_all("Classifier") or ():
        kind, _, licence = classifier.rpartition(" :: ")
        if kind.startswith("License") and licence in _CLASSIFIERS:
            return _CLASSIFIERS[licence]
    raise ValueError(f"{metadata['Name']} {metadata['Version']} names no licence: look, and say it in {__file__}")


def _home(metadata) -> str:
    links = dict(link.split(", ", 1) for link in metadata.get_all("Project-URL") or ())
    for label in ("Source", "Repository", "Source Code", "Homepage", "source"):
        if label in links:
            return links[label]
    return metadata.get("Home-page") or next(iter(links.values()), "")
