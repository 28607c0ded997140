"""The course of a training: read once, drawn as a picture and on a page."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from extend.curves import draw_courses, read_courses
from extend.errors import CheckpointError


def write(directory: Path, records: list[dict]) -> Path:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def steps(count: int, **more: float) -> list[dict]:
    return [{"step": s, "phase": 1 + (s > 6), "nll": 4.0 / s, "loss": 4.0 / s,
             "answer_nll": None if s < 3 else 1.0, "peak_memory_bytes": 3 * 2**30} | more
            for s in range(1, count + 1)]


def test_what_was_measured_is_read(tmp_path: Path):
    loss, memory = read_courses(write(tmp_path, steps(10)))
    assert [curve.name for curve in loss.curves] == ["all tokens", "answers"]  # loss is nll
    assert loss.curves[0].points == [(s, 4.0 / s) for s in range(1, 11)]
    assert [step for step, _ in loss.curves[1].points] == list(range(3, 11))
    assert loss.phases == [(7, 2)]
    assert memory.curves[0].points[0] == (1, 3.0) and memory.y_range[0] == 0.0
    (line, _), chart = loss.chart().lines, loss.chart()
    points = [tuple(map(float, p.split(","))) for p in line.points.split()]
    assert points == [(chart.x(s), chart.y(4.0 / s)) for s in range(1, 11)]


def test_long_runs_keep_their_ends(tmp_path: Path):
    (loss, *_) = read_courses(write(tmp_path, steps(4999)))
    points = loss.curves[0].points
    assert points[0] == (1, 4.0) and points[-1] == (4999, 4.0 / 4999) and len(points) <= 2001


@pytest.mark.parametrize("count", [1, 10])
def test_a_picture_has_ink_of_every_curve(count: int, tmp_path: Path):
    draw_courses(read_courses(write(tmp_path, steps(count, mfu=0.5))), tmp_path / "training.png")
    picture = matplotlib.image.imread(tmp_path / "training.png")[..., :3]
    blue = np.array([0x00, 0x72, 0xb2]) / 255
    drawn = np.abs(picture - blue).max(-1) < 0.01
    half = picture.shape[0] // 2, picture.shape[1] // 2
    quarters = [drawn[:half[0], :half[1]], drawn[:half[0], half[1]:], drawn[half[0]:, :half[1]]]
    assert all(quarter.sum() > 10 for quarter in quarters)  # loss, MFU, memory
    assert picture[half[0]:, half[1]:].min() == 1.0  # nothing, not empty axes


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_courses(tmp_path)
    with pytest.raises(CheckpointError, match="holds no training metrics"):
        read_courses(write(tmp_path, [{"step": 1}]))
