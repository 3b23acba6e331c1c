// Masks as near their entropy as whole bytes allow: a range coder in which the probability of a kept entry is that of
// the entries still to come (reference/binary.py defines the code).
#include <cstdint>

#include "binary/args.h"
#include "core/macros.h"

FR_NS_BEGIN
namespace {

constexpr uint64_t kWidest = ~uint64_t{0};
constexpr int kTopShift = 56;
constexpr uint64_t kNarrow = uint64_t{1} << kTopShift;  // below this the interval gives away its first byte

}  // namespace

// Returns the number of bytes, which n / 8 + 32 always hold: an entry costs one bit at most on average.
int64_t encode_cpu(const CodeArgs& a) {
  uint64_t low = 0, width = kWidest;
  int64_t size = 0, kept = a.kept;
  const auto carry = [&](uint64_t sum) {
    if (sum < low)
      for (int64_t i = size - 1; ++a.bytes[i] == 0; --i) {
      }
    low = sum;
  };
  for (int64_t left = a.n, i = 0; kept > 0 && kept < left; --left, ++i) {
    const uint64_t share = width / static_cast<uint64_t>(left) * static_cast<uint64_t>(kept);
    if (a.mask[i] != 0) {
      width = share;
      --kept;
    } else {
      carry(low + share);
      width -= share;
    }
    for (; width < kNarrow; width <<= 8, low <<= 8) a.bytes[size++] = static_cast<uint8_t>(low >> kTopShift);
  }
  // Any number of the interval will do: one whose lower bytes are zero, which are not written.
  carry(low + (kNarrow - 1));
  a.bytes[size++] = static_cast<uint8_t>(low >> kTopShift);
  while (size > 0 && a.bytes[size - 1] == 0) --size;
  return size;
}

// Always gives a mask of `kept` entries, whatever the bytes are.
void decode_cpu(const CodeArgs& a) {
  uint64_t ahead = 0, width = kWidest;  // ahead: the number coded, from the lower end of the interval
  int64_t read = 0, kept = a.kept;
  const auto next = [&]() -> uint64_t { return read < a.size ? a.bytes[read++] : 0; };
  for (int i = 0; i < 8; ++i) ahead = ahead << 8 | next();
  for (int64_t left = a.n, i = 0; left > 0; --left, ++i) {
    bool keep = kept == left;
    if (kept > 0 && kept < left) {
      const uint64_t share = width / static_cast<uint64_t>(left) * static_cast<uint64_t>(kept);
      keep = ahead < share;
      if (!keep) ahead -= share;
      width = keep ? share : width - share;
      for (; width < kNarrow; width <<= 8) ahead = ahead << 8 | next();
    }
    a.mask[i] = keep;
    kept -= keep;
  }
}

FR_NS_END
