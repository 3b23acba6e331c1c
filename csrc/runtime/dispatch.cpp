#include "runtime/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastrobust {
namespace {

struct Choice {
  CpuVariant variant;
  std::string reason;
};

struct Named {
  const char* name;
  CpuVariant variant;
};
constexpr Named kNames[] = {{"base", CpuVariant::base},
                            {"v2", CpuVariant::v2},
                            {"v3", CpuVariant::v3},
                            {"v4", CpuVariant::v4},
                            {"neon", CpuVariant::neon}};

CpuVariant best() {
#if defined(FASTROBUST_HAS_v2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return CpuVariant::v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return CpuVariant::v3;
  return CpuVariant::v2;
#elif defined(FASTROBUST_HAS_neon)
  return CpuVariant::neon;
#else
  return CpuVariant::base;
#endif
}

Choice choose() {
  const CpuVariant most = best();
  const char* wish = std::getenv("FASTROBUST_CPU");
  if (wish == nullptr || *wish == '\0') return {most, "best of " FASTROBUST_VARIANTS " on this processor"};
  for (const Named& n : kNames) {
    if (std::strcmp(n.name, wish) != 0) continue;
    const bool built = std::strstr("," FASTROBUST_VARIANTS ",", ("," + std::string(wish) + ",").c_str()) != nullptr;
    if (built && static_cast<int>(n.variant) <= static_cast<int>(most))
      return {n.variant, "FASTROBUST_CPU=" + std::string(wish)};
  }
  throw std::runtime_error("FASTROBUST_CPU: got '" + std::string(wish) +
                           "', expected one of " FASTROBUST_VARIANTS " that this processor supports");
}

const Choice& choice() {
  static const Choice c = choose();
  return c;
}

}  // namespace

CpuVariant cpu_variant() { return choice().variant; }

const char* cpu_variant_name() {
  for (const Named& n : kNames)
    if (n.variant == cpu_variant()) return n.name;
  return "unknown";
}

const char* cpu_variant_reason() { return choice().reason.c_str(); }

}  // namespace fastrobust
