// The four number formats: how an element is read into, and rounded from, the type that the arithmetic runs in.
// Branch-free selects only, so that every loop over them vectorises; nothing here relies on subnormal arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <class To, class From> inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Float32 {
  using stored = float;
  using wide = float;
  static wide load(stored x) { return x; }
  static stored store(wide x) { return x; }
};

struct Float64 {
  using stored = double;
  using wide = double;
  static wide load(stored x) { return x; }
  static stored store(wide x) { return x; }
};

struct BFloat16 {
  using stored = uint16_t;
  using wide = float;
  static wide load(stored x) { return bits<float>(static_cast<uint32_t>(x) << 16); }
  static stored store(wide x) { // round to nearest, ties to even
    uint32_t u = bits<uint32_t>(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  using stored = uint16_t;
  using wide = float;
  static wide load(stored x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t special = normal + (112u << 23);
    const float subnormal = bits<float>(normal + (1u << 23)) - bits<float>(113u << 23);
    const uint32_t regular = exponent == 0x0f800000u ? special : normal;
    return bits<float>(sign | (exponent == 0 ? bits<uint32_t>(subnormal) : regular));
  }
  static stored store(wide x) { // round to nearest, ties to even
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t magnitude = u & 0x7fffffffu;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t small = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t regular = magnitude < (113u << 23) ? small : normal;
    return static_cast<uint16_t>((magnitude >= (143u << 23) ? special : regular) | ((u >> 16) & 0x8000u));
  }
};

} // namespace
