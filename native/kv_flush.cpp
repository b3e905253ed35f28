#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "dispatch.hpp"
#include "kv.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace bitforbit {
namespace {

// Elements that a thread should have at least, or starting it costs more than it saves.
constexpr std::size_t kElementsPerThread = 1 << 16;

// Where the tokens of a row and head lie: `pending` those of the newest slots, the window the others.
struct Rows {
  const std::uint8_t *window, *pending;
  std::size_t row_bytes, capacity, pending_stride, pending_slots;  // the first slot of `pending`

  const std::uint8_t* slot(std::size_t x) const {
    if (pending && x >= pending_slots) return pending + (x - pending_slots) * pending_stride;
    return window + x % capacity * row_bytes;
  }
};

// What there is to do in a row of the batch, for every head alike: tokens counted from `sink` on.
struct RowWork {
  std::size_t k_begin, k_end, v_begin, v_end;
  std::size_t groups, tiles;  // tiles that the values touch
  std::size_t first_task;     // over all rows
};

}  // namespace

std::span<const KvOps* const> kv_implementations() {
  static constexpr const KvOps* kAll[] = {
      &kKvScalar,
#if BITFORBIT_X86
      &kKvAvx2,
      &kKvAvx512,
      &kKvAvx512Bf16,
#endif
  };
  return kAll;
}

const KvOps& find_kv(std::string_view isa, KvDtype dtype) {
  const KvOps* best = &kKvScalar;
  for (const KvOps* ops : kv_implementations()) {
    if (!ops->any_dtype && dtype != KvDtype::kBF16) continue;
    for (const Implementation& level : implementations()) {
      if (level.name == ops->isa && level.supported) best = ops;
      if (level.name == isa) break;
    }
  }
  return *best;
}

KvRecord make_kv_record(KvDtype dtype, int k_bits, int v_bits, std::size_t head_dim, std::size_t group,
                        std::size_t v_group) {
  KvRecord r{};
  r.dtype = dtype, r.k_bits = k_bits, r.v_bits = v_bits;
  r.head_dim = head_dim, r.group = group, r.v_group = v_group;
  r.item = dtype == KvDtype::kF32 ? 4 : 2;
  r.key_tile = kKvTile * head_dim * static_cast<std::size_t>(k_bits) / 8;
  r.key_group = 4 * head_dim;
  r.value_tile = kKvTile * head_dim * static_cast<std::size_t>(v_bits) / 8;
  r.value_params_tile = 4 * kKvTile * (head_dim / v_group);
  r.key_params = kKvTiles * r.key_tile;
  r.value_codes = r.key_params + kKvSegment / group * r.key_group;
  r.value_params = r.value_codes + kKvTiles * r.value_tile;
  r.bytes = r.value_params + kKvTiles * r.value_params_tile;
  return r;
}

std::size_t kv_flush(const KvCache& cache, std::size_t new_tokens, const KvPending& pending, const KvOps& ops,
                     int threads) {
  const KvRecord& r = cache.record;
  std::vector<RowWork> work(cache.batch);
  std::size_t tasks = 0, elements = 0;
  for (std::size_t b = 0; b < cache.batch; ++b) {
    const std::size_t before = cache.length(b, cache.tokens), after = cache.length(b, cache.tokens + new_tokens);
    RowWork& w = work[b];
    w.k_begin = cache.keys_quantized(before), w.k_end = cache.keys_quantized(after);
    w.v_begin = cache.values_quantized(before), w.v_end = cache.values_quantized(after);
    w.groups = (w.k_end - w.k_begin) / r.group;
    w.tiles = w.v_end > w.v_begin ? (w.v_end - 1) / kKvTile - w.v_begin / kKvTile + 1 : 0;
    w.first_task = tasks;
    tasks += cache.heads * (w.groups + w.tiles);
    elements += cache.heads * (w.k_end - w.k_begin + w.v_end - w.v_begin) * r.head_dim;
    if (std::max(w.k_end, w.v_end) > kKvSegment * cache.segments.size()) {
      throw std::invalid_argument("the segments have no room for the tokens that leave the window");
    }
  }
  std::atomic<std::size_t> bad{0};
  const int useful = static_cast<int>(
      std::min<std::size_t>(1 + elements / kElementsPerThread, static_cast<std::size_t>(std::max(threads, 1))));
  parallel_for(tasks, 1, useful, [&](std::size_t task) {
    [[maybe_unused]] const DefaultFloats floats{};
    std::size_t b = cache.batch - 1;
    while (work[b].first_task > task) --b;
    const RowWork& w = work[b];
    const std::size_t rest = task - w.first_task, h = rest / (w.groups + w.tiles), item = rest % (w.groups + w.tiles);
    const std::size_t head = b * cache.heads + h, row_bytes = r.head_dim * r.item;
    // Slot of the token from which on quantized tokens count.
    const std::size_t base = static_cast<std::size_t>(cache.start[b]) + cache.sink;
    const bool keys = item < w.groups;
    const std::uint8_t* fresh = keys ? pending.k : pending.v;
    const std::size_t* strides = keys ? pending.k_strides : pending.v_strides;
    const Rows rows{(keys ? cache.window_k : cache.window_v) + head * cache.capacity * row_bytes,
                    fresh ? fresh + (b * strides[0] + h * strides[1]) * r.item : nullptr,
                    row_bytes,
                    cache.capacity,
                    strides[2] * r.item,
                    cache.tokens};
    std::size_t begin, end;
    if (keys) {
      begin = w.k_begin + item * r.group, end = begin + r.group;
    } else {
      const std::size_t tile = w.v_begin / kKvTile + (item - w.groups);
      begin = std::max(w.v_begin, tile * kKvTile), end = std::min(w.v_end, (tile + 1) * kKvTile);
    }
    const std::uint8_t* tokens[kKvMostGroup];
    for (std::size_t i = begin; i < end; ++i) tokens[i - begin] = rows.slot(base + i);
    std::uint8_t* record = cache.segments[begin / kKvSegment] + head * r.bytes;
    const std::size_t first = begin % kKvSegment;
    bad += keys ? ops.quantize_keys(r, tokens, first / r.group, record)
                : ops.quantize_values(r, tokens, first, end - begin, record);
  });
  return bad;
}

}  // namespace bitforbit
