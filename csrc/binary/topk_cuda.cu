// Radix selection of the `keep` largest scores on CUDA, without leaving the device.
#include "binary/kernels.h"
#include "binary/order.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1024;
// Workspace: a histogram per pass, the state, the ties of every block. It must be zero.
constexpr int kState = kPasses * kBins;
enum { kPrefix = kState, kRankLow, kRankHigh, kTies };

__device__ int64_t rank_of(const uint32_t* w) {
  return static_cast<int64_t>(static_cast<uint64_t>(w[kRankHigh]) << 32 | w[kRankLow]);
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads) histogram_kernel(TopkArgs a, int pass, int shift) {
  __shared__ uint32_t counts[kBins];
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) counts[b] = 0;
  __syncthreads();
  const uint32_t prefix = a.workspace[kPrefix];
  each_element<kWide, 4>(a.n, shift, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                         static_cast<int64_t>(gridDim.x) * kThreads, [&](auto i) {
                           const auto scores = load_at<Use::again>(a.scores, i);
                           for (int k = 0; k < i.count; ++k) {
                             const uint32_t key = order_key(scores.v[k]);
                             if (pass == 0 || (key >> digit_shift(pass - 1)) == prefix)
                               atomicAdd(&counts[digit(key, pass)], 1u);
                           }
                         });
  __syncthreads();
  uint32_t* const total = a.workspace + pass * kBins;
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads)
    if (counts[b] != 0) atomicAdd(&total[b], counts[b]);
}

// The digit in which the rank-th largest key lies.
__global__ void __launch_bounds__(kThreads) select_kernel(TopkArgs a, int pass) {
  __shared__ uint32_t counts[kBins];
  const uint32_t* const total = a.workspace + pass * kBins;
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) counts[b] = total[b];
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t rank = pass == 0 ? a.keep : rank_of(a.workspace);
  int b = kBins - 1;
  for (; b > 0 && counts[b] < rank; --b) rank -= counts[b];
  a.workspace[kPrefix] = (a.workspace[kPrefix] << digit_bits(pass)) | static_cast<uint32_t>(b);
  a.workspace[kRankLow] = static_cast<uint32_t>(rank);
  a.workspace[kRankHigh] = static_cast<uint32_t>(static_cast<uint64_t>(rank) >> 32);
}

struct Chunk {
  int64_t begin, end;
};
__device__ Chunk chunk_of(int64_t n, int64_t block, int64_t blocks) {
  const int64_t size = ((n + blocks - 1) / blocks + 15) / 16 * 16, begin = block * size, end = begin + size;
  return {begin < n ? begin : n, end < n ? end : n};
}

// kWide: sixteen scores make sixteen bytes of the mask.
template <bool kWide>
__global__ void __launch_bounds__(kThreads) mask_kernel(TopkArgs a) {
  const uint32_t threshold = a.workspace[kPrefix];
  const Chunk c = chunk_of(a.n, blockIdx.x, gridDim.x);
  uint32_t equal = 0;
  const auto kept = [&](float score) {
    const uint32_t key = order_key(score);
    equal += key == threshold ? 1u : 0u;
    return static_cast<uint8_t>(a.keep > 0 && key >= threshold);
  };
  int64_t whole = c.begin;
  if constexpr (kWide) {
    whole += (c.end - c.begin) / 16 * 16;
    for (int64_t i = c.begin + 16 * threadIdx.x; i < whole; i += 16 * kThreads) {
      const Values<float, 16> scores = load_wide<16, Use::again>(a.scores + i);
      Values<uint8_t, 16> mask;
#pragma unroll
      for (int k = 0; k < 16; ++k) mask.v[k] = kept(scores.v[k]);
      store_wide<16>(a.mask + i, mask);
    }
  }
  for (int64_t i = whole + threadIdx.x; i < c.end; i += kThreads) a.mask[i] = kept(a.scores[i]);
  if (equal != 0) atomicAdd(&a.workspace[kTies + blockIdx.x], equal);
}

// Drops the first ties, so that `rank` of them stay.
__global__ void __launch_bounds__(kThreads) ties_kernel(TopkArgs a) {
  if (threadIdx.x != 0 || a.workspace[kTies + blockIdx.x] == 0) return;
  int64_t before = 0, all = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) {
    if (b < blockIdx.x) before += a.workspace[kTies + b];
    all += a.workspace[kTies + b];
  }
  const int64_t surplus = all - rank_of(a.workspace) - before;
  const uint32_t threshold = a.workspace[kPrefix];
  const Chunk c = chunk_of(a.n, blockIdx.x, gridDim.x);
  int64_t dropped = 0;
  for (int64_t i = c.begin; i < c.end && dropped < surplus; ++i)
    if (order_key(a.scores[i]) == threshold) {
      a.mask[i] = 0;
      ++dropped;
    }
}

unsigned blocks_for(int64_t n) {
  const int64_t blocks = (n + 4 * kThreads - 1) / (4 * kThreads);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace
FR_NS_END

namespace fastrobust {

int64_t topk_workspace_words(int64_t n) { return kTies + static_cast<int64_t>(blocks_for(n)); }

void topk_cuda(const TopkArgs& a, void* stream) {
  if (a.n == 0) return;
  const unsigned blocks = blocks_for(a.n);
  const Addresses scores = Addresses().add(a.scores), both = Addresses(scores).add(a.mask, 1);
  for (int pass = 0; pass < kPasses; ++pass) {
    if (scores.aligned)
      FR_LAUNCH(histogram_kernel<true>, blocks, kThreads, 0, stream, a, pass, scores.shift);
    else
      FR_LAUNCH(histogram_kernel<false>, blocks, kThreads, 0, stream, a, pass, 0);
    FR_LAUNCH(select_kernel, 1, kThreads, 0, stream, a, pass);
  }
  if (both.whole(16))
    FR_LAUNCH(mask_kernel<true>, blocks, kThreads, 0, stream, a);
  else
    FR_LAUNCH(mask_kernel<false>, blocks, kThreads, 0, stream, a);
  if (a.keep > 0) FR_LAUNCH(ties_kernel, blocks, kThreads, 0, stream, a);
}

}  // namespace fastrobust
