import numpy as np
from matplotlib.figure import Figure

from extend.transfer.plot import _draw_losses, _draw_weights, draw_course

LOOKS = [{"step": s, "objective": 1 / (s + 1), "kl": 0.5 / (s + 1), "retrieval_loss": r}
         for s, r in ((0, 1.0), (5, 0.7))]
GROUPS = {"layers.1.mlp": 0.4, "layers.0.mlp": 0.9, "layers.10.mlp": 0.1, "layers.0.norms": 1.2,
          "vocabulary": 0.8}


def test_each_loss_is_a_line_over_the_steps():
    axes = Figure().subplots()
    _draw_losses(axes, {"from 1": LOOKS})
    lines = {line.get_label(): np.array(line.get_xydata()) for line in axes.lines}
    np.testing.assert_allclose(lines["from 1: objective"], [[0, 1], [5, 1 / 6]])
    np.testing.assert_allclose(lines["from 1: retrieval loss"], [[0, 1.0], [5, 0.7]])
    assert len(lines) == 3


def test_a_lesson_without_long_rows_has_no_line_of_them():
    axes = Figure().subplots()
    _draw_losses(axes, {"repair": [{**look, "retrieval_loss": None} for look in LOOKS]})
    assert [line.get_label() for line in axes.lines] == ["repair: objective", "repair: kl"]


def test_weights_are_in_the_order_of_the_layers():
    axes = Figure().subplots()
    _draw_weights(axes, GROUPS)
    lines = {line.get_label(): np.array(line.get_xydata()) for line in axes.lines}
    np.testing.assert_allclose(lines["mlp"], [[0, 0.9], [1, 0.4], [10, 0.1]])
    np.testing.assert_allclose(lines["norms"], [[0, 1.2]])
    assert [text.get_text() for text in axes.texts] == ["vocabulary"]


def test_pictures_are_written(tmp_path):
    draw_course(tmp_path / "fit.png", {"from 1": LOOKS, "from 0.5": LOOKS}, GROUPS)
    draw_course(tmp_path / "repair.png", {"repair": LOOKS})
    for name in ("fit.png", "repair.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
