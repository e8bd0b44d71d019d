// Repacking weights for the device (matrix_layout.h), a panel of 16 outputs at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "../matrix.h"
#include "matrix_layout.h"

namespace penstock::cuda {

// The device's form of a matrix, packed for the CPU or AWQ's as in the file, without its data.
DeviceMatrix describe_for_device(const Matrix& matrix);
DeviceMatrix describe_for_device(const AwqMatrix& matrix);
// Bytes of one panel.
size_t panel_level_bytes(const DeviceMatrix& matrix);
size_t panel_scale_bytes(const DeviceMatrix& matrix);

// Fills panels, which are zero before.
class PanelWriter {
 public:
  PanelWriter(const DeviceMatrix& matrix, uint8_t* levels, uint8_t* scales) : matrix_(matrix), levels_(levels), scales_(scales) {}

  // As it is stored: the bits of a half, 128 above a level of a byte, a nibble.
  void put_level(int o, int input, unsigned level);
  void put_numbers(int o, int group, uint16_t scale, uint16_t second = 0);

 private:
  const DeviceMatrix& matrix_;
  uint8_t* levels_;
  uint8_t* scales_;
};

// Repacks one panel. Throws where a weight or a scale is beyond what a half can hold.
void repack_panel(const Matrix& matrix, int panel, const DeviceMatrix& to, uint8_t* levels, uint8_t* scales);
void repack_panel(const AwqMatrix& matrix, int panel, const DeviceMatrix& to, uint8_t* levels, uint8_t* scales);


}  // namespace penstock::cuda
