"""metrics.jsonl, samples.jsonl and TensorBoard events, read back and after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from realflow.errors import RunError
from realflow.observe.files import AppendFile, json_line, read_lines, write_whole
from realflow.observe.metrics import MetricsLog, SamplesLog, read_metrics

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_a_line_is_one_line_of_strict_json(row):
    line = json_line(row)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")

    def refuse(word):
        raise AssertionError(word)

    assert set(json.loads(line, parse_constant=refuse)) == set(row)


def test_surrogates_of_broken_text_survive():
    assert json.loads(json_line({"completion": "a\udc80b"}))["completion"] == "a\udc80b"


@settings(max_examples=10, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(width=32), min_size=1), max_size=5))
def test_metrics_come_back_from_both_files(tmp_path_factory, steps):
    run_dir = tmp_path_factory.mktemp("run")
    with MetricsLog(run_dir) as log:
        for step, values in enumerate(steps):
            log.step(step, values)
    rows = read_metrics(run_dir)
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [row["step"] for row in rows] == list(range(len(steps)))
    for step, (row, values) in enumerate(zip(rows, steps, strict=True)):
        for name, value in values.items():
            assert row[name] == (value if math.isfinite(value) else None)
            event = next(event for event in board.Scalars(name) if event.step == step)
            assert event.value == value or (math.isnan(event.value) and math.isnan(value))


def test_a_repeated_step_counts_once_and_files_continue(tmp_path):
    for reward in (0.25, 0.5):
        with MetricsLog(tmp_path) as log:
            log.step(0, {"reward": reward})
    assert [row["reward"] for row in read_metrics(tmp_path)] == [0.5]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_wrong_metrics_are_refused(tmp_path):
    with MetricsLog(tmp_path) as log:
        with pytest.raises(ValueError, match="step"):
            log.step(0, {"step": 1.0})
        with pytest.raises((TypeError, ValueError)):
            log.step(0, {"reward": "high"})
    assert read_metrics(tmp_path) == []


def test_half_a_line_of_a_crashed_machine_spoils_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "a": 1.0}\n{"step": 1, "a"')
    with MetricsLog(tmp_path) as log:
        log.step(1, {"a": 2.0})
    assert [(row["step"], row["a"]) for row in read_metrics(tmp_path)] == [(0, 1.0), (1, 2.0)]
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("whole", [b"", b"{}\n", b"x" * 70_000 + b"\n{}\n"])
@pytest.mark.parametrize("cut", [b"", b"{", b"y" * 200_000])
def test_a_cut_line_is_cut_off_wherever_it_began(tmp_path, whole, cut):
    (tmp_path / "x").write_bytes(whole + cut)
    AppendFile(tmp_path / "x", lines=True).close()
    assert (tmp_path / "x").read_bytes() == whole


def test_no_space_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = AppendFile(tmp_path / "x", lines=True)
    file.write(b"whole\n")
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    with pytest.raises(RunError, match="3 of 9 bytes"):
        file.write(b"too long\n")
    assert (tmp_path / "x").read_bytes() == b"whole\n"


def test_samples_keep_text_as_it_is(tmp_path):
    rows = [{"step": 0, "completion": "zwölf\n\x00\u2028 {}", "rewards": float("nan")}, {"step": 0}]
    with SamplesLog(tmp_path) as log:
        log.write(rows)
        log.write([])
    back = list(read_lines(tmp_path / "samples.jsonl"))
    assert back == [{"step": 0, "completion": "zwölf\n\x00\u2028 {}", "rewards": None}, {"step": 0}]


def test_write_whole_leaves_nothing_beside_itself_when_it_fails(tmp_path):
    write_whole(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a", 3)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


WRITER = """
import sys
from realflow.observe.metrics import MetricsLog, SamplesLog
log, samples = MetricsLog(sys.argv[1]), SamplesLog(sys.argv[1])
assert "torch" not in sys.modules
print("ready", flush=True)
for step in range(10**9):
    log.step(step, {f"metric/{k}": step + k / 7 for k in range(40)})
    samples.write([{"step": step, "completion": "x" * 5000}] * 8)
"""


@pytest.mark.parametrize("wait", [0.05, 0.21])
def test_a_kill_leaves_whole_records(tmp_path, wait):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
    for name in ("metrics.jsonl", "samples.jsonl"):
        # The kernel may end a killed write between two pages: then the last line, and no other, is cut.
        *whole, _ = (tmp_path / name).read_bytes().split(b"\n")
        rows = [json.loads(line) for line in whole]
        assert list(read_lines(tmp_path / name)) == rows
    with MetricsLog(tmp_path), SamplesLog(tmp_path):
        pass
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_bytes().endswith(b"\n"), "the next run cuts it off"
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    events, rows = board.Scalars("metric/3"), read_metrics(tmp_path)
    assert len(rows) - 1 <= len(events) <= len(rows)


def test_observe_imports_no_torch():
    rooms = "metrics trace progress report"
    code = "import sys\n" + "\n".join(f"import realflow.observe.{room}" for room in rooms.split())
    code += "\nassert not {'torch', 'tensorflow', 'zmq'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])
