"""Package description. The list is explicit: `kernels` is a folder beside the package, reached through a link."""

from pathlib import Path

from setuptools import setup

setup(
    name="hsivi_fast",
    version="0.1.0",
    description="Few-step samplers from diffusion models: HSIVI-SM, made fast",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[
        "hsivi_fast",
        "hsivi_fast.checkpoints",
        "hsivi_fast.configs",
        "hsivi_fast.export",
        "hsivi_fast.kernels",
        "hsivi_fast.method",
        "hsivi_fast.metrics",
        "hsivi_fast.nets",
        "hsivi_fast.ops",
        "hsivi_fast.parallel",
        "hsivi_fast.report",
        "hsivi_fast.sampling",
        "hsivi_fast.training",
    ],
    package_dir={"hsivi_fast.configs": "configs"},
    package_data={
        "hsivi_fast": ["assets/*"],
        "hsivi_fast.configs": ["*.yaml", "*.json"],
        "hsivi_fast.kernels": ["*.md"],
    },
    include_package_data=False,
    entry_points={"console_scripts": ["hsivi = hsivi_fast.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "numpy",
        "triton; platform_system == 'Linux'",
        "deepspeed; platform_system == 'Linux'",
        "nvidia-ml-py",
        "torch-fidelity>=0.4",
        "scikit-learn",
        "safetensors",
        "matplotlib",
        "pillow",
        "tqdm",
        "tensorboard",
        "omegaconf>=2.3",
        "pyyaml",
        "pydantic>=2.5",
        "click>=8.1",
        "diffusers",
    ],
    extras_require={
        "dev": ["ruff", "pytest", "hypothesis", "pytest-benchmark", "pytest-xdist", "scipy"],
        "wandb": ["wandb"],
    },
)
