"""Reports: what is read is what was written, and every figure reaches the reader."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from tilewise.benchmarks import report as reports
from tilewise.benchmarks import report_markdown, roofline
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
# Made up, as every figure in this file.
GPU_HOST = HOST | {
    "gpu": "A GPU (compute capability 9.0)",
    "gpu_state": {"driver_version": "1.2", "clocks.sm": "1500 MHz"},
    "versions": {"torch": "2.13.0", "triton": "3.9.0"},
    "ceilings": {
        "device": "cuda",
        "read_bandwidth": {"1073741824": 2e12},
        "flops": {"float32": 5e13, "bfloat16": 5e14},
    },
}
GPU_ROWS = [
    make_row(
        dtype="bfloat16",
        device="cuda",
        backend=name,
        seconds=seconds,
        device_seconds=seconds - 1e-4,
        captured=name != "FlexAttention",
        flops=4e11,
        roofline_seconds=8e-4,
    )
    for name, seconds in (("triton", 1.1e-3), ("SDPA cuDNN", 0.9e-3), ("FlexAttention", 2.1e-3))
]
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
    lines = report_markdown.markdown(report).splitlines()
    assert "A Processor, 2 CPU threads, torch 2.13.0" in lines[0]
    assert "20.0 GB/s from memory, 90 GFLOP/s in float32" in lines[0]
    assert (
        "| `flash_attention` | GPT-2 prefill 1024 | 188 ms | 25.0 ms | 64.0 GFLOP/s, 80% "
        "| 3.9e-07 |" in lines
    )
    assert "- sample, torch has no time for Llama-3-8B batch 8, top-p: PyTorch cannot" in lines
    assert "| SmolLM2 | auto | tg128 | 12.00 ± 2.00 |" in lines


def test_on_a_gpu_every_contestant_has_a_row():
    text = report_markdown.markdown(Report(GPU_HOST, GPU_ROWS, []))
    lines = text.splitlines()
    for fact in ("A GPU", "2000.0 GB/s", "500 TFLOP/s in bfloat16", "driver_version 1.2"):
        assert fact in lines[0]
    assert "clocks.sm 1500 MHz" in lines[0]
    assert "triton 3.9.0" in lines[0]
    name = "GPT-2 prefill 1024, bfloat16"
    assert "### `flash_attention`" in lines
    assert lines[-3:] == [
        f"| {name} | triton | 1.00 ms | 1.10 ms | 400 TFLOP/s | 80% | 1.00x | 3.9e-07 |",
        f"| {name} | SDPA cuDNN | 800 us | 900 us | 500 TFLOP/s | 100% | 1.25x | 3.9e-07 |",
        f"| {name} | FlexAttention | 2.00 ms* | 2.10 ms | 200 TFLOP/s | 40% | 0.50x | 3.9e-07 |",
    ]


def test_the_terminal_has_both_times_where_there_are_two():
    text = printed(Report(GPU_HOST, GPU_ROWS, []))
    assert "on GPU" in text
    assert text.index("triton") < text.index("SDPA cuDNN") < text.index("FlexAttention")
    for figure in ("1.10 ms", "1.00 ms", "2.00 ms*", "500 TFLOP/s"):
        assert figure in text


def test_rivals_are_points_of_the_roofline():
    axes = roofline.draw(Report(GPU_HOST, GPU_ROWS, [])).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["triton", "others"]
    heights = [dots.get_offsets()[0][1] for dots in axes.collections]
    assert heights == pytest.approx([4e14, 5e14, 2e14])


def test_the_script_is_the_module(report, tmp_path):
    """An error is one line, also where another module raises it."""
    report.save(tmp_path / "r.json")
    (tmp_path / "d.md").write_text("no markers")
    script = [sys.executable, reports.__file__, tmp_path / "r.json", "--splice", tmp_path / "d.md"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_every_markdown_row_has_as_many_cells_as_its_header(report):
    rows = [line for line in report_markdown.markdown(report).splitlines() if line.startswith("|")]
    operations = [line for line in rows if line.count("|") == rows[0].count("|")]
    assert len(operations) == 4  # header, rule, and the two workloads


def test_a_document_gets_the_table_between_its_markers(report, tmp_path):
    report.save(tmp_path / "r.json")
    document = tmp_path / "README.md"
    document.write_text(f"before\n{report_markdown.BEGIN}\nold\n{report_markdown.END}\nafter\n")
    command = [str(tmp_path / "r.json"), "--splice", str(document)]
    assert reports.main(command) == 0
    once = document.read_text()
    assert reports.main(command) == 0
    assert document.read_text() == once
    assert once.startswith(f"before\n{report_markdown.BEGIN}\nA Processor")
    assert once.endswith(f"{report_markdown.END}\nafter\n")
    assert "old" not in once


@pytest.mark.parametrize(
    "text", ["", report_markdown.BEGIN, f"{report_markdown.END}\n{report_markdown.BEGIN}"]
)
def test_a_document_without_markers_is_left_alone(text):
    with pytest.raises(ReportError, match="no line"):
        report_markdown.splice(text, "table")


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
