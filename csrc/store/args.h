// Arguments of the store of perturbations: one tensor for a data set, from which batches start and to which they
// return. Images are dense, [batch, channels, height, width]; a row of the store is [channels, store_h, store_w], a
// frame of height + 2 padding by width + 2 padding pixels, down-sampled by `factor` in both.
#pragma once

#include <cstdint>

namespace fastrobust {

enum class StoreType : int { f32, f16 };

struct StoreArgs {
  void* store = nullptr;  // [rows, channels, store_h, store_w]
  StoreType type = StoreType::f32;
  const int64_t* index = nullptr;  // [batch], or null: image b has row b
  int64_t rows = 0;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t store_h = 0, store_w = 0, padding = 0, factor = 1;
  bool low = false;                  // moved at the store's resolution, then up-sampled
  bool inverse = false;              // the move is taken back (without padding)
  const int64_t* offsets = nullptr;  // [batch, 2], down and to the right, or null
  const uint8_t* flips = nullptr;    // [batch], or null
  const float* x = nullptr;          // centres; null: zero
  const float* adv = nullptr;        // what is written, less x
  float* out = nullptr;              // what is read, projected
  const float* eps_each = nullptr;   // [batch], or null: eps
  float eps = 0.f, lo = 0.f, hi = 0.f;
};

}  // namespace fastrobust
