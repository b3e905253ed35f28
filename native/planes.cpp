#include "planes.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "errors.hpp"
#include "generic/planes_kinds.hpp"
#include "parallel.hpp"
#include "planes_tables.hpp"

namespace bitforbit {
namespace {

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
std::size_t pad64(std::size_t n) { return ceil_div(n, 64) * 64; }
std::size_t tail_digits_bytes(std::size_t n) { return ceil_div(n, kGroup) * (kGroup / 4); }

// Elements that a thread should get at least, or starting it costs more than it saves.
constexpr std::size_t kElementsPerTask = 1 << 17;

// Outputs from here on are written past the caches: below, whoever reads them next finds them there.
constexpr std::size_t kStreamBytes = 32 << 20;

std::size_t blocks_per_task(const Layout& layout) {
  return std::max<std::size_t>(1, kElementsPerTask / std::max<std::size_t>(1, layout.cols * kBlockRows));
}

struct Index {
  std::uint32_t n2, n3, n4;
};

Index load_index(const std::uint8_t* p) {
  const auto u32 = [&](int i) {
    return static_cast<std::uint32_t>(p[i] | p[i + 1] << 8 | p[i + 2] << 16) | static_cast<std::uint32_t>(p[i + 3])
                                                                                   << 24;
  };
  return {u32(0), u32(4), u32(8)};
}

void store_index(std::uint8_t* p, const EncodeBlock& b) {
  const std::size_t counts[3] = {b.n2, b.n3, b.n4};
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < 4; ++i) p[4 * k + i] = static_cast<std::uint8_t>(counts[k] >> (8 * i));
  }
}

void zero_tail(const Buffer& buffer, std::size_t used) { std::memset(buffer.data() + used, 0, buffer.size() - used); }

}  // namespace

Buffer::Buffer(std::size_t size) : size_(size) {
  // Large buffers ask for huge pages: filling 4 KiB ones for the first time takes longer than encoding into them.
  constexpr std::size_t kHuge = 2 << 20;
  const bool huge = size >= 2 * kHuge;
  const std::size_t alignment = huge ? kHuge : 64;  // of which the size must be a multiple
  void* p = std::aligned_alloc(alignment, ceil_div(std::max<std::size_t>(size, 1), alignment) * alignment);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(p, size, MADV_HUGEPAGE);
#endif
  data_.reset(static_cast<std::uint8_t*>(p));
}

std::size_t Layout::item_bytes() const { return item_size(kind, wide); }
std::size_t Layout::block_rows(std::size_t block) const { return std::min(kBlockRows, rows - block * kBlockRows); }
std::size_t Layout::groups_in(std::size_t r) const {
  return r * (cols / kGroup) + ceil_div(r * (cols % kGroup), kGroup);
}
std::size_t Layout::groups() const {
  return (blocks() - 1) * groups_in(kBlockRows) + groups_in(block_rows(blocks() - 1));
}
std::size_t Layout::code_bytes() const { return pad64(tables() * kTableBytes + blocks() * kIndexBytes); }
std::size_t Layout::digits_bytes() const { return pad64(groups() * (kGroup / 4)); }
std::size_t Layout::plane_bytes(int plane) const { return pad64(groups() * plane_stride(kind, plane)); }
std::size_t Layout::sign_mantissa_bytes() const { return plane_bytes(0) + plane_bytes(1) + plane_bytes(2); }

