"""`make sanitize` can fail: what a kernel must never do stops the process."""

import subprocess

import pytest

from tilewise import build

SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace {

float read(torch::stable::Tensor x, int64_t i) { return static_cast<float*>(x.data_ptr())[i]; }

double tensor(torch::stable::Tensor x, int64_t i) { return read(x, i); }

double buffer(torch::stable::Tensor x, int64_t i) {
  const std::vector<float> copy(static_cast<size_t>(x.numel()), read(x, 0));
  return copy.data()[i];
}

double freed(torch::stable::Tensor x, int64_t i) {
  float* pointer = std::vector<float>(static_cast<size_t>(x.numel()), read(x, 0)).data();
  return pointer[i];
}

double overflow(torch::stable::Tensor, int64_t i) {
  return static_cast<double>(static_cast<int32_t>(i) + 0x7ffffff0);
}

}  // namespace

STABLE_TORCH_LIBRARY(TILEWISE_NAMESPACE, m) {
  m.def("tensor(Tensor x, int i) -> float");
  m.def("buffer(Tensor x, int i) -> float");
  m.def("freed(Tensor x, int i) -> float");
  m.def("overflow(Tensor x, int i) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, CPU, m) {
  m.impl("tensor", TORCH_BOX(&tensor));
  m.impl("buffer", TORCH_BOX(&buffer));
  m.impl("freed", TORCH_BOX(&freed));
  m.impl("overflow", TORCH_BOX(&overflow));
}
"""


def runtime():
    """The sanitizers' libraries, for LD_PRELOAD; None where there is no compiler that has them."""
    try:
        command = build._compiler_command()
    except build.BuildError:
        return None
    done = subprocess.run(
        [*command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    path = done.stdout.strip()
    return path if "/" in path else None


pytestmark = pytest.mark.skipif(runtime() is None, reason="no compiler with libasan")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The sanitized library of `SOURCE`."""
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "csrc").mkdir()
    (folder / "csrc" / "mistakes.cpp").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "source_folder", lambda: folder / "csrc")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return build.library("avx2", "sanitized")


def run(run_python, library, *calls):
    """Call operators of the library on five numbers, in a process with the sanitizers' runtime."""
    code = f"import torch; torch.ops.load_library({str(library)!r})\n"
    for operator, index in calls:
        code += f"torch.ops.tilewise_avx2_sanitized.{operator}(torch.ones(5), {index})\n"
    return run_python(code, check=False, LD_PRELOAD=runtime(), ASAN_OPTIONS="detect_leaks=0")


def test_what_is_right_passes(library, run_python):
    done = run(run_python, library, ("tensor", 4), ("buffer", 4), ("overflow", 4))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("operator", "index", "message"),
    [
        ("tensor", 5, "heap-buffer-overflow"),
        ("tensor", -1, "heap-buffer-overflow"),
        ("buffer", 5, "heap-buffer-overflow"),
        ("freed", 1, "heap-use-after-free"),
        ("overflow", 100, "signed integer overflow"),
    ],
)
def test_a_mistake_stops_the_process(library, run_python, operator, index, message):
    done = run(run_python, library, (operator, index))
    assert done.returncode != 0
    assert message in done.stderr
