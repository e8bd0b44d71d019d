// Two devices of the host's as all that there are, for the addon that tests load instead of the GPUs'.
#include <stdexcept>

#include "../host_device.h"

namespace penstock::cuda {

std::unique_ptr<Device> open_device(int number) {
  if (number > 1) throw std::runtime_error("cuda:" + std::to_string(number) + ": found 2 CUDA devices, cuda:0 … cuda:1");
  HostDeviceOptions options;
  options.number = number;
  return std::make_unique<HostDevice>(options);
}

}  // namespace penstock::cuda
