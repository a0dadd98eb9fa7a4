import json

import pytest

from ngjax import train


def test_rows_are_on_disk_when_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = train.MetricsFile(path)
    file.write({"step": 1, "loss": 0.5})
    assert train.read_metrics(path) == [{"step": 1, "loss": 0.5}]
    file.close()


def test_continues_with_the_rows_it_is_given(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (2, 4, 6)))
    file = train.MetricsFile(path, train.read_metrics(path, last_step=4))
    file.write({"step": 6, "loss": 1.0})
    file.close()
    assert train.read_metrics(path) == [{"step": 2}, {"step": 4}, {"step": 6, "loss": 1.0}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4, "lo')
    assert train.read_metrics(path) == [{"step": 2}]


def test_no_file_has_no_rows(tmp_path):
    assert train.read_metrics(tmp_path / "metrics.jsonl") == []


def test_every_line_is_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = train.MetricsFile(path)
    file.write({"step": 1, "loss": float("nan"), "norm": float("-inf")})
    file.close()

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "norm": None}


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}'])
def test_other_files_are_refused_by_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        train.read_metrics(path, last_step=3)
