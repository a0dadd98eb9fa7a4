"""Tables that line up, pictures that are there whole."""

from matplotlib import pyplot as plt

from ngjax.report import deviation_of, markdown_table, save_figure, with_deviation


def test_columns_line_up():
    rows = [("a", "of", "1"), ("bb", "c", "1,000")]
    assert markdown_table(("", "kind", "n"), rows, titles=2).splitlines() == [
        "|    | kind |     n |",
        "| -- | ---- | ----: |",
        "| a  | of   |     1 |",
        "| bb | c    | 1,000 |",
    ]
    assert markdown_table(("", "n"), [("a", "1")]).splitlines()[1] == "| - | : |"


def test_deviations_are_those_of_samples():
    assert deviation_of([1.0, 3.0]) == 2**0.5
    assert deviation_of([1.0]) is None
    assert with_deviation(0.5, deviation_of([0.4, 0.4]), ".1%") == "50.0% ± 0.0%"
    assert with_deviation(0.5, None, ".1%") == "50.0%"


def test_a_figure_is_saved_and_closed(tmp_path):
    figure, _ = plt.subplots()
    save_figure(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert not plt.fignum_exists(figure.number)
