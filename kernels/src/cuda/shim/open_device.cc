// The device of the host's as the only one that there is, for the addon that tests load instead of the GPU's.
#include <stdexcept>

#include "../host_device.h"

namespace penstock::cuda {

std::unique_ptr<Device> open_device(int number) {
  if (number != 0) throw std::runtime_error("cuda:" + std::to_string(number) + ": found 1 CUDA device, cuda:0");
  return std::make_unique<HostDevice>();
}

}  // namespace penstock::cuda
