// Quantized key-value caches: quantizing what leaves the exact window, and attention that reads packed segments.
// bitforbit.kv.spec says which tokens are quantized, bitforbit.kv.layout where everything lies.
#pragma once

#include <span>
#include <string_view>

#include "kv_block.hpp"

namespace bitforbit {

// Every implementation, in order of preference: the last usable one wins.
std::span<const KvOps* const> kv_implementations();

// The best implementation for models of that dtype at instruction set level `isa` (or below).
const KvOps& find_kv(std::string_view isa, KvDtype dtype);

// One layer's cache as it was before a call. Addresses and lengths are the caller's promise.
struct KvCache {
  KvRecord record;
  std::size_t batch, heads;
  std::size_t residual, sink, capacity;     // tokens; capacity: of the windows, slot x lies at x mod capacity
  std::span<std::uint8_t* const> segments;  // each [batch, heads, record.bytes]
  const std::uint8_t *window_k, *window_v;  // [batch, heads, capacity, head_dim]
  const std::uint8_t *sink_k, *sink_v;      // [batch, heads, sink, head_dim]
  const std::int32_t* start;                // [batch] slots of padding
  std::size_t tokens;                       // slots that the quantized part was made of

  // Tokens of row b among so many slots.
  std::size_t length(std::size_t b, std::size_t slots) const {
    const auto padding = static_cast<std::size_t>(start[b]);
    return slots > padding ? slots - padding : 0;
  }
  // spec.py: keys_quantized, values_quantized.
  std::size_t keys_quantized(std::size_t length) const {
    return length > sink ? (length - sink) / residual * residual : 0;
  }
  std::size_t values_quantized(std::size_t length) const {
    return length > sink + residual ? length - sink - residual : 0;
  }
};

KvRecord make_kv_record(KvDtype dtype, int k_bits, int v_bits, std::size_t head_dim, std::size_t group,
                        std::size_t v_group);

// Keys and values of the newest slots, outside the window: [batch, heads, slots, head_dim], strides in elements.
struct KvPending {
  const std::uint8_t *k, *v;  // nullptr: everything is in the window
  std::size_t k_strides[3], v_strides[3];
};

// Quantizes what leaves the window when `new_tokens` slots join `cache.tokens`. Returns the number of groups with a NaN
// or an infinity.
std::size_t kv_flush(const KvCache& cache, std::size_t new_tokens, const KvPending& pending, const KvOps& ops,
                     int threads);

struct KvAttention {
  std::size_t visible;       // slots that are seen
  const std::uint8_t* q;     // [batch, heads * queries_per_head, query_rows, head_dim], the model's dtype
  std::size_t q_strides[3];  // elements
  std::size_t queries_per_head, query_rows;
  float scaling, softcap;       // softcap 0: none
  const float* sinks;           // [heads * queries_per_head] logits that join the denominator, or nullptr
  const std::uint8_t* mask;     // 1: seen; [batch, heads * queries_per_head, query_rows, visible], or nullptr
  std::size_t mask_strides[3];  // bytes; 0 where shared
  std::uint8_t* out;            // [batch, heads * queries_per_head, query_rows, head_dim], contiguous
  bool out_f32;                 // else the model's dtype
  float* lse;                   // [batch, heads * queries_per_head, query_rows], or nullptr
  int threads;
};

// out = softmax(scaling * q k^T) v. Query rows that see nothing: zeros, and -infinity in lse. Results do not depend on
// the number of threads, nor on other rows of the batch.
void kv_attend(const KvCache& cache, const KvAttention& a, const KvOps& ops);

}  // namespace bitforbit
