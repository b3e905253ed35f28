// Which exponents get which ranks: the encoder's choice, nothing that the format fixes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "planes.hpp"

namespace bitforbit {

struct CodeTables {
  std::size_t rows_per_table;
  std::vector<std::uint8_t> bytes;  // [tables * kTableBytes]
};

// Counts exponents (a sample of them in large matrices) and chooses the number of rows per table that makes the
// whole smallest; layout.rows_per_table != 0 prescribes it.
CodeTables choose_tables(const std::uint8_t* src, const Layout& layout, int threads);

}  // namespace bitforbit
