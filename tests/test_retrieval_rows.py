"""Where training hides its facts."""

import random

from extend.retrieval.rows import draw_depths


def test_a_quarter_of_the_rows_have_a_fact_at_the_very_beginning():
    rng = random.Random(0)
    rows = [draw_depths(facts, rng) for facts in (1, 8) for _ in range(2000)]
    assert all(0 <= depth < 1 for row in rows for depth in row)
    for some in (rows[:2000], rows[2000:]):
        first = sum(0.0 in row for row in some)
        assert 420 < first < 580 and max(row.count(0.0) for row in some) == 1
    others = [depth for row in rows for depth in row if depth]
    assert abs(sum(others) / len(others) - 0.5) < 0.02
