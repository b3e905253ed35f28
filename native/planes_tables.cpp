// Measured on encoder weights (22.7 M parameters): one table per matrix costs 10.737 bits/weight, one per 64 rows
// 10.707, one per 16 rows 10.712. So histograms are taken per 64 rows and merged where that is cheaper.
#include "planes_tables.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "generic/planes_kinds.hpp"
#include "parallel.hpp"

namespace bitforbit {
namespace {

constexpr std::size_t kRowsPerHistogram = 64;
constexpr std::size_t kSample = 1 << 13;  // elements that a histogram looks at, about, if there are more
constexpr std::size_t kChunk = 64;

// Counts the exponents of n elements. Four tables, as equal neighbours would otherwise wait for each other's store.
template <class Word, int Shift, unsigned Mask>
void count(const std::uint8_t* src, std::size_t n, std::uint32_t (*tables)[256]) {
  std::size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    Word w[4];
    std::memcpy(w, src + i * sizeof(Word), sizeof w);
    for (int k = 0; k < 4; ++k) ++tables[k][w[k] >> Shift & Mask];
  }
  for (; i < n; ++i) {
    Word w;
    std::memcpy(&w, src + i * sizeof(Word), sizeof w);
    ++tables[0][w >> Shift & Mask];
  }
}

void count_kind(const std::uint8_t* src, std::size_t n, Kind kind, bool wide, std::uint32_t (*tables)[256]) {
  switch (kind) {
    case Kind::kBF16:
      return wide ? count<std::uint32_t, 23, 255>(src, n, tables) : count<std::uint16_t, 7, 255>(src, n, tables);
    case Kind::kF16: return count<std::uint16_t, 10, 31>(src, n, tables);
    case Kind::kF32: return count<std::uint32_t, 23, 255>(src, n, tables);
    case Kind::kF8E4M3: return count<std::uint8_t, 3, 15>(src, n, tables);
    case Kind::kF8E5M2: return count<std::uint8_t, 2, 31>(src, n, tables);
  }
}

// One in how many chunks of 64 elements is counted in a histogram over that many rows: a power of two.
std::size_t sampling(const Layout& layout, std::size_t rows) {
  std::size_t stride = 1;
  while (rows * layout.cols / stride >= 2 * kSample) stride *= 2;
  return stride;
}

Histogram histogram_of_rows(const std::uint8_t* src, const Layout& layout, std::size_t begin, std::size_t end,
                            std::size_t stride) {
  std::uint32_t tables[4][256] = {};
  const std::size_t item = layout.item_bytes();
  for (std::size_t row = begin; row < end; ++row) {
    if (stride == 1) {
      count_kind(src + row * layout.row_bytes(), layout.cols, layout.kind, layout.wide, tables);
      continue;
    }
    for (std::size_t col = row % stride * kChunk; col < layout.cols; col += stride * kChunk) {
      const std::size_t n = std::min(kChunk, layout.cols - col);
      count_kind(src + row * layout.row_bytes() + col * item, n, layout.kind, layout.wide, tables);
    }
  }
  Histogram sum{};
  for (const auto& table : tables) {
    for (int e = 0; e < 256; ++e) sum[e] += table[e];
  }
  return sum;
}

// The nine most frequent exponents, ties by exponent; zeros where there are fewer.
std::array<std::uint8_t, kTableBytes> table_of(const Histogram& h) {
  std::array<std::uint8_t, 256> order;
  std::iota(order.begin(), order.end(), std::uint8_t{0});
  std::partial_sort(order.begin(), order.begin() + kCodedRanks, order.end(),
                    [&](std::uint8_t a, std::uint8_t b) { return h[a] != h[b] ? h[a] > h[b] : a < b; });
  std::array<std::uint8_t, kTableBytes> table{};
  for (std::size_t r = 0; r < kCodedRanks && h[order[r]]; ++r) table[r] = order[r];
  return table;
}

// Bits that the digits of the counted exponents take: 2, 4 or 6 by level, 14 with a raw byte.
std::uint64_t cost(const Histogram& h, const std::array<std::uint8_t, kTableBytes>& table) {
  std::uint64_t total = 0, coded = 0, bits = 0;
  for (const std::uint32_t n : h) total += n;
  bool zero_seen = false;
  for (std::size_t r = 0; r < kCodedRanks; ++r) {
    if (!table[r] && (zero_seen || !h[0])) break;  // from here on zeros only fill up
    zero_seen = zero_seen || !table[r];
    coded += h[table[r]];
    bits += h[table[r]] * 2 * (r / 3 + 1);
  }
  return bits + 14 * (total - std::min(coded, total));
}

}  // namespace

HistogramPlan plan_histograms(const Layout& layout) {
  const std::size_t unit = layout.rows_per_table ? layout.rows_per_table : kRowsPerHistogram;
  const std::size_t count = (layout.rows + unit - 1) / unit;
  return {unit, count, sampling(layout, std::min(unit, layout.rows)),
          sampling(layout, layout.rows - (count - 1) * unit)};
}

CodeTables choose_tables(std::vector<Histogram> histograms, const Layout& layout) {
  const HistogramPlan plan = plan_histograms(layout);
  CodeTables best{0, {}};
  std::uint64_t best_bits = ~std::uint64_t{0};
  for (std::size_t rows = plan.rows;; rows *= 4) {
    CodeTables candidate{rows, {}};
    std::uint64_t bits = 0;
    for (const Histogram& h : histograms) {
      const auto table = table_of(h);
      bits += cost(h, table) * plan.stride + 8 * kTableBytes;
      candidate.bytes.insert(candidate.bytes.end(), table.begin(), table.end());
    }
    if (bits < best_bits) {
      best_bits = bits;
      best = std::move(candidate);
    }
    if (histograms.size() == 1 || layout.rows_per_table) return best;
    std::vector<Histogram> merged((histograms.size() + 3) / 4);
    for (std::size_t i = 0; i < histograms.size(); ++i) {
      for (int e = 0; e < 256; ++e) merged[i / 4][e] += histograms[i][e];
    }
    histograms = std::move(merged);
  }
}

CodeTables choose_tables(const std::uint8_t* src, const Layout& layout, int threads) {
  const HistogramPlan plan = plan_histograms(layout);
  std::vector<Histogram> histograms(plan.count);
  parallel_for(plan.count, 1 + (1 << 18) / (plan.rows * layout.cols + 1), threads, [&](std::size_t i) {
    const bool last = i + 1 == plan.count;
    histograms[i] = histogram_of_rows(src, layout, i * plan.rows, last ? layout.rows : (i + 1) * plan.rows,
                                      last ? plan.last_stride : plan.stride);
  });
  return choose_tables(std::move(histograms), layout);
}

void exponent_histogram(const std::uint8_t* src, std::size_t elements, Kind kind, bool wide,
                        std::uint64_t counts[256]) {
  constexpr std::size_t kPass = 1 << 30;  // so that the 32-bit counters cannot overflow
  for (std::size_t i = 0; i < elements; i += kPass) {
    std::uint32_t tables[4][256] = {};
    count_kind(src + i * item_size(kind, wide), std::min(kPass, elements - i), kind, wide, tables);
    for (const auto& table : tables) {
      for (int e = 0; e < 256; ++e) counts[e] += table[e];
    }
  }
}

}  // namespace bitforbit