EncodedPlanes encode_planes(const std::uint8_t* src, Layout layout, const PlanesOps& ops, int threads) {
  EncodedPlanes out;
  const CodeTables tables = choose_tables(src, layout, threads);
  layout.rows_per_table = out.rows_per_table = tables.rows_per_table;
  out.code = Buffer(layout.code_bytes());
  out.digits = Buffer(layout.digits_bytes());
  out.sign_mantissa = Buffer(layout.sign_mantissa_bytes());
  std::memcpy(out.code.data(), tables.bytes.data(), tables.bytes.size());
  std::uint8_t* index = out.code.data() + tables.bytes.size();
  zero_tail(out.code, tables.bytes.size() + layout.blocks() * kIndexBytes);
  zero_tail(out.digits, layout.groups() * (kGroup / 4));

  std::uint8_t* planes[kMaxPlanes];
  std::size_t at = 0;
  for (int p = 0; p < static_cast<int>(kMaxPlanes); ++p) {
    planes[p] = out.sign_mantissa.data() + at;
    const std::size_t used = layout.groups() * plane_stride(layout.kind, p);
    std::memset(planes[p] + used, 0, layout.plane_bytes(p) - used);
    at += layout.plane_bytes(p);
  }

  std::vector<std::vector<std::uint8_t>> tails(layout.blocks());
  const std::size_t full = layout.groups_in(kBlockRows), per_task = blocks_per_task(layout);
  parallel_for(ceil_div(layout.blocks(), per_task), 1, threads, [&](std::size_t task) {
    const std::size_t cap = layout.groups_in(std::min(kBlockRows, layout.rows)) * kGroup + kSlack;
    const Buffer scratch(3 * cap), packed(cap);  // ranks for two levels, raw exponents; digits of both levels
    for (std::size_t i = task * per_task; i < std::min(layout.blocks(), (task + 1) * per_task); ++i) {
      EncodeBlock b{};
      b.kind = layout.kind, b.wide = layout.wide;
      b.rows = layout.block_rows(i), b.cols = layout.cols;
      b.table = out.code.data() + i * kBlockRows / layout.rows_per_table * kTableBytes;
      b.src = src + i * kBlockRows * layout.row_bytes(), b.src_stride = layout.row_bytes();
      b.digits = out.digits.data() + i * full * (kGroup / 4);
      for (int p = 0; p < static_cast<int>(kMaxPlanes); ++p)
        b.planes[p] = planes[p] + i * full * plane_stride(layout.kind, p);
      b.ranks2 = scratch.data(), b.ranks3 = b.ranks2 + cap, b.exponents4 = b.ranks3 + cap;
      b.level2 = packed.data(), b.level3 = packed.data() + cap / 2;
      ops.encode(b);
      store_index(index + i * kIndexBytes, b);
      std::vector<std::uint8_t>& tail = tails[i];
      tail.reserve(tail_digits_bytes(b.n2) + tail_digits_bytes(b.n3) + b.n4);
      tail.insert(tail.end(), b.level2, b.level2 + tail_digits_bytes(b.n2));
      tail.insert(tail.end(), b.level3, b.level3 + tail_digits_bytes(b.n3));
      tail.insert(tail.end(), b.exponents4, b.exponents4 + b.n4);
    }
  });
  std::size_t total = 0;
  for (const auto& tail : tails) total += tail.size();
  out.tails = Buffer(pad64(total));
  zero_tail(out.tails, total);
  std::uint8_t* to = out.tails.data();
  for (auto& tail : tails) {
    to = std::copy(tail.begin(), tail.end(), to);
    std::vector<std::uint8_t>().swap(tail);
  }
  return out;
}

namespace {

void expect_size(const char* part, std::size_t expected, std::size_t got) {
  if (expected != got) {
    throw CorruptData("expected part '" + std::string(part) + "' to have " + std::to_string(expected) + " bytes, got " +
                      std::to_string(got));
  }
}

}  // namespace

BlockReader::BlockReader(const PlanesParts& parts, const Layout& layout)
    : parts_(parts),
      layout_(layout),
      groups_per_block_(layout.groups_in(kBlockRows)),
      index_(parts.code.data() + layout.tables() * kTableBytes) {
  expect_size("code", layout.code_bytes(), parts.code.size());
  expect_size("digits", layout.digits_bytes(), parts.digits.size());
  expect_size("sign_mantissa", layout.sign_mantissa_bytes(), parts.sign_mantissa.size());
  offsets_.resize(layout.blocks());
  std::uint64_t at = 0;
  const std::size_t most = groups_per_block_ * kGroup;
  const std::size_t most_in_last = layout.groups_in(layout.block_rows(layout.blocks() - 1)) * kGroup;
  for (std::size_t i = 0; i < layout.blocks(); ++i) {
    const Index n = load_index(index_ + i * kIndexBytes);
    const std::size_t positions = i + 1 < layout.blocks() ? most : most_in_last;
    if (n.n2 > positions || n.n3 > n.n2 || n.n4 > n.n3) {
      throw CorruptData("expected falling tail counts in block " + std::to_string(i) + " of at most " +
                        std::to_string(positions) + ", got " + std::to_string(n.n2) + ", " + std::to_string(n.n3) +
                        ", " + std::to_string(n.n4));
    }
    offsets_[i] = at;
    at += tail_digits_bytes(n.n2) + tail_digits_bytes(n.n3) + n.n4;
  }
  if (pad64(at) != parts.tails.size()) {
    throw CorruptData("expected tails of " + std::to_string(pad64(at)) + " bytes by the block counts, got " +
                      std::to_string(parts.tails.size()));
  }
}

