// Which exponents get which ranks: the encoder's choice, nothing that the format fixes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "planes.hpp"

namespace bitforbit {

struct CodeTables {
  std::size_t rows_per_table;
  std::vector<std::uint8_t> bytes;  // [tables * kTableBytes]
};

using Histogram = std::array<std::uint32_t, 256>;

// What is counted: one histogram for each `rows` rows. A histogram looks at one in `stride` chunks of 64 columns: in
// row r at the chunks c with c % stride == r % stride. The last one, of the rows that are left, has `last_stride`.
struct HistogramPlan {
  std::size_t rows, count, stride, last_stride;
};
HistogramPlan plan_histograms(const Layout& layout);

// Chooses by histograms that were counted elsewhere by that plan.
CodeTables choose_tables(std::vector<Histogram> histograms, const Layout& layout);

// Counts exponents (a sample of them in large matrices) and chooses the number of rows per table that makes the
// whole smallest; layout.rows_per_table != 0 prescribes it.
CodeTables choose_tables(const std::uint8_t* src, const Layout& layout, int threads);

}  // namespace bitforbit
