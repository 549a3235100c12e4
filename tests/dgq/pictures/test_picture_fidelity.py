"""What is told of pictures beside others."""

from dgq.pictures.fidelity import spread


def test_spread_tells_of_the_worst() -> None:
    values = [float(i) for i in range(25)]
    assert spread(values, True) == {"median": 12, "worst_tenth": 0.5}
    assert spread(values, False) == {"median": 12, "worst_tenth": 23.5}
    assert spread([3.0], False) == {"median": 3, "worst_tenth": 3}
