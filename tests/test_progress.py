import io

import pytest

from ppreid_dist.progress import LOG, TERMINAL, note, progress_bar, say


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "pause"), [(io.StringIO, LOG), (Screen, TERMINAL)])
def test_a_bar_is_drawn_rarely_into_a_file(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], pause: float
) -> None:
    # Time is the test's own: 100 steps of a second.
    now = [0.0]
    monkeypatch.setattr("sys.stderr", stderr := stream())
    bar = progress_bar(total=100, desc="train", unit="step", shown=True, file=stderr)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = 0.0
    for _ in range(99):
        now[0] += 1.0
        bar.update()
    assert stderr.getvalue().count("\r") == 1 + 99 // max(1, int(pause)), stderr.getvalue()
    bar.close()
    assert "train" in stderr.getvalue()


def test_no_bar_where_none_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(3), shown=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_what_is_said_into_a_file_is_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(shown=True, desc="attack", unit=" training") as bar:
        for step in range(20):
            note(bar, f"step {step}")
        say("  ridge: found")
    out, err = capsys.readouterr()
    assert out == "  ridge: found\n"
    assert err.count("\r") == 2 and "step 19" in err  # at the beginning and the end
