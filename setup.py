"""Packaging: the programs, and the data that travels with the package."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
DATA = ("nodepool/agent", "nodepool/elements", "nodepool/store/migrations")

setup(
    name="nodepool",
    version="0.1.0",
    description="Keeps pools of bare-metal machines ready",
    long_description=(HERE / "README.rst").read_text() if (HERE / "README.rst").exists() else "",
    python_requires=">=3.11",
    packages=find_packages(include=["nodepool", "nodepool.*"]),
    package_data={
        "nodepool": [
            str(path.relative_to(HERE / "nodepool"))
            for folder in DATA
            for path in sorted((HERE / folder).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        ]
    },
    install_requires=[
        line.split("#")[0].strip()
        for line in (HERE / "requirements.txt").read_text().splitlines()
        if line.split("#")[0].strip()
    ],
    entry_points={
        "console_scripts": [
            "nodepoold=nodepool.cmd.daemon:main",
            "nodepool=nodepool.cmd.cli:main",
            "nodepool-rack=nodepool.cmd.rack:main",
        ]
    },
)
