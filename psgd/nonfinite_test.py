import numpy as np

from psgd.nonfinite import all_finite, counted, too_many


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    total = in_a_row = 0
    history = []
    for skipped in (1, 1, 0, 1):
        total, in_a_row = counted(total, in_a_row, skipped)
        history.append((total, in_a_row))
    assert history == [(1, 1), (2, 2), (2, 0), (3, 1)]


def test_one_look_at_all():
    finite, bad = np.ones(3), np.array([1.0, np.inf])
    assert all_finite([finite, finite]) and not all_finite([finite, bad])


def test_what_is_said_names_the_tensor_where_it_is_known():
    assert too_many(3, "w").startswith("3 steps in a row had a gradient that is not finite, this one of w; lower")
    assert too_many(3).startswith("3 steps in a row had a gradient that is not finite; lower")
