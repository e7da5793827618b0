// What a call on the CPU needs of the machine: subnormals flushed, and one number read in any of the four formats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "tail.h"

namespace fasttrain {
namespace {

// Subnormals cost up to a hundred cycles each and moments of dead units decay into them: within a call they are zero.
class FlushSubnormals {
public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t(1) << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

private:
  uint64_t saved_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

inline double read_scalar(const void *address, int32_t dtype) {
  if (dtype == kFloat64) return *static_cast<const double *>(address);
  if (dtype == kFloat32) return static_cast<double>(*static_cast<const float *>(address));
  uint16_t half;
  std::memcpy(&half, address, sizeof half);
  if (dtype == kBFloat16) {
    const uint32_t word = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return static_cast<double>(value);
  }
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                      : exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -size : size;
}

} // namespace
} // namespace fasttrain
