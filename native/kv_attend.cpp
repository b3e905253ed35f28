// Attention over a quantized cache (flash decoding). Every row, key-value head and block of query rows is cut into
// parts of at most 512 tokens: first the quantized segments, then the tokens whose values are exact. A part gives a
// maximum, a sum and an unscaled output per query row; these are merged in the order of the parts.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "generic/kv_floats.hpp"
#include "kv.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace bitforbit {
namespace {

// Results of parts that wait for their merge; if there were more, blocks of query rows take turns.
constexpr std::size_t kPartialBytes = 32 << 20;
// Products that a thread should have at least when parts are merged.
constexpr std::size_t kMergePerThread = 1 << 17;

std::size_t pad64(std::size_t n) { return (n + 63) / 64 * 64; }

thread_local Workspace workspace, partial_results;  // of a worker; of the caller

// A row of the batch: token counts, and its parts.
struct Row {
  std::size_t length, keys, values;  // seen; quantized, counted from `sink` on
  std::size_t sinks, exact;          // tokens with exact values; the first `sinks` of them begin the row
  std::size_t segments, parts;
  std::size_t first_slot, first_part;  // slot of token 0; parts of the rows before
};

// A result: maxima, sums, [head_dim] outputs of the query rows of a block.
struct Partial {
  float *max, *sum, *out;
};

// A block of query rows that share a row of the batch and a key-value head.
struct Block {
  std::size_t b, h, first, count;
};

class Attention {
 public:
  Attention(const KvCache& cache, const KvAttention& a, const KvOps& ops)
      : cache_(cache), a_(a), ops_(ops), r_(cache.record), queries_(a.queries_per_head * a.query_rows) {
    for (std::size_t b = 0; b < cache.batch; ++b) {
      rows_.push_back(make_row(b));
      parts_ += rows_.back().parts;
    }
  }

  void run() {
    const std::size_t blocks = (queries_ + kKvQueries - 1) / kKvQueries;
    const std::size_t floats = partial_floats(), per_block = parts_ * cache_.heads;
    const std::size_t at_once =
        std::clamp<std::size_t>(kPartialBytes / (4 * floats * std::max<std::size_t>(per_block, 1)), 1, blocks);
    // A pointer: a worker's own partial_results are others.
    float* const partials =
        reinterpret_cast<float*>(partial_results.reserve(4 * floats * std::max<std::size_t>(per_block, 1) * at_once));
    const std::size_t most = std::min(kKvQueries, queries_);
    const auto partial = [&](std::size_t index) {
      float* at = partials + index * floats;
      return Partial{at, at + most, at + 2 * most};
    };
    for (std::size_t first = 0; first < blocks; first += at_once) {
      const std::size_t n = std::min(at_once, blocks - first);
      // Partial results are ordered by row, head, block, part.
      const auto block_at = [&](std::size_t b, std::size_t h, std::size_t i) {
        const std::size_t begin = (first + i) * kKvQueries;
        return Block{b, h, begin, std::min(kKvQueries, queries_ - begin)};
      };
      parallel_for(per_block * n, 1, a_.threads, [&](std::size_t task) {
        [[maybe_unused]] const DefaultFloats floating{};
        std::size_t b = cache_.batch - 1;
        while (rows_[b].first_part * cache_.heads * n > task) --b;
        const std::size_t rest = task - rows_[b].first_part * cache_.heads * n, part = rest % rows_[b].parts;
        const std::size_t head = rest / rows_[b].parts;
        compute(block_at(b, head / n, head % n), part, partial(task));
      });
      const std::size_t merges = cache_.batch * cache_.heads * n;
      const std::size_t products = per_block * n * kKvQueries * r_.head_dim;
      const int useful = static_cast<int>(
          std::min<std::size_t>(1 + products / kMergePerThread, static_cast<std::size_t>(std::max(a_.threads, 1))));
      parallel_for(merges, 1, useful, [&](std::size_t task) {
        [[maybe_unused]] const DefaultFloats floating{};
        const std::size_t b = task / (cache_.heads * n), h = task / n % cache_.heads, i = task % n;
        const std::size_t begin = rows_[b].first_part * cache_.heads * n + (h * n + i) * rows_[b].parts;
        merge(block_at(b, h, i), partial(begin));
      });
    }
    partial_results.release();
  }

 private:
  // A multiple of 16, for the vectors of the kernels.
  std::size_t partial_floats() const { return pad64(4 * std::min(kKvQueries, queries_) * (2 + r_.head_dim)) / 4; }

  struct Room {
    float *q, *scores, *more;  // [8][head_dim], [8][512] twice
    std::uint8_t *kernel, *mask;
    const std::uint8_t** rows;  // [512]
  };

  std::size_t query_head(const Block& block, std::size_t m) const {
    return block.h * a_.queries_per_head + (block.first + m) / a_.query_rows;
  }
  std::size_t query_row(const Block& block, std::size_t m) const { return (block.first + m) % a_.query_rows; }

