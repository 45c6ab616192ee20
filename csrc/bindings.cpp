// The Python module clipcore._C: signatures, and the record of what it was built for.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/api/include/torch/version.h>
#include <torch/csrc/utils/pybind.h>

#include "all_gather.h"

// clipcore/native.py finds this sentence in the file, before it loads it.
extern "C" [[gnu::used]] const char clipcore_built_for[] =
    "clipcore._C was built for torch " TORCH_VERSION " with CUDA " CLIPCORE_CUDA_VERSION ";";

PYBIND11_MODULE(_C, m) {
  py::class_<clipcore::Exchange, clipcore::ExchangePtr>(m, "Exchange");
  m.def("has_cuda_kernels", &clipcore::has_cuda_kernels);
  // The wrapper turns C++ errors into Python's own types, and lets other threads run meanwhile.
  m.def(
      "start_gather",
      torch::wrap_pybind_function_no_gil(&clipcore::start_gather),
      py::arg("x_BE"),
      py::arg("ids_B"),
      py::arg("header"),
      py::arg("shard_sizes"),
      py::arg("ids_at"),
      py::arg("rows_at"),
      py::arg("part_bytes"),
      py::arg("wire_dtype"),
      py::arg("group_name"));
  m.def("headers", torch::wrap_pybind_function_no_gil(&clipcore::headers), py::arg("exchange"));
  m.def(
      "unpack_gather",
      torch::wrap_pybind_function_no_gil(&clipcore::unpack_gather),
      py::arg("exchange"),
      py::arg("own_BE"));
}
