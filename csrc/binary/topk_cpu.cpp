// The `keep` largest scores by radix selection on their bits: three histograms of 11, 11 and 10 bits, then the mask.
#include <algorithm>
#include <vector>

#include "binary/args.h"
#include "binary/order.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kChunk = 1 << 16;

// Histogram of the digit of every key whose higher bits equal `prefix`.
void histogram(const float* s, int64_t n, int pass, uint32_t prefix, int64_t* total) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<uint32_t> counts(static_cast<size_t>(chunks) * kBins, 0);
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      uint32_t* const h = counts.data() + c * kBins;
      const int64_t end = std::min(n, (c + 1) * kChunk);
      for (int64_t i = c * kChunk; i < end; ++i) {
        const uint32_t key = order_key(s[i]);
        if (pass == 0 || (key >> digit_shift(pass - 1)) == prefix) ++h[digit(key, pass)];
      }
    }
  });
  std::fill(total, total + kBins, int64_t{0});
  for (int64_t c = 0; c < chunks; ++c)
    for (int b = 0; b < kBins; ++b) total[b] += counts[static_cast<size_t>(c * kBins + b)];
}

}  // namespace

void topk_cpu(const TopkArgs& a) {
  const float* const s = a.scores;
  const int64_t chunks = (a.n + kChunk - 1) / kChunk;
  int64_t total[kBins];
  int64_t rank = a.keep;  // among the keys that share the prefix, the rank-th largest is the threshold
  uint32_t threshold = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    histogram(s, a.n, pass, threshold, total);
    if (pass == 0 && not_finite(total)) {
      *a.bad = 1;
      return;
    }
    int b = kBins - 1;
    for (; b > 0 && total[b] < rank; --b) rank -= total[b];
    threshold = (threshold << digit_bits(pass)) | static_cast<uint32_t>(b);
  }
  // rank ties of the threshold are kept, those with the largest index. keep = 0 leaves rank 0 and keeps none.
  std::vector<int64_t> ties(static_cast<size_t>(chunks) + 1, 0);
  const bool none = a.keep == 0;
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t end = std::min(a.n, (c + 1) * kChunk);
      int64_t equal = 0;
      for (int64_t i = c * kChunk; i < end; ++i) {
        const uint32_t key = order_key(s[i]);
        a.mask[i] = !none && key >= threshold;
        equal += key == threshold;
      }
      ties[static_cast<size_t>(c)] = equal;
    }
  });
  if (none) return;
  int64_t surplus = -rank;
  for (int64_t c = 0; c < chunks; ++c) surplus += ties[static_cast<size_t>(c)];
  for (int64_t i = 0; surplus > 0; ++i)
    if (order_key(s[i]) == threshold) {
      a.mask[i] = 0;
      --surplus;
    }
}

FR_NS_END