  Row make_row(std::size_t b) const {
    Row row{};
    const std::size_t quantized_at = cache_.length(b, cache_.tokens);
    row.length = cache_.length(b, a_.visible);
    row.keys = cache_.keys_quantized(quantized_at), row.values = cache_.values_quantized(quantized_at);
    row.sinks = std::min(cache_.sink, row.length);
    row.exact = row.length - row.values;
    row.segments = (row.values + kKvSegment - 1) / kKvSegment;
    row.parts = row.segments + (row.exact + kKvSegment - 1) / kKvSegment;
    row.first_slot = static_cast<std::size_t>(cache_.start[b]);
    row.first_part = parts_;
    if (row.keys > kKvSegment * cache_.segments.size()) {
      throw std::invalid_argument("the segments do not hold all quantized tokens");
    }
    if (row.exact - row.sinks > cache_.capacity) {
      throw std::invalid_argument("the window does not hold all exact tokens");
    }
    return row;
  }

  Room reserve() const {
    const std::size_t kernel = pad64(ops_.scratch_bytes(r_));
    std::uint8_t* at = workspace.reserve(4 * kKvQueries * (r_.head_dim + 2 * kKvScores) + kernel + kKvSegment +
                                         sizeof(void*) * kKvSegment);
    Room room{};
    room.q = reinterpret_cast<float*>(at);
    room.scores = room.q + kKvQueries * r_.head_dim;
    room.more = room.scores + kKvQueries * kKvScores;
    room.kernel = reinterpret_cast<std::uint8_t*>(room.more + kKvQueries * kKvScores);
    room.mask = room.kernel + kernel;
    room.rows = reinterpret_cast<const std::uint8_t**>(room.mask + kKvSegment);
    return room;
  }

  void compute(const Block& block, std::size_t part, Partial result) const {
    const Room room = reserve();
    for (std::size_t m = 0; m < block.count; ++m) {
      const std::size_t at =
          block.b * a_.q_strides[0] + query_head(block, m) * a_.q_strides[1] + query_row(block, m) * a_.q_strides[2];
      widen(r_.dtype, a_.q + at * r_.item, r_.head_dim, room.q + m * r_.head_dim);
    }
    std::fill_n(result.out, block.count * r_.head_dim, 0.0f);
    const KvQueries queries{block.count, room.q, room.kernel};
    const Row& row = rows_[block.b];
    if (part < row.segments) {
      compute_segment(block, part, queries, room, result);
    } else {
      compute_exact(block, (part - row.segments) * kKvSegment, queries, room, result);
    }
    workspace.release();
  }

  void compute_segment(const Block& block, std::size_t segment, const KvQueries& queries, const Room& room,
                       Partial result) const {
    const Row& row = rows_[block.b];
    const std::size_t begin = segment * kKvSegment, count = std::min(kKvSegment, row.values - begin);
    const std::uint8_t* record = record_of(block, segment);
    ops_.score_quantized(r_, record, 0, (count + r_.group - 1) / r_.group * (r_.group / kKvTile), queries, room.scores);
    softmax(block, row.first_slot + cache_.sink + begin, count, 0, 0, room, result);
    ops_.sum_quantized(r_, record, count, room.scores, queries, result.out);
  }

  // Of the tokens with exact values, those from `begin` on: first of them the sinks, the keys of the next ones may be
  // quantized.
  void compute_exact(const Block& block, std::size_t begin, const KvQueries& queries, const Room& room,
                     Partial result) const {
    const Row& row = rows_[block.b];
    const std::size_t end = std::min(begin + kKvSegment, row.exact);
    const std::size_t sinks = std::clamp(row.sinks, begin, end) - begin;  // in this part
    // Tokens that are no sinks, counted from `sink` on: [first, last), keys quantized up to `middle`.
    const std::size_t first = row.values + std::max(begin, row.sinks) - row.sinks;
    const std::size_t last = first + (end - begin - sinks), middle = std::clamp(row.keys, first, last);
    const std::size_t row_bytes = r_.head_dim * r_.item, head = block.b * cache_.heads + block.h;
    const auto point = [&](const std::uint8_t* sink, const std::uint8_t* window) {
      for (std::size_t i = 0; i < sinks; ++i) room.rows[i] = sink + (head * cache_.sink + begin + i) * row_bytes;
      for (std::size_t i = first; i < last; ++i) {
        const std::size_t slot = row.first_slot + cache_.sink + i;
        room.rows[sinks + i - first] = window + (head * cache_.capacity + slot % cache_.capacity) * row_bytes;
      }
    };
    point(cache_.sink_k, cache_.window_k);
    ops_.score_exact(r_, room.rows, sinks, queries, room.scores);
    for (std::size_t i = first; i < middle;) {
      i = score_keys(block, i, middle, queries, room, sinks + i - first);
    }
    const std::size_t at = sinks + middle - first;
    ops_.score_exact(r_, room.rows + at, last - middle, queries, room.scores + at);
    softmax(block, row.first_slot + begin, sinks, row.first_slot + cache_.sink + first, last - first, room, result);
    point(cache_.sink_v, cache_.window_v);
    ops_.sum_exact(r_, room.rows, end - begin, room.scores, queries, result.out);
  }

