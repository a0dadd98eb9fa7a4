import io

from ngjax import train


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def run(stream, *, seconds_per_step, num_steps, evaluate_after=None):
    """Compiles for 50 s, then trains; an evaluation takes 70 s."""
    clock = Clock()
    progress = train.Progress(num_steps, stream, clock=clock)
    clock.now += 50
    for step in range(1, num_steps + 1):
        clock.now += seconds_per_step
        progress.update(step, 1 / step)
        if step == evaluate_after:
            with progress.paused():
                clock.now += 70
    progress.close()


def test_a_plain_line_now_and_then():
    stream = io.StringIO()
    run(stream, seconds_per_step=2.0, num_steps=40, evaluate_after=10)
    # 30 s apart: right after compiling, after the evaluation, 30 s later, and at the end.
    assert stream.getvalue() == (
        "step 1/40  loss 1\n"
        "step 11/40  loss 0.09091  0.5 steps/s  0:58 left\n"
        "step 26/40  loss 0.03846  0.5 steps/s  0:28 left\n"
        "step 40/40  loss 0.025  0.5 steps/s  0:00 left\n"
    )


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    run(stream, seconds_per_step=100.0, num_steps=48)
    draws = stream.getvalue().split("\r")
    assert len(draws) == 1 + 48
    assert draws[24] == "[############............] step 24/48  loss 0.04167  0.01 steps/s  40:00 left\x1b[K"
    assert "1:13:20 left" in draws[4]
    assert draws[48].endswith("0:00 left\x1b[K\n")


def test_a_bar_is_not_drawn_at_every_step():
    stream = Terminal()
    run(stream, seconds_per_step=0.01, num_steps=100)
    assert 8 < stream.getvalue().count("\r") < 13


def test_a_bar_fits_on_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    run(stream, seconds_per_step=1.0, num_steps=5)
    draws = stream.getvalue().split("\r")[1:]
    assert max(len(draw.removesuffix("\n").removesuffix("\x1b[K")) for draw in draws) == 39


def test_silent_without_a_stream():
    run(None, seconds_per_step=1.0, num_steps=3)


def test_a_bar_that_never_started_leaves_no_line():
    stream = Terminal()
    train.Progress(10, stream).close()
    assert stream.getvalue() == ""
