// The contract between the drivers of quantized caches (kv_flush.cpp, kv_attend.cpp) and the instruction sets
// (isa/*/kv.cpp). Plain pointers and C structs, for the reason given in planes_block.hpp. The layout of a record is
// that of bitforbit.kv.layout, which is normative.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitforbit {

inline constexpr std::size_t kKvSegment = 512;  // tokens of a record
inline constexpr std::size_t kKvTile = 32;
inline constexpr std::size_t kKvTiles = kKvSegment / kKvTile;
inline constexpr std::size_t kKvMostHead = 512;       // channels
inline constexpr std::size_t kKvMostGroup = 128;      // tokens or channels
inline constexpr std::size_t kKvQueries = 8;          // query rows that share the unpacking of codes
inline constexpr std::size_t kKvScores = kKvSegment;  // floats between the scores of two query rows

enum class KvDtype : std::uint8_t { kBF16, kF16, kF32 };

// Sizes and offsets, in bytes, of a record (KvLayout in layout.py), and what it is made of.
struct KvRecord {
  KvDtype dtype;
  int k_bits, v_bits;
  std::size_t head_dim, group, v_group;
  std::size_t item;  // bytes of a number of the model's dtype
  std::size_t key_tile, key_group, value_tile, value_params_tile;
  std::size_t key_params, value_codes, value_params, bytes;
};

// Query rows that share one row and key-value head of the cache.
struct KvQueries {
  std::size_t count;   // 1 to kKvQueries
  const float* q;      // [count][head_dim], on a 64-byte boundary
  std::uint8_t* room;  // scratch_bytes, on a 64-byte boundary, this thread's own; holds anything
};

// How scores become probabilities.
struct KvSoftmax {
  float scaling, softcap;  // softcap 0: none
  std::size_t count;       // tokens
};

// One instruction set. Called with the rounding mode reset to nearest even and denormals kept.
struct KvOps {
  const char* isa;  // the level (dispatch.hpp) from which on this is used; of several the last one in the list is
  bool any_dtype;   // false: products of BF16 models only
  std::size_t (*scratch_bytes)(const KvRecord& r);

  // Group `index` of the record from its r.group rows. The number of channels with a NaN or an infinity.
  std::size_t (*quantize_keys)(const KvRecord& r, const std::uint8_t* const* rows, std::size_t index,
                               std::uint8_t* record);
  // Values of tokens first to first + count - 1 of a record, all in one tile. Groups with a NaN or an infinity.
  std::size_t (*quantize_values)(const KvRecord& r, const std::uint8_t* const* rows, std::size_t first,
                                 std::size_t count, std::uint8_t* record);

  // scores[m][i] = q[m] . key i, for the 32-token tiles first to first + count - 1 of a record; whole groups.
  void (*score_quantized)(const KvRecord& r, const std::uint8_t* record, std::size_t first, std::size_t count,
                          const KvQueries& q, float* scores);
  // The same for exact keys.
  void (*score_exact)(const KvRecord& r, const std::uint8_t* const* rows, std::size_t count, const KvQueries& q,
                      float* scores);
  // Scores, not yet scaled, become exp(score - max) in place, then zeros up to a tile's end; unseen tokens (0 in
  // `mask`, which may be nullptr) become 0.
  void (*softmax)(const KvSoftmax& s, const std::uint8_t* mask, float* scores, float* max, float* sum);
  // out[m] += sum of p[m][i] * value i, for the first `count` tokens of a record; p up to a tile's end is 0.
  void (*sum_quantized)(const KvRecord& r, const std::uint8_t* record, std::size_t count, const float* p,
                        const KvQueries& q, float* out);
  void (*sum_exact)(const KvRecord& r, const std::uint8_t* const* rows, std::size_t count, const float* p,
                    const KvQueries& q, float* out);
};

extern const KvOps kKvScalar;
#if BITFORBIT_X86
extern const KvOps kKvAvx2;
extern const KvOps kKvAvx512;
extern const KvOps kKvAvx512Bf16;
#endif

}  // namespace bitforbit
