// The `planes` codec over whole tensors: geometry, code tables, threads (docs/format.md, section 3).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "errors.hpp"
#include "planes_block.hpp"

namespace bitforbit {

// Memory whose first byte lies on a 64-byte boundary, not initialized.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t size);
  std::uint8_t* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  std::uint8_t* release() {
    size_ = 0;
    return data_.release();
  }

 private:
  struct Free {
    void operator()(std::uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<std::uint8_t[], Free> data_;
  std::size_t size_ = 0;
};

struct Layout {
  Kind kind;
  bool wide;  // BF16 kept as F32 whose low 16 bits are zero
  std::size_t rows, cols, rows_per_table;

  std::size_t item_bytes() const;
  std::size_t row_bytes() const { return cols * item_bytes(); }
  std::size_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  std::size_t tables() const { return (rows + rows_per_table - 1) / rows_per_table; }
  std::size_t block_rows(std::size_t block) const;
  std::size_t groups_in(std::size_t block_rows) const;
  std::size_t groups() const;
  std::size_t code_bytes() const;
  std::size_t digits_bytes() const;
  std::size_t plane_bytes(int plane) const;
  std::size_t sign_mantissa_bytes() const;
};

struct EncodedPlanes {
  std::size_t rows_per_table = 0;
  Buffer code, digits, sign_mantissa, tails;
};

// Encodes rows * cols elements, row-major. layout.rows_per_table == 0 lets the encoder choose it.
EncodedPlanes encode_planes(const std::uint8_t* src, Layout layout, const PlanesOps& ops, int threads);

struct PlanesParts {
  std::span<const std::uint8_t> code, digits, sign_mantissa, tails;
};

// The blocks of one encoded matrix, its sizes and counts checked. Views the parts, copies nothing.
class BlockReader {
 public:
  // Throws CorruptData unless every part has the size that layout and counts ask for.
  BlockReader(const PlanesParts& parts, const Layout& layout);

  // Everything but the scratch buffers and `out`; exponents4 points into the part, without slack.
  DecodeBlock at(std::size_t block) const;

  // The error for a block whose digits and tail contradict each other.
  CorruptData contradiction(std::size_t block) const;

 private:
  PlanesParts parts_;
  Layout layout_;
  std::size_t groups_per_block_;
  const std::uint8_t* index_;
  std::vector<std::uint64_t> offsets_;  // where each block's tail begins
};

// Scratch for the tail of one block, which give_tail_scratch lays out; it copies the raw exponents there, so that
// vector loads past their end stay inside. Damaged data may read scratch that nothing wrote: zero new scratch once.
std::size_t tail_scratch_bytes(const DecodeBlock& b);
void give_tail_scratch(DecodeBlock& b, std::uint8_t* scratch);

// Decodes rows [begin, end) to `out` ((end - begin) * row_bytes() bytes). Throws CorruptData; whatever the parts
// hold, nothing outside them and `out` is touched.
void decode_planes(const PlanesParts& parts, const Layout& layout, std::size_t begin, std::size_t end,
                   std::uint8_t* out, const PlanesOps& ops, int threads);

// counts[e] += number of elements with exponent e.
void exponent_histogram(const std::uint8_t* src, std::size_t elements, Kind kind, bool wide, std::uint64_t counts[256]);

// Whether the low 16 bits of every 32-bit word are zero.
bool is_widened_bf16(const std::uint8_t* src, std::size_t elements);

}  // namespace bitforbit
