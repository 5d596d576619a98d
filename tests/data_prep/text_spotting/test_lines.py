"""Which lines of text stand under one another, on boxes written by hand."""

from data_prep.text_spotting.lines import stack_lines


def test_lines_under_one_another():
    give, way = (10, 90, 0, 20), (20, 80, 25, 45)
    assert stack_lines([give, way]) == [[0, 1]]
    assert stack_lines([way, give]) == [[1, 0]]  # from top to bottom, whatever the order
    assert stack_lines([give]) == [] and stack_lines([]) == []


def test_lines_that_do_not_belong_together():
    line = (10, 90, 0, 20)
    assert stack_lines([line, (100, 180, 25, 45)]) == []  # beside
    assert stack_lines([line, (80, 160, 25, 45)]) == []  # hardly under it
    assert stack_lines([line, (10, 90, 45, 65)]) == []  # more than a line between
    assert stack_lines([line, (10, 90, 25, 75)]) == []  # much larger letters
    assert stack_lines([line, (12, 88, 3, 23)]) == []  # on top of it


def test_columns_and_turned_lines():
    left = [(0, 50, 0, 10), (0, 40, 12, 22), (0, 50, 24, 34)]
    right = [(100, 150, 0, 10), (100, 140, 12, 22)]
    assert stack_lines([*left, *right]) == [[0, 1, 2], [3, 4]]
    # Turned by some degrees: four corners.
    upper = (0, 0, 80, 8, 78, 28, -2, 20)
    lower = (0, 24, 80, 32, 78, 52, -2, 44)
    assert stack_lines([lower, upper]) == [[1, 0]]
