"""Build script. Metadata stands in pyproject.toml; native extensions are to be listed here."""

from setuptools import setup

setup()
