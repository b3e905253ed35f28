#include "dispatch.hpp"

namespace bitforbit {

const std::vector<Implementation>& implementations() {
  static const std::vector<Implementation> all = [] {
    std::vector<Implementation> list{{"scalar", &kPlanesScalar, true}};
#if BITFORBIT_X86
    // __builtin_cpu_supports also checks that the operating system saves the registers (XGETBV).
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                      __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd");
    const bool vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    const bool bf16 = vbmi2 && __builtin_cpu_supports("avx512bf16");
    list.push_back({"avx2", &kPlanesAvx2, avx2});
    list.push_back({"avx512", &kPlanesAvx512, avx512});
    list.push_back({"avx512_vbmi2", &kPlanesAvx512Vbmi2, vbmi2});
    list.push_back({"avx512_bf16", &kPlanesAvx512Vbmi2, bf16});  // adds products only
#endif
    return list;
  }();
  return all;
}

const Implementation* find_implementation(std::string_view name) {
  for (const Implementation& candidate : implementations()) {
    if (candidate.name == name && candidate.supported) return &candidate;
  }
  return nullptr;
}

}  // namespace bitforbit
