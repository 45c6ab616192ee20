// The Python module clipcore._C: signatures, and the record of the versions it was built for.

#include <pybind11/numpy.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/api/include/torch/version.h>
#include <torch/csrc/utils/pybind.h>

#include "adamw.h"
#include "all_gather.h"
#include "attention.h"
#include "resample.h"

// clipcore/native.py searches the file for this sentence before loading it.
extern "C" [[gnu::used]] const char clipcore_built_for[] =
    "clipcore._C was built for torch " TORCH_VERSION " with CUDA " CLIPCORE_CUDA_VERSION ";";

namespace {

// uint8 [H, W, 3], the pixels of a row contiguous, to uint8 [3, out_height, out_width].
py::array_t<uint8_t> resample_bicubic(
    const py::array& pixels, int out_width, int out_height, bool columns_first) {
  TORCH_CHECK_VALUE(
      pixels.dtype().is(py::dtype::of<uint8_t>()) && pixels.ndim() == 3 && pixels.shape(2) == 3 &&
          pixels.strides(2) == 1 && pixels.strides(1) == 3 && pixels.size() > 0 && out_width > 0 &&
          out_height > 0,
      "resample_bicubic takes pixels uint8 [H, W, 3] in C order and positive sides");
  py::array_t<uint8_t> planes({3, out_height, out_width});
  const auto* source = static_cast<const uint8_t*>(pixels.data());
  const auto row_bytes = static_cast<int64_t>(pixels.strides(0));
  const int width = static_cast<int>(pixels.shape(1)), height = static_cast<int>(pixels.shape(0));
  uint8_t* result = planes.mutable_data();
  {
    py::gil_scoped_release no_gil;
    clipcore::resample_bicubic(
        source, row_bytes, width, height, result, out_width, out_height, columns_first);
  }
  return planes;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<clipcore::Exchange, clipcore::ExchangePtr>(m, "Exchange");
  m.def(
      "resample_bicubic",
      torch::wrap_pybind_function(&resample_bicubic),
      py::arg("pixels"),
      py::arg("out_width"),
      py::arg("out_height"),
      py::arg("columns_first"));
  m.def(
      "adamw",
      torch::wrap_pybind_function_no_gil(&clipcore::adamw),
      py::arg("params"),
      py::arg("grads"),
      py::arg("exp_avgs"),
      py::arg("exp_avg_sqs"),
      py::arg("shadows"),
      py::arg("streams"),
      py::arg("firsts"),
      py::arg("factors"),
      py::arg("grad_scale"),
      py::arg("step"),
      py::arg("seed"));
  m.def("attention_lanes", &clipcore::attention_lanes);
  m.def(
      "attention_forward",
      torch::wrap_pybind_function_no_gil(&clipcore::attention_forward),
      py::arg("qkv_RL3HK"),
      py::arg("is_causal"),
      py::arg("segments_RL"),
      py::arg("lanes"));
  m.def(
      "attention_backward",
      torch::wrap_pybind_function_no_gil(&clipcore::attention_backward),
      py::arg("grad_RLD"),
      py::arg("qkv_RL3HK"),
      py::arg("lse_RHL"),
      py::arg("is_causal"),
      py::arg("segments_RL"),
      py::arg("lanes"));
  m.def("has_cuda_kernels", &clipcore::has_cuda_kernels);
  // The wrapper converts C++ errors to Python's own types, and releases the GIL.
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
