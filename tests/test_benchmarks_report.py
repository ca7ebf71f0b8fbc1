"""Reports: what is read is what was written, and every figure reaches the reader."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from tilewise.benchmarks import report as reports
from tilewise.benchmarks import roofline
from tilewise.benchmarks.measure import Row
from tilewise.benchmarks.report import Report, ReportError
from tilewise.benchmarks.tokens import TokenRate

HOST = {
    "processor": "A Processor",
    "gpu": None,
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    "ceilings": {
        "device": "cpu",
        "read_bandwidth": {"1048576": 80e9, "268435456": 20e9},
        "flops": {"float32": 90e9, "bfloat16": 3e9},
    },
}


def make_row(**changes):
    row = Row(
        op="flash_attention",
        workload="GPT-2 prefill 1024",
        dtype="float32",
        device="cpu",
        backend="torch",
        flops=1.6e9,
        bytes=12.6e6,
        roofline_seconds=0.02,
        compute_bound=True,
        seconds=0.025,
        spread=0.001,
        error=3.9e-7,
        agreement=0.3,
        over_naive=7.5,
        over_torch=1.0,
    )
    return dataclasses.replace(row, **changes)


NAIVE = make_row(backend="naive", seconds=0.1875, over_naive=1.0, over_torch=0.13, error=9.4e-7)
NOT_RUN = make_row(
    op="sample",
    workload="Llama-3-8B batch 8, top-p",
    seconds=None,
    error=None,
    over_naive=None,
    over_torch=None,
    reason="PyTorch cannot",
)
RATE = TokenRate("SmolLM2", 98 * 2**20, "auto", "cpu", 2, "tg128", [10.0, 12.0, 14.0])


@pytest.fixture
def report():
    return Report(HOST, [make_row(), NAIVE, NOT_RUN], [RATE])


def printed(report, width=120):
    console = Console(file=io.StringIO(), width=width)
    reports.print_report(report, console)
    return console.file.getvalue()


def test_our_own_json_is_read_back(report, tmp_path):
    report.save(tmp_path / "r.json")
    assert reports.read(tmp_path / "r.json") == report


def test_json_of_pytest_benchmark_is_read(tmp_path):
    data = {
        "machine_info": {"node": "x", "tilewise": HOST},
        "benchmarks": [
            {"name": "a", "extra_info": make_row().as_dict() | {"versions": {}}},
            {"name": "b", "extra_info": RATE.as_dict() | {"versions": {}}},
        ],
        "not_run": [NOT_RUN.as_dict()],
    }
    (tmp_path / "p.json").write_text(json.dumps(data))
    assert reports.read(tmp_path / "p.json") == Report(HOST, [make_row(), NOT_RUN], [RATE])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not a JSON file"),
        ('{"benchmarks": [{"extra_info": {}}]}', "not a report"),
        ('{"rows": 3}', "not a report"),
        ("[]", "not a report"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    assert reports.main([str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_terminal_table_has_every_figure(report):
    text = printed(report)
    for figure in ("25.0 ms", "64.0 GFLOP/s", "80%", "7.50x", "0.13x", "3.9e-07", "9.4e-07"):
        assert figure in text
    assert "12.00 ± 2.00" in text
    assert text.index("naive ") < text.index("torch ")  # the definition comes first


def test_a_backend_without_a_time_has_its_reason(report):
    text = printed(report)
    assert "did not run" in text
    assert "sample, torch has no time for Llama-3-8B batch 8, top-p: PyTorch cannot" in text


def test_a_wrong_backend_is_called_wrong():
    row = make_row(seconds=None, reason="does not agree: output: row (3,)")
    assert "wrong" in printed(Report(HOST, [row], []))


def test_a_narrow_terminal_loses_no_figure(report):
    text = printed(report, width=80)
    for figure in ("25.0 ms", "64.0 GFLOP/s", "7.50x", "3.9e-07"):
        assert figure in text


def test_memory_bound_work_is_rated_in_bytes():
    assert reports.rate(make_row(compute_bound=False)) == "0.50 GB/s"
    assert reports.rate(make_row(flops=16e9)) == "0.64 TFLOP/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-6, "1.23 us"), (999e-6, "999 us"), (0.0123, "12.3 ms"), (2.5, "2.50 s")],
)
def test_durations_have_three_digits(seconds, text):
    assert reports.duration(seconds) == text


def test_markdown_has_a_row_per_workload(report):
    lines = reports.markdown(report).splitlines()
    assert "A Processor, 2 CPU threads, torch 2.13.0" in lines[0]
    assert "20.0 GB/s from memory, 90 GFLOP/s in float32" in lines[0]
    assert (
        "| `flash_attention` | GPT-2 prefill 1024 | 188 ms | 25.0 ms | 64.0 GFLOP/s, 80% "
        "| 3.9e-07 |" in lines
    )
    assert "- sample, torch has no time for Llama-3-8B batch 8, top-p: PyTorch cannot" in lines
    assert "| SmolLM2 | auto | tg128 | 12.00 ± 2.00 |" in lines


def test_every_markdown_row_has_as_many_cells_as_its_header(report):
    rows = [line for line in reports.markdown(report).splitlines() if line.startswith("|")]
    operations = [line for line in rows if line.count("|") == rows[0].count("|")]
    assert len(operations) == 4  # header, rule, and the two workloads


def test_a_document_gets_the_table_between_its_markers(report, tmp_path):
    report.save(tmp_path / "r.json")
    document = tmp_path / "README.md"
    document.write_text(f"before\n{reports.BEGIN}\nold\n{reports.END}\nafter\n")
    command = [str(tmp_path / "r.json"), "--splice", str(document)]
    assert reports.main(command) == 0
    once = document.read_text()
    assert reports.main(command) == 0
    assert document.read_text() == once
    assert once.startswith(f"before\n{reports.BEGIN}\nA Processor")
    assert once.endswith(f"{reports.END}\nafter\n")
    assert "old" not in once


@pytest.mark.parametrize("text", ["", reports.BEGIN, f"{reports.END}\n{reports.BEGIN}"])
def test_a_document_without_markers_is_left_alone(text):
    with pytest.raises(ReportError, match="no line"):
        reports.splice(text, "table")


def test_the_roofline_is_drawn(report, tmp_path):
    report.save(tmp_path / "r.json")
    assert reports.main([str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]) == 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_the_roofline_shows_ceilings_and_labelled_points(report):
    axes, key = roofline.draw(report).axes
    texts = [text.get_text() for text in axes.texts]
    assert "1 MiB: 80 GB/s" in texts
    assert "float32: 90.0 GFLOP/s" in texts
    assert not any("bfloat16" in text for text in texts)  # nothing was measured in it
    assert "1  GPT-2 prefill 1024" in key.texts[0].get_text()
    points = [tuple(dots.get_offsets()[0]) for dots in axes.collections]
    assert points == [(1.6e9 / 12.6e6, 1.6e9 / s) for s in (0.1875, 0.025)]


def test_a_roofline_without_points_is_drawn_all_the_same():
    assert roofline.draw(Report(HOST, [], [])).axes
