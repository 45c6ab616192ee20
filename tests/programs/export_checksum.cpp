// Export the function of csrc/checksum.cpp under a name that Python's ctypes finds.

#include "checksum.h"

extern "C" uint32_t checksum(const uint8_t* bytes, size_t size) {
  return clipcore::crc32(bytes, size);
}
