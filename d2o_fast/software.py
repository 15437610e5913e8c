"""Versions of the installed software."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """The installed version of a distribution, by its name on PyPI; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of each installed package in ``packages``, by name."""
    found = {package: version_of(package) for package in packages}
    return {"Python": platform.python_version(), **{name: number for name, number in found.items() if number}}
