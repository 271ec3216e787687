"""The time that a run will take, from the pace of its first answers."""

from mis_jax.cli.eta import TimeAhead


class Run:
    """A clock and what was said, over sets of 100 and 900 questions asked 10 at once."""

    def __init__(self) -> None:
        self.now, self.said, self.shown = 0.0, [], []
        self.ahead = TimeAhead(1000, 10, self.said.append, lambda: self.now)

    def answer(self, total: int, *steps: tuple[float, int]) -> None:
        """(seconds since the last, answers by then) of one set."""
        show = self.ahead.watch(lambda done, of: self.shown.append((done, of)))
        for seconds, done in steps:
            self.now += seconds
            show(done, total)


def test_the_first_round_is_not_timed_and_the_second_is() -> None:
    run = Run()
    run.answer(100, (0, 0), (500, 10), (20, 20), (1, 30))  # compiled in 500 s, then 2 s an answer
    assert run.said == [
        "about 33 min for the 980 answers that are left, if they take as long as 10 of the first"
    ]
    assert run.shown == [(0, 100), (10, 100), (20, 100), (30, 100)]


def test_answers_one_by_one_count_from_the_first_round_on() -> None:
    run = Run()
    steps = [(4.0 if done % 10 == 1 else 0.0, done) for done in range(1, 101)]
    run.answer(100, (0, 0), *steps)
    assert run.said == [
        "about 7 min for the 980 answers that are left, if they take as long as 10 of the first"
    ]


def test_answers_of_an_earlier_session_are_neither_timed_nor_ahead() -> None:
    run = Run()
    run.answer(100, (0, 100))
    run.answer(900, (0, 800), (9, 810), (100, 820))
    assert run.said == [
        "about 13 min for the 80 answers that are left, if they take as long as 10 of the first"
    ]


def test_little_is_said_of_little() -> None:
    run = Run()
    run.answer(100, (0, 0), (1, 10), (0.5, 20))  # a minute and less
    assert run.said == []
    other = Run()
    other.answer(15, (0, 0), (100, 10), (100, 15))
    assert other.said == []
