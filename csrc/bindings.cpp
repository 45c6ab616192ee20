// The Python module clipcore._C: signatures, and the record of what it was built for.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/api/include/torch/version.h>
#include <torch/csrc/utils/pybind.h>

#include "all_gather.h"

// clipcore/native.py finds this sentence in the file, before it loads it.
extern "C" [[gnu::used]] const char clipcore_built_for[] =
    "clipcore._C was built for torch " TORCH_VERSION " with CUDA " CLIPCORE_CUDA_VERSION ";";

PYBIND11_MODULE(_C, m) {
  // The wrapper turns C++ errors into Python's own types, and lets other threads run meanwhile.
  m.def(
      "all_gather_with_grad",
      torch::wrap_pybind_function_no_gil(&clipcore::all_gather_with_grad),
      py::arg("x_BE"),
      py::arg("group_name"));
}
