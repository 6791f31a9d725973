"""Metadata and extras; build system and tools are configured in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+?)"', (HERE / "vit_interact" / "__init__.py").read_text("utf-8")
).group(1)

EXTRAS = {
    # TensorFlow is what TFDS prepares most data sets with and clu writes TensorBoard with; training
    # does without.
    "train": ["array_record", "importlib_resources", "tensorflow", "tensorflow-datasets"],
    # Reads data sets that are prepared as ArrayRecord, without TensorFlow. TFDS 4.9.10 needs
    # importlib_resources to prepare one and does not say so.
    "tfds": ["array_record", "importlib_resources", "tensorflow-datasets"],
    "hub": ["huggingface_hub"],
    "notebook": ["anywidget", "jupyterlab"],
    # Drives the report and runs the notebooks of colabs/ in tests; also needs chromium.
    "browser": ["anywidget", "ipykernel", "nbclient", "nbformat", "playwright"],
    # Decodes JPEG files in two thirds of Pillow's time, to the same pixels (docs/benchmarks.md).
    "jpeg": ["simplejpeg"],
    # What benchmarks compare with; pinned, so that figures can be had again.
    "bench": ["scipy==1.17.1", "simplejpeg==1.9.0", "torch==2.13.0", "transformers==5.24.0"],
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "dev": [
        "beartype",
        "huggingface_hub",
        "mypy",
        "pre-commit",
        "pytest",
        "pytest-xdist",
        "ruff",
    ],
}

setup(
    name="vit-interact",
    version=VERSION,
    description="Patch interactions in Vision Transformers, measured, checked and drawn in JAX",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vit_interact", "vit_interact.*"]),
    include_package_data=False,
    package_data={
        "vit_interact": [
            "py.typed",
            "assets/*.md",
            "assets/*.safetensors",
            "assets/caltech101/*/*.jpg",
            "viz/static/*",
            "viz/templates/*",
        ]
    },
    install_requires=[
        "clu",
        "flax>=0.10.7",
        "grain>=0.2.18",
        "jax>=0.8",
        "jaxtyping>=0.3",
        "jinja2",
        "matplotlib>=3.10",
        "ml-collections",
        "numpy",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "pillow>=10.1",
        "rich",
        "safetensors",
        "tensorboardX",
        "typer>=0.16",
        "xarray>=2025.8",
        "zarr>=3.1.3",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vit-interact=vit_interact.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
