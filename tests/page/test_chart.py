import pytest

from extend.page.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    blend,
    format_bytes,
    shade,
    stretch,
    thin,
)


def test_ends_of_the_axes_are_the_ends_of_the_frame():
    for log in (False, True):
        chart = Chart("t", "x", (2.0, 200.0), (0.1, 10.0), log_x=log, log_y=log)
        assert (chart.x(2.0), chart.x(200.0)) == (LEFT, WIDTH - RIGHT)
        assert (chart.y(0.1), chart.y(10.0)) == (HEIGHT - BOTTOM, TOP)
        middle = (20.0, 1.0) if log else (101.0, 5.05)
        assert chart.x(middle[0]) == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1)
        assert chart.y(middle[1]) == pytest.approx((TOP + HEIGHT - BOTTOM) / 2, abs=0.1)


def test_what_lies_outside_is_drawn_on_the_frame():
    chart = Chart("t", "x", (1.0, 10.0), (1.0, 10.0), log_y=True)
    assert chart.y(0.0) == HEIGHT - BOTTOM and chart.x(11.0) == WIDTH - RIGHT


@pytest.mark.parametrize("limits, log, expected", [
    ((0.0, 1.0), False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ((1.0, 64.0), False, ["20", "40", "60"]),
    ((1.0, 60.0), True, ["1", "2", "5", "10", "20", "50"]),
    ((0.9, 2e6), True, ["1", "100", "10,000", "1e6"]),
    ((3.0, 3.0), False, ["3"]),
    ((2e-6, 3e-4), True, ["3e-6", "1e-5", "3e-5", "1e-4", "3e-4"]),
])
def test_ticks_are_round_and_few(limits, log, expected):
    chart = Chart("t", "x", limits, (0.0, 1.0), log_x=log)
    assert [text for _, text in chart.ticks_x] == expected


def test_sizes():
    assert [format_bytes(n) for n in (12, 1500, 134378464, 4.2e9)] == [
        "12 B", "1.5 kB", "134 MB", "4.2 GB"]


def test_shades_run_from_dark_to_light():
    assert (shade(0), shade(1), shade(0.5), shade(-3)) == ("#00204c", "#ffea46", "#7d7c78",
                                                           "#00204c")


def test_a_band_goes_along_its_lower_ends_and_back_along_its_upper():
    chart = Chart("t", "x", (0.0, 2.0), (0.0, 1.0), fixed_x=[(0.0, "none"), (2.0, "two")])
    chart.add_band([(0.0, 0.0, 0.5), (2.0, 0.25, 1.0)], "#000000")
    corners = [(0.0, 0.0), (2.0, 0.25), (2.0, 1.0), (0.0, 0.5)]
    assert chart.bands == [(" ".join(f"{chart.x(x)},{chart.y(y)}" for x, y in corners), "#000000")]
    assert chart.ticks_x == [(LEFT, "none"), (WIDTH - RIGHT, "two")]


@pytest.mark.parametrize("count", [5, 99, 100, 101, 4321])
def test_thinning_keeps_ends_order_and_every_spike(count):
    points = [(i, float(i % 7)) for i in range(count)]
    points[count // 2] = (count // 2, 1e6)
    points[count // 3] = (count // 3, -1e6)
    kept = thin(points, 100)
    assert len(kept) <= 100 and kept == sorted(kept) and set(kept) <= set(points)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert {points[count // 2], points[count // 3]} <= set(kept)
    assert (kept == points) == (count <= 100) == (stretch(count, 100) == 1)


def test_a_chart_is_said_in_words_and_lines_below_others_are_wider():
    chart = Chart("loss", "step", (1.0, 3.0), (0.0, 4.0))
    chart.add("a", "red", [(1, 4.0), (3, 0.5)], above=1)
    chart.add("b", "blue", [(1, 4.0), (3, 0.5)])
    assert chart.said == "loss, by step: a from 4 to 0.5; b from 4 to 0.5"
    assert chart.lines[0].width > chart.lines[1].width
    assert blend(0) == "#0072b2" and blend(1) == "#d55e00"
