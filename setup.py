"""What pyproject.toml cannot say: found packages, and one more that is found elsewhere, `l3rs.checkpoints`."""

from setuptools import find_namespace_packages, setup

setup(packages=[*find_namespace_packages(include=["l3rs*", "tasks*", "metatrain*"]), "l3rs.checkpoints"])
