// Memory that is read all over: with pages of 4 KiB every list entry of a masked convolution misses the first level of
// the translation cache.
#pragma once

#include <cstdint>

namespace fastrobust {

constexpr int64_t kHugePage = int64_t{1} << 21;

// Asks for huge pages in [address, address + bytes), which is best aligned to kHugePage; without them where there are
// none.
void prefer_huge_pages(uintptr_t address, int64_t bytes);

}  // namespace fastrobust
