// Registers a device guard that does nothing for CUDA, which a CPU build of torch lacks: without it, fake tensors on a GPU
// cannot be indexed. A CUDA build has one, which FakeTensorMode replaces by this where there is no GPU.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;

extern "C" void register_no_op_guard() {
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, new Guard());
}
