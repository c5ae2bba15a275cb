"""Training state on disk: one safetensors file for each rank, readable under any number of ranks."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from realflow.engines.train import MasterState, TrainEngine
from realflow.errors import InputError
from realflow.files import beside


def save_state(engine: TrainEngine, directory: Path, rank: int, size: int) -> Path:
    """Write this rank's masters and optimizer moments; returns the file, whole or not there at all."""
    state = engine.master_state()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"shard-{rank:05d}-of-{size:05d}.safetensors"
    facts = {"digest": state.digest, "start": state.start, "stop": state.stop, "version": state.version}
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    with beside(path) as partial:
        save_file(tensors, partial, metadata={name: str(value) for name, value in facts.items()})
    return path


def load_state(engine: TrainEngine, directory: Path) -> None:
    """Continue from the files of a run with any number of ranks; only what meets this rank is read.

    Raises InputError where files are missing, damaged or of another model.
    """
    mine = engine.master_state()
    states = []
    for path in sorted(directory.glob("shard-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                start, stop = int(facts["start"]), int(facts["stop"])
                meets = max(start, mine.start) < min(stop, mine.stop)
                tensors = {name: file.get_tensor(name) for name in file.keys()} if meets else {}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"training state {path}: it cannot be read ({error})") from error
        states.append(MasterState(facts["digest"], start, stop, int(facts["version"]), tensors))
    if not states:
        raise InputError(f"training state {directory}: no shard-*.safetensors is there")
    engine.load_master_state(states)
