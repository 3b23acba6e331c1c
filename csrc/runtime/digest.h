// A number that stands for what lies in memory, to see whether it has changed.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastrobust {

// Every byte and its place count: in each of four lanes a change of one word changes the sum, since a multiplication by
// an odd number can be undone. Not a signature: it tells changes that nobody hides.
inline uint64_t digest(const void* memory, int64_t bytes) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;
  uint64_t lanes[4] = {1, 2, 3, 4};
  const char* p = static_cast<const char*>(memory);
  const auto add = [](uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * kOdd;
    return sum ^ (sum >> 32);
  };
  for (; bytes >= 32; bytes -= 32, p += 32) {
    uint64_t words[4];
    std::memcpy(words, p, 32);
    for (int k = 0; k < 4; ++k) lanes[k] = add(lanes[k], words[k]);
  }
  uint64_t rest[4] = {};
  if (bytes > 0) std::memcpy(rest, p, static_cast<size_t>(bytes));
  uint64_t sum = static_cast<uint64_t>(bytes);
  for (int k = 0; k < 4; ++k) sum = add(sum, add(lanes[k], rest[k]));
  return sum;
}

}  // namespace fastrobust
