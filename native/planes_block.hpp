// The contract between the baseline code (planes.cpp) and the instruction sets (isa/*/planes.cpp): one 16-row block.
//
// Files under isa/ are compiled with flags that the running CPU may not support, so they must not instantiate
// anything that the linker could share with baseline code: no std:: templates, no inline functions but those of
// namespaces that belong to one instruction set. Hence plain pointers and C structs here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitforbit {

inline constexpr std::size_t kBlockRows = 16;
inline constexpr std::size_t kGroup = 64;       // positions per group: one tile row
inline constexpr std::size_t kCodedRanks = 9;   // three levels of three ranks
inline constexpr std::size_t kTableBytes = 16;  // 9 exponents, 7 zeros
inline constexpr std::size_t kIndexBytes = 12;  // u32 n2, n3, n4
inline constexpr std::size_t kSlack = 1152;     // scratch bytes past the end that vector code may touch: a tile and 128
inline constexpr std::size_t kMaxPlanes = 3;

enum class Kind : std::uint8_t { kBF16, kF16, kF32, kF8E4M3, kF8E5M2 };

// One block to decode. Every pointer covers what the counts say; scratch buffers hold kSlack bytes more.
struct DecodeBlock {
  Kind kind;
  bool wide;  // BF16 restored as F32 whose low 16 bits are zero
  std::size_t rows, cols;
  const std::uint8_t* table;   // [16]
  const std::uint8_t* digits;  // [groups * 16]
  const std::uint8_t* planes[kMaxPlanes];
  const std::uint8_t *level2, *level3;  // packed digits of the tail, [ceil(n / 64) * 16]
  std::size_t n2, n3, n4;
  std::uint8_t* exponents2;        // scratch [ceil64(n2) + kSlack]
  std::uint8_t* exponents3;        // scratch [ceil64(n3) + kSlack]
  const std::uint8_t* exponents4;  // the raw exponents, readable for kSlack bytes past n4
  std::uint8_t* out;
  std::size_t out_stride;  // bytes from row to row
  bool stream;             // the output outgrows the caches: plain BF16, every row on a 64-byte boundary
};

// One block to encode. Scratch buffers hold groups * 64 + kSlack bytes.
struct EncodeBlock {
  Kind kind;
  bool wide;
  std::size_t rows, cols;
  const std::uint8_t* table;
  const std::uint8_t* src;
  std::size_t src_stride;
  std::uint8_t* digits;
  std::uint8_t* planes[kMaxPlanes];
  std::uint8_t *ranks2, *ranks3, *exponents4;  // scratch: ranks left for each level, raw exponents
  std::uint8_t *level2, *level3;               // out: packed digits of the tail
  std::size_t n2, n3, n4;                      // out
};

struct PlanesOps {
  const char* name;
  bool (*decode)(const DecodeBlock&);  // false: the tails contradict the digits
  void (*encode)(EncodeBlock&);
};

extern const PlanesOps kPlanesScalar;
#if BITFORBIT_X86
extern const PlanesOps kPlanesAvx2;
extern const PlanesOps kPlanesAvx512;
extern const PlanesOps kPlanesAvx512Vbmi2;
#endif

}  // namespace bitforbit
