"""A rank of a measurement, started by mpirun: `python -m realflow.profiling.worker FOLDER`.

FOLDER has `request.json`; rank 0 writes `rows.json` there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from realflow.profiling.attending import attention_jobs
from realflow.profiling.bench import Bench, Job
from realflow.profiling.decoding import decode_jobs, engine_jobs
from realflow.profiling.layers import end_jobs, layer_jobs
from realflow.profiling.messages import copy_jobs, message_jobs, move_jobs
from realflow.profiling.models import Models
from realflow.profiling.request import Request, Setting, powers
from realflow.profiling.training import step_jobs, update_jobs


def main(folder: Path) -> None:
    """Measure what `folder` asks for."""
    began = time.perf_counter()
    request = Request.from_json((folder / "request.json").read_text(encoding="utf-8"))
    rank = _rank()
    transformers.logging.set_verbosity_error()
    device = torch.device("cpu")
    if request.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder / 'meet'}", rank=rank, world_size=request.ranks
    )
    models = Models(folder, device)
    if rank == 0:
        for subject in request.subjects:
            models.write(subject, request.grids)
    dist.barrier()
    bench = Bench(rank, request.ranks, device, began + request.seconds, request.repeats, cores=request.cores)
    bench.make_groups(powers(request.ranks))
    bench.run(list(jobs(request, bench, models)))
    if rank == 0:
        rows = [asdict(row) for row in bench.at_pace()]
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def jobs(request: Request, bench: Bench, models: Models) -> Iterator[Job]:
    """All that is measured, in order: what takes little time, and what no plan does without, before the
    ranks that have no core of their own."""
    settings = request.settings()
    roomy = [one for one in settings if request.device != "cpu" or one.busy * one.threads <= request.cores]
    yield from copy_jobs(bench, settings[0], request.grids)
    for some in (roomy, [one for one in settings if one not in roomy]):
        busy = {one.busy for one in some}
        yield from _messages(request, bench, [ranks for ranks in powers(request.ranks)[1:] if ranks in busy])
        for setting in some:
            yield from _passes(request, bench, models, setting)


def _passes(request: Request, bench: Bench, models: Models, setting: Setting) -> Iterator[Job]:
    for subject in request.subjects:
        for part in (layer_jobs, decode_jobs, end_jobs, engine_jobs, attention_jobs):
            yield from part(subject, setting, bench, models, request.grids)
        if setting.t == 1:
            yield from step_jobs(subject, setting, bench, models)
            yield from update_jobs(subject, setting, bench, models)


def _messages(request: Request, bench: Bench, sizes: Sequence[int]) -> Iterator[Job]:
    threads = {ranks: max(1, request.cores // ranks) for ranks in powers(request.ranks)}
    for dtype in sorted({subject.dtype for subject in request.subjects}):
        yield from message_jobs(bench, sizes, threads, dtype, request.grids)
    yield from move_jobs(bench, sizes, threads, request.grids)


def _rank() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMIX_RANK") or 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
