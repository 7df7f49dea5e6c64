"""Writes a bill of materials of the runtime, CycloneDX 1.6 in JSON: `python -m tools.sbom > runtime.cdx.json`.

Of the versions that are installed here: whoever ships an application runs it where the application is put together.
"""

from __future__ import annotations

import sys

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from gqsa_runtime import __version__
from packageurl import PackageURL

from tools.shipped import RUNTIME, Shipped, shipped

_VERSION = SchemaVersion.V1_6


def bill(distributions: list[Shipped]) -> str:
    """The JSON text."""
    licences = LicenseFactory()
    bom = Bom()
    runtime = Component(
        name=RUNTIME,
        version=__version__,
        type=ComponentType.LIBRARY,
        purl=PackageURL("pypi", None, RUNTIME, __version__),
        bom_ref=RUNTIME,
        licenses=[licences.make_from_string("Apache-2.0")],
    )
    bom.metadata.component = runtime
    components = {
        one.name: Component(
            name=one.name,
            version=one.version,
            type=ComponentType.LIBRARY,
            purl=PackageURL("pypi", None, one.name, one.version),
            bom_ref=one.name,
            licenses=[licences.make_from_string(one.licence)],
            components=[  # that the wheel carries
                Component(name=name, type=ComponentType.LIBRARY, licenses=[licences.make_from_string(licence)])
                for name, licence in one.bundled
            ],
            external_references=[ExternalReference(type=ExternalReferenceType.WEBSITE, url=XsUri(one.home))],
        )
        for one in distributions
    }
    for one in distributions:
        bom.components.add(components[one.name])
        bom.register_dependency(components[one.name], [components[name] for name in one.requires])
    direct = [one for one in distributions if any(name.startswith(RUNTIME) for name in one.needed_by)]
    bom.register_dependency(runtime, [components[one.name] for one in direct])
    return make_outputter(bom, OutputFormat.JSON, _VERSION).output_as_string(indent=1)


if __name__ == "__main__":
    sys.stdout.write(bill(shipped()) + "\n")
