// What the processor can do, and the operating system saves the registers of.
#pragma once

namespace penstock {

struct Processor {
  bool avx2 = false;        // with FMA and F16C
  bool avx512 = false;      // F, BW, DQ, VL and VNNI
  bool pclmulqdq = false;   // with SSE4.2, whose crc32 instruction it goes with
  bool vpclmulqdq = false;  // on registers of 512 bits

  Processor();
};

// Asked once.
const Processor& processor();

}  // namespace penstock