DecodeBlock BlockReader::at(std::size_t block) const {
  const Index n = load_index(index_ + block * kIndexBytes);
  DecodeBlock b{};
  b.kind = layout_.kind, b.wide = layout_.wide;
  b.rows = layout_.block_rows(block), b.cols = layout_.cols;
  b.table = parts_.code.data() + block * kBlockRows / layout_.rows_per_table * kTableBytes;
  b.digits = parts_.digits.data() + block * groups_per_block_ * (kGroup / 4);
  const std::uint8_t* plane = parts_.sign_mantissa.data();
  for (int p = 0; p < static_cast<int>(kMaxPlanes); ++p) {
    b.planes[p] = plane + block * groups_per_block_ * plane_stride(layout_.kind, p);
    plane += layout_.plane_bytes(p);
  }
  b.level2 = parts_.tails.data() + offsets_[block];
  b.level3 = b.level2 + tail_digits_bytes(n.n2);
  b.exponents4 = b.level3 + tail_digits_bytes(n.n3);
  b.n2 = n.n2, b.n3 = n.n3, b.n4 = n.n4;
  return b;
}

CorruptData BlockReader::contradiction(std::size_t block) const {
  const std::size_t begin = block * kBlockRows;
  return CorruptData("expected the digits of rows " + std::to_string(begin) + " to " +
                     std::to_string(begin + layout_.block_rows(block)) + " to use exactly their tail, they do not");
}

std::size_t tail_scratch_bytes(const DecodeBlock& b) { return pad64(b.n2) + pad64(b.n3) + pad64(b.n4) + 3 * kSlack; }

void give_tail_scratch(DecodeBlock& b, std::uint8_t* scratch) {
  b.exponents2 = scratch;
  b.exponents3 = b.exponents2 + pad64(b.n2) + kSlack;
  std::uint8_t* raw = b.exponents3 + pad64(b.n3) + kSlack;
  if (b.n4) std::memcpy(raw, b.exponents4, b.n4);
  b.exponents4 = raw;
}

void decode_planes(const PlanesParts& parts, const Layout& layout, std::size_t begin, std::size_t end,
                   std::uint8_t* out, const PlanesOps& ops, int threads) {
  const BlockReader reader(parts, layout);
  if (begin >= end) return;
  const std::size_t first = begin / kBlockRows, last = (end - 1) / kBlockRows, row_bytes = layout.row_bytes();
  const std::size_t per_task = blocks_per_task(layout);
  const bool stream = layout.kind == Kind::kBF16 && !layout.wide && (end - begin) * row_bytes >= kStreamBytes &&
                      (row_bytes | reinterpret_cast<std::uintptr_t>(out)) % 64 == 0;

  parallel_for(ceil_div(last - first + 1, per_task), 1, threads, [&](std::size_t task) {
    const std::size_t task_first = first + task * per_task, task_last = std::min(last, task_first + per_task - 1);
    std::size_t most = 0;
    for (std::size_t i = task_first; i <= task_last; ++i) most = std::max(most, tail_scratch_bytes(reader.at(i)));
    const Buffer scratch(most);
    std::memset(scratch.data(), 0, scratch.size());  // damaged data may read ahead of what was written
    Buffer whole;                                    // for blocks of which only some rows are wanted
    for (std::size_t i = task_first; i <= task_last; ++i) {
      DecodeBlock b = reader.at(i);
      give_tail_scratch(b, scratch.data());
      const std::size_t block_begin = i * kBlockRows, block_end = block_begin + b.rows;
      const std::size_t from = std::max(begin, block_begin), to = std::min(end, block_end);
      const bool partial = to - from != block_end - block_begin;
      if (partial && !whole.size()) whole = Buffer(kBlockRows * row_bytes);
      b.out = partial ? whole.data() : out + (block_begin - begin) * row_bytes;
      b.out_stride = row_bytes;
      b.stream = stream && !partial;
      if (!ops.decode(b)) throw reader.contradiction(i);
      if (partial)
        std::memcpy(out + (from - begin) * row_bytes, whole.data() + (from - block_begin) * row_bytes,
                    (to - from) * row_bytes);
    }
  });
}

bool is_widened_bf16(const std::uint8_t* src, std::size_t elements) {
  constexpr std::size_t kChunk = 4096;
  for (std::size_t i = 0; i < elements; i += kChunk) {
    std::uint32_t low = 0;
    for (std::size_t k = i; k < std::min(elements, i + kChunk); ++k) {
      std::uint32_t word;
      std::memcpy(&word, src + 4 * k, 4);
      low |= word;
    }
    if (low & 0xffff) return false;
  }
  return true;
}

}  // namespace bitforbit
