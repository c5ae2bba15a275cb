"""Large files open in seconds and in memory that does not grow with them: peaks of child processes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")

LINE = b'{"prompt": "What is 0000000 + 0000001?", "answer": "00000001", "extra": {"level": "0000000"}}\n'
PLACES = [LINE.index(b"0000000"), LINE.rindex(b"0000000")]
BLOCK = 100_000

CHILD = """\
import json, sys, time
from realflow.data import arrow
from realflow.data.source import open_source
from realflow.graph.types import DataSpec
kind, small, path, rows, held = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
arrow.HELD_BYTES = held
fields = {"prompt": "prompt", "level": "extra.level", **({"pad": "pad"} if kind == "parquet" else {})}
PEAKopen_source(DataSpec(kind, fields, path=small), seed=1).row(3)  # what is imported does not count
before, started = peak(), time.perf_counter()
source = open_source(DataSpec(kind, fields, path=path), seed=1)
opened = time.perf_counter() - started
assert len(source) == rows, len(source)
seen = [source.row(g) for g in range(2000)]
for row in seen:
    assert row["prompt"] == f"What is {row['level']} + 0000001?", row
assert len({row["level"] for row in seen}) == 2000
assert max(int(row["level"]) for row in seen) > rows * .99
read = time.perf_counter() - started - opened
print(json.dumps({"grown": peak() - before, "opened": opened, "read": read}))
"""

WHOLE = """\
import json, sys
PEAKbefore = peak()
rows = [json.loads(line) for line in open(sys.argv[1])]
print(peak() - before)
"""

# Not getrusage's peak, which a child begins with that of the process which started it.
PEAK = """\
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
"""


def blocks(rows: int) -> Iterator[np.ndarray]:
    """Lines, uint8 [BLOCK or fewer, len(LINE)], numbered from 0 in two places."""
    for start in range(0, rows, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, rows))
        digits = (numbers[:, None] // 10 ** np.arange(6, -1, -1) % 10 + ord("0")).astype(np.uint8)
        lines = np.tile(np.frombuffer(LINE, np.uint8), (len(numbers), 1))
        for place in PLACES:
            lines[:, place : place + 7] = digits
        yield lines


def tables(rows: int, pad: int = 0) -> Iterator:
    """The same rows as tables of Arrow, with a further column of `pad` letters."""
    place = LINE.index(b"What")
    for lines in blocks(rows):
        texts = np.ascontiguousarray(lines[:, place : place + len("What is 0000000 + 0000001?")])
        numbers = np.ascontiguousarray(lines[:, PLACES[1] : PLACES[1] + 7])
        prompt, level = (
            pa.array(part.view(f"S{part.shape[1]}").ravel()).cast(pa.string()) for part in (texts, numbers)
        )
        columns = {"prompt": prompt, "extra": pa.StructArray.from_arrays([level], ["level"])}
        if pad:
            noise = np.random.default_rng(0).integers(97, 123, (len(lines), pad), np.uint8)
            columns["pad"] = pa.array(noise.view(f"S{pad}").ravel()).cast(pa.string())
        yield pa.table(columns)


def write(kind: str, folder: Path, rows: int, group: int, pad: int = 1) -> Path:
    """A file of so many rows, or the folder of a saved dataset (`test_data_files` has real ones)."""
    folder.mkdir()
    if kind == "jsonl":
        with (folder / "a.jsonl").open("wb") as file:
            for lines in blocks(rows):
                file.write(lines.data)
        return folder / "a.jsonl"
    if kind == "parquet":
        from pyarrow import parquet

        joined = pa.concat_tables(tables(rows, pad))
        parquet.write_table(joined, folder / "a.parquet", row_group_size=group)
        return folder / "a.parquet"
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    source = tables(rows)
    first = next(source)
    with pa.ipc.new_stream(folder / "data.arrow", first.schema) as stream:
        stream.write_table(first, max_chunksize=1000)
        for table in source:
            stream.write_table(table, max_chunksize=1000)
    return folder


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that is gone behind the test, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="realflow-scale-"))
    yield folder
    shutil.rmtree(folder)


def measured(
    kind: str, place: Path, rows: int, group: int, held: int, pad: int = 1, **env: str
) -> dict[str, float]:
    small, large = write(kind, place / "small", 1000, 100), write(kind, place / "large", rows, group, pad)
    command = [
        sys.executable,
        "-c",
        CHILD.replace("PEAK", PEAK),
        kind,
        str(small),
        str(large),
        str(rows),
        str(held),
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_two_hundred_thousand_rows(place: Path, kind: str) -> None:
    """The parquet file has 100 MB in two row groups: decoding them takes a few pages of each column. What
    Arrow's usual allocator keeps for later, some 40 MB, is left out."""
    pool = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    found = measured(kind, place, 200_000, 100_000, 1 << 20, pad=500, **pool)
    assert found["grown"] < (50e6 if kind == "parquet" else 12e6), found


def test_a_reader_that_holds_its_rows_is_found_out(place: Path) -> None:
    """The control of the limit above."""
    path = write("jsonl", place / "large", 200_000, 0)
    command = [sys.executable, "-c", WHOLE.replace("PEAK", PEAK), str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) > 60e6


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_ten_million_rows(place: Path, kind: str) -> None:
    """A gigabyte; the parquet file in pyarrow's own row groups of a million rows."""
    found = measured(kind, place, 10_000_000, 1 << 20, 64 << 20)
    print(kind, found)
    assert found["grown"] < (140e6 if kind == "parquet" else 40e6), found
    assert found["opened"] < 30, found
