"""Writing checkpoints: Hugging Face directories that load with `from_pretrained` alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from realflow.errors import InputError
from realflow.models.causal import CausalModel

CHECKSUMS = "checksums.json"


def save_model(model: CausalModel, tokenizer: Any, directory: Path) -> None:
    """Save the compute weights and the tokenizer (None: no tokenizer) as `directory`.

    Everything is written beside it and renamed into place at the end, so that the directory is
    either whole or absent; one that exists is replaced. `checksums.json` holds the sha256 of each
    file. (Float32 masters belong to the training state, not here.)
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        attention = model.config._attn_implementation
        with _on_any_rank(model.module):
            model.module.save_pretrained(partial, safe_serialization=True)
        assert model.config._attn_implementation == attention
        assert any(partial.glob("*.safetensors")), "save_pretrained wrote no weights"
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        sums = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
        for file in partial.iterdir():
            _sync(file)
        replace_directory(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _on_any_rank(module: PreTrainedModel) -> Iterator[None]:
    """Let this rank save: transformers 5.19 writes nothing on ranks other than 0 of the whole job,
    whatever `is_main_process` says, but here the rank that saves is the first of a train call."""
    module.should_save_on_this_rank = lambda is_main_process: True
    try:
        yield
    finally:
        del module.should_save_on_this_rank


def replace_directory(new: Path, target: Path) -> None:
    """Rename `new` to `target`, replacing a directory that is there."""
    if target.exists():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old)
    else:
        new.rename(target)
    _sync(target.parent)


def verify_checkpoint(directory: Path) -> None:
    """Raise InputError where a file of a saved checkpoint is missing or has changed."""
    listing = Path(directory) / CHECKSUMS
    if not listing.is_file():
        raise InputError(f"checkpoint {directory}: {CHECKSUMS} is missing; the checkpoint is incomplete")
    for name, expected in json.loads(listing.read_text()).items():
        file = Path(directory) / name
        if not file.is_file():
            raise InputError(f"checkpoint {directory}: {name} is missing")
        if _sha256(file) != expected:
            raise InputError(f"checkpoint {directory}: {name} is damaged (its checksum differs)")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make sure that a file's or directory's content is on disk before it counts."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
