// The Python module clipcore._C: signatures, and the record of what it was built against.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/api/include/torch/version.h>
#include <torch/csrc/utils/pybind.h>

#include "all_gather.h"

PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_version") = CLIPCORE_CUDA_VERSION;
  // The wrapper turns C++ errors into Python's own types, and lets other threads run meanwhile.
  m.def(
      "all_gather_with_grad",
      torch::wrap_pybind_function_no_gil(&clipcore::all_gather_with_grad),
      py::arg("x_BE"),
      py::arg("group_name"));
}
