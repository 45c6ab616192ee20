// Export the kernel of csrc/resample.cpp under a name that Python's ctypes finds.

#include "resample.h"

extern "C" void resample(const uint8_t* x, int64_t s, int w, int h, uint8_t* y, int ow, int oh, bool c) {
  clipcore::resample_bicubic(x, s, w, h, y, ow, oh, c);
}
