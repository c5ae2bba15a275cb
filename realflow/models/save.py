"""Writing checkpoints: Hugging Face directories that load with `from_pretrained` alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from realflow.files import file_digest, sync
from realflow.models.causal import CausalModel

CHECKSUMS = "checksums.json"


def save_model(model: CausalModel, tokenizer: Any, directory: Path) -> dict[str, str]:
    """Save the compute weights and the tokenizer (None: no tokenizer) as `directory`.

    Everything is written beside it and renamed into place at the end, so that the directory is
    either whole or absent; one that exists is replaced. Returns the sha256 of each file by its name;
    `checksums.json` holds them too, but for its own. (Float32 masters belong to the training state, not
    here.)
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
        sums = {file.name: file_digest(file) for file in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
        sums[CHECKSUMS] = file_digest(partial / CHECKSUMS)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        replace_directory(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sums


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
    sync(target.parent)
