"""What is told to those who ship the runtime: versions, licences, the bill of materials."""

import inspect
import json
import re

import gqsa_runtime
import pytest
from gqsa_runtime import format as gqsa

import gqsac
from gqsac import quantization_config
from tests.e2e.command import ROOT


def test_one_version_everywhere():
    (newest, *_) = re.findall(r"^## ([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == gqsac.__version__ == gqsa_runtime.__version__
    for project in (ROOT / "pyproject.toml", ROOT / "runtime" / "pyproject.toml"):
        assert f'version = "{newest}"' in project.read_text()


def test_the_promise_names_the_formats():
    promise = (ROOT / "docs" / "application.md").read_text()
    assert f"`.gqsa` files, format version {gqsa.FORMAT_VERSION} |" in promise
    assert f"versions {quantization_config.STREAMS_VERSION} and {quantization_config.FORMAT_VERSION} |" in promise


@pytest.fixture(scope="module")
def distributions():
    pytest.importorskip("packaging", reason="packaging reads requirements; install the extra 'dev'")
    from tools.shipped import shipped

    return shipped()


def test_the_page_of_licences_is_current(distributions):
    """Rows of direct dependencies word for word. What those need changes without us, but no licence may be new."""
    from tools import licenses

    page = licenses.PAGE.read_text()
    direct = [one for one in distributions if any(name.startswith("gqsa-runtime") for name in one.needed_by)]
    assert {"numpy", "tokenizers", "cryptography"} < {one.name for one in direct}
    for one in direct:
        assert f"| {one.licence}" in page, f"{one.name}: run python -m tools.licenses"
        assert re.search(rf"^\| \[{one.name}\]\(.*\) \| {re.escape(one.licence)}[;| ]", page, re.MULTILINE), one.name
    for one in distributions:
        for licence in (one.licence, *(licence for _, licence in one.bundled)):
            assert licence in page, f"{one.name} is under {licence}: look at it, and run python -m tools.licenses"
    assert page.endswith(licenses.page([]).split("|---|---|---|\n", 1)[1])  # what a file carries
    assert "Permission is hereby granted" in licenses.texts(distributions)


def test_the_bill_of_materials(distributions):
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib writes it; install the extra 'dev'")
    from tools.sbom import bill

    made = json.loads(bill(distributions))
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    assert made["metadata"]["component"]["purl"] == f"pkg:pypi/gqsa-runtime@{gqsa_runtime.__version__}"
    assert {part["name"]: part["version"] for part in made["components"]} == {
        one.name: one.version for one in distributions
    }
    needs = {each["ref"]: set(each.get("dependsOn", ())) for each in made["dependencies"]}
    assert {"numpy", "cryptography"} < needs["gqsa-runtime"] and "markupsafe" in needs["jinja2"]
    assert all(part["licenses"] for part in made["components"])


def test_the_reference_holds_every_public_name(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc writes the reference; install the extra 'dev'")
    from tools.reference import write

    page = write(tmp_path).read_text()  # warnings are errors there
    for name in gqsa_runtime.__all__:
        assert f'id="{name}"' in page
        found = getattr(gqsa_runtime, name)
        members = {f"{name}.{key}": value for key, value in vars(found).items()} if inspect.isclass(found) else {}
        for label, value in {name: found, **members}.items():
            if label.split(".")[-1].startswith("_") or not (
                callable(value) or isinstance(value, (property, classmethod))
            ):
                continue
            value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            assert inspect.getdoc(value) and len(inspect.getdoc(value)) > 15, f"{label} has no docstring"
            assert f'id="{label}"' in page, label
