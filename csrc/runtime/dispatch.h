// Which compiled CPU variant runs. Each family compiles its *_cpu.cpp once per instruction set and exports one table
// of function pointers per variant; FR_CPU_TABLE declares them and the accessor that returns the chosen one.
#pragma once

namespace fastrobust {

enum class CpuVariant { base, v2, v3, v4, neon };

// The best variant of this build that this processor runs, or the one named by FASTROBUST_CPU. Chosen once.
CpuVariant cpu_variant();
const char* cpu_variant_name();
// Why it was chosen, for people: "best of v2,v3,v4 on this processor" or "FASTROBUST_CPU=v2".
const char* cpu_variant_reason();

}  // namespace fastrobust

// The kernels' own files see no tables: there the same namespaces are inline.
#if defined(FASTROBUST_HAS_v2)
#define FR_CPU_TABLE(Table, name)    \
  namespace isa_v2 {                 \
  extern const Table name##_table;   \
  }                                  \
  namespace isa_v3 {                 \
  extern const Table name##_table;   \
  }                                  \
  namespace isa_v4 {                 \
  extern const Table name##_table;   \
  }                                  \
  inline const Table& name() {       \
    switch (cpu_variant()) {         \
      case CpuVariant::v4:           \
        return isa_v4::name##_table; \
      case CpuVariant::v3:           \
        return isa_v3::name##_table; \
      default:                       \
        return isa_v2::name##_table; \
    }                                \
  }
#elif defined(FASTROBUST_HAS_neon)
#define FR_CPU_TABLE(Table, name)  \
  namespace isa_neon {             \
  extern const Table name##_table; \
  }                                \
  inline const Table& name() { return isa_neon::name##_table; }
#elif defined(FASTROBUST_HAS_base)
#define FR_CPU_TABLE(Table, name)  \
  namespace isa_base {             \
  extern const Table name##_table; \
  }                                \
  inline const Table& name() { return isa_base::name##_table; }
#else
#define FR_CPU_TABLE(Table, name)
#endif
