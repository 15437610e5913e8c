"""Packaging only: metadata and dependencies live in pyproject.toml. Nothing is probed or compiled here."""

from setuptools import setup

setup()
