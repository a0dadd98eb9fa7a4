"""Tables that line up, pictures that are there whole."""

from matplotlib import pyplot as plt

from ngjax.report import markdown_table, save_figure


def test_columns_line_up():
    rows = [("a", "of", "1"), ("bb", "c", "1,000")]
    assert markdown_table(("", "kind", "n"), rows, titles=2).splitlines() == [
        "|    | kind |     n |",
        "| -- | ---- | ----: |",
        "| a  | of   |     1 |",
        "| bb | c    | 1,000 |",
    ]
    assert markdown_table(("", "n"), [("a", "1")]).splitlines()[1] == "| - | : |"


def test_a_figure_is_saved_and_closed(tmp_path):
    figure, _ = plt.subplots()
    save_figure(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert not plt.fignum_exists(figure.number)