  // Scores of quantized keys from `begin` on, as far as one segment goes: to room.scores + at. The end.
  std::size_t score_keys(const Block& block, std::size_t begin, std::size_t end, const KvQueries& queries,
                         const Room& room, std::size_t at) const {
    const std::size_t segment = begin / kKvSegment, base = segment * kKvSegment;
    end = std::min(end, base + kKvSegment);
    const std::size_t first = (begin - base) / r_.group, last = (end - base + r_.group - 1) / r_.group;
    const std::size_t per_group = r_.group / kKvTile;
    ops_.score_quantized(r_, record_of(block, segment), first * per_group, (last - first) * per_group, queries,
                         room.more);
    for (std::size_t m = 0; m < block.count; ++m) {
      std::memcpy(room.scores + m * kKvScores + at, room.more + m * kKvScores + (begin - base - first * r_.group),
                  4 * (end - begin));
    }
    return end;
  }

  const std::uint8_t* record_of(const Block& block, std::size_t segment) const {
    return cache_.segments[segment] + (block.b * cache_.heads + block.h) * r_.bytes;
  }

  // The scores of `count` tokens from slot `slot` on, then of `more` from slot `next` on.
  void softmax(const Block& block, std::size_t slot, std::size_t count, std::size_t next, std::size_t more,
               const Room& room, Partial result) const {
    for (std::size_t m = 0; m < block.count; ++m) {
      if (a_.mask) {
        const std::uint8_t* mask = a_.mask + block.b * a_.mask_strides[0] + query_head(block, m) * a_.mask_strides[1] +
                                   query_row(block, m) * a_.mask_strides[2];
        std::memcpy(room.mask, mask + slot, count);
        std::memcpy(room.mask + count, mask + next, more);
      }
      ops_.softmax({a_.scaling, a_.softcap, count + more}, a_.mask ? room.mask : nullptr, room.scores + m * kKvScores,
                   result.max + m, result.sum + m);
    }
  }

  void merge(const Block& block, Partial first) const {
    const std::size_t parts = rows_[block.b].parts, stride = partial_floats();
    std::vector<float> sums(r_.head_dim);
    for (std::size_t m = 0; m < block.count; ++m) {
      const std::size_t head = query_head(block, m);
      float most = a_.sinks ? a_.sinks[head] : -std::numeric_limits<float>::infinity();
      for (std::size_t i = 0; i < parts; ++i) most = std::max(most, first.max[i * stride + m]);
      const bool anything = most != -std::numeric_limits<float>::infinity();
      float total = a_.sinks && anything ? std::exp(a_.sinks[head] - most) : 0.0f;
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (std::size_t i = 0; anything && i < parts; ++i) {
        const float weight = std::exp(first.max[i * stride + m] - most);
        total += weight * first.sum[i * stride + m];
        const float* part = first.out + i * stride + m * r_.head_dim;
        for (std::size_t c = 0; c < r_.head_dim; ++c) sums[c] += weight * part[c];
      }
      const float scale = total > 0.0f || total != total ? 1.0f / total : 0.0f;
      for (float& sum : sums) sum *= scale;
      const std::size_t at =
          (block.b * cache_.heads * a_.queries_per_head + head) * a_.query_rows + query_row(block, m);
      if (a_.lse) a_.lse[at] = anything ? most + std::log(total) : -std::numeric_limits<float>::infinity();
      write(sums.data(), a_.out + at * r_.head_dim * (a_.out_f32 ? 4 : r_.item));
    }
  }

  void write(const float* sums, std::uint8_t* out) const {
    const KvDtype dtype = a_.out_f32 ? KvDtype::kF32 : r_.dtype;
    for (std::size_t c = 0; c < r_.head_dim; ++c) {
      if (dtype == KvDtype::kF32) {
        std::memcpy(out + 4 * c, sums + c, 4);
      } else {
        const std::uint16_t bits = dtype == KvDtype::kF16 ? f16_nearest(sums[c]) : bf16_nearest(sums[c]);
        std::memcpy(out + 2 * c, &bits, 2);
      }
    }
  }

  const KvCache& cache_;
  const KvAttention& a_;
  const KvOps& ops_;
  const KvRecord& r_;
  const std::size_t queries_;  // that share a key-value head
  std::vector<Row> rows_;
  std::size_t parts_ = 0;  // of all rows
};

}  // namespace

void kv_attend(const KvCache& cache, const KvAttention& a, const KvOps& ops) { Attention(cache, a, ops).run(); }

}  // namespace bitforbit
