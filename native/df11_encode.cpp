// DFloat11 encoder. Chunks of weights are independent: their first bit follows from the code lengths and the chunk
// histograms, so threads meet only in the window that two neighbours share.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <string>

#include "df11.hpp"
#include "errors.hpp"
#include "parallel.hpp"

namespace bitforbit::df11 {
namespace {

std::uint64_t to_big_endian(std::uint64_t value) {
  if constexpr (std::endian::native == std::endian::little) {
    return __builtin_bswap64(value);
  } else {
    return value;
  }
}

std::uint32_t exponent_of(std::uint16_t word) { return (word >> 7) & 0xFF; }

// A code moved to the top of a window.
struct TopCode {
  std::uint64_t bits;
  std::uint64_t length;
};

using TopCodes = std::array<TopCode, 256>;

TopCodes top_codes(const CodeTable& table) {
  TopCodes top{};
  for (std::size_t value = 0; value < 256; ++value) {
    const std::uint8_t length = table.lengths[value];
    if (length == 0) continue;
    if (length > kMaxCodeBits || (std::uint64_t{table.codes[value]} >> length) != 0) {
      throw CorruptData("code of exponent " + std::to_string(value) + " does not fit its length");
    }
    top[value] = {std::uint64_t{table.codes[value]} << (kWindowBits - length), length};
  }
  return top;
}

class ChunkWriter {
 public:
  ChunkWriter(const EncodeTarget& target, std::uint64_t first_bit)
      : target_(target), window_(first_bit / kWindowBits), used_(first_bit % kWindowBits), shared_(used_ != 0) {
    if (window_ + (shared_ ? 1 : 0) > target.windows.size()) throw CorruptData("chunk starts past the stream");
  }

  // Appends the code of element `element` of the unit.
  void put(const TopCode& code, std::uint64_t element) {
    acc_ |= code.bits >> used_;
    used_ += code.length;
    if (used_ >= kWindowBits) close_window(code, element + 1);
  }

  // Appends four codes at once if they all end inside the open window.
  bool put_four(const TopCode& a, const TopCode& b, const TopCode& c, const TopCode& d) {
    const std::uint64_t ab = a.length + b.length;
    const std::uint64_t cd = c.length + d.length;
    const std::uint64_t end = used_ + ab + cd;
    if (end >= kWindowBits) return false;
    const std::uint64_t first = a.bits | (b.bits >> a.length);
    const std::uint64_t second = c.bits | (d.bits >> c.length);
    acc_ |= (first | (second >> ab)) >> used_;
    used_ = end;
    return true;
  }

  void finish() {
    if (used_ == 0) return;
    if (window_ >= target_.windows.size()) throw CorruptData("codes end past the stream");
    std::atomic_ref(target_.windows[window_]).fetch_or(to_big_endian(acc_), std::memory_order_relaxed);
  }

  std::uint64_t bit() const { return window_ * kWindowBits + used_; }

 private:
  void close_window(const TopCode& code, std::uint64_t next_element) {
    if (window_ >= target_.windows.size()) throw CorruptData("codes end past the stream");
    if (shared_) {
      std::atomic_ref(target_.windows[window_]).fetch_or(to_big_endian(acc_), std::memory_order_relaxed);
      shared_ = false;
    } else {
      target_.windows[window_] = to_big_endian(acc_);
    }
    used_ -= kWindowBits;
    acc_ = used_ == 0 ? 0 : code.bits << (code.length - used_);
    ++window_;
    // Codes have at most 32 bits, so the next code starts in this window: its offset is the gap.
    if (window_ < target_.gaps.size()) target_.gaps[window_] = static_cast<std::uint8_t>(used_);
    if (window_ % kWindowsPerBlock == 0) {
      target_.positions[window_ / kWindowsPerBlock] = static_cast<std::uint32_t>(next_element);
    }
  }

  const EncodeTarget& target_;
  std::uint64_t window_;
  std::uint64_t used_;  // bits of the open window, 0..63
  bool shared_;         // the open window began in the chunk before
  std::uint64_t acc_ = 0;
};

}  // namespace

std::size_t chunk_count(std::size_t elements, std::size_t chunk_elements) {
  if (chunk_elements == 0) throw CorruptData("chunks of no element");
  return elements / chunk_elements + (elements % chunk_elements != 0 ? 1 : 0);
}

void split_and_count(std::span<const std::uint16_t> words, std::size_t chunk_elements, int threads,
                     std::span<std::uint8_t> sign_mantissa, std::span<std::uint32_t> histograms) {
  const std::size_t chunks = chunk_count(words.size(), chunk_elements);
  if (sign_mantissa.size() != words.size() || histograms.size() != chunks * 256) {
    throw CorruptData("output arrays do not have the size of the input");
  }
  parallel_for(chunks, 1, threads, [&](std::size_t chunk) {
    const std::size_t begin = chunk * chunk_elements;
    const std::size_t size = std::min(chunk_elements, words.size() - begin);
    const std::uint16_t* in = words.data() + begin;
    std::uint8_t* out = sign_mantissa.data() + begin;
    for (std::size_t i = 0; i < size; ++i) {
      out[i] = static_cast<std::uint8_t>(((in[i] >> 8) & 0x80) | (in[i] & 0x7F));
    }
    // Four tables, so that runs of one exponent do not wait for their own counter.
    std::array<std::array<std::uint32_t, 256>, 4> counts{};
    std::size_t i = 0;
    for (; i + 4 <= size; i += 4) {
      ++counts[0][exponent_of(in[i])];
      ++counts[1][exponent_of(in[i + 1])];
      ++counts[2][exponent_of(in[i + 2])];
      ++counts[3][exponent_of(in[i + 3])];
    }
    for (; i < size; ++i) ++counts[0][exponent_of(in[i])];
    std::uint32_t* row = histograms.data() + chunk * 256;
    for (std::size_t v = 0; v < 256; ++v) row[v] = counts[0][v] + counts[1][v] + counts[2][v] + counts[3][v];
  });
}

void encode(std::span<const std::uint16_t> words, std::size_t chunk_elements, std::span<const std::uint64_t> chunk_bits,
            std::uint64_t first_element, const CodeTable& table, int threads, const EncodeTarget& target) {
  const std::size_t chunks = chunk_count(words.size(), chunk_elements);
  if (chunk_bits.size() != chunks || table.codes.size() != 256 || table.lengths.size() != 256 ||
      target.gaps.size() != target.windows.size() ||
      target.positions.size() != target.windows.size() / kWindowsPerBlock + 1) {
    throw CorruptData("arrays of the encoder do not fit each other");
  }
  const TopCodes top = top_codes(table);
  parallel_for(chunks, 1, threads, [&](std::size_t chunk) {
    const std::size_t begin = chunk * chunk_elements;
    const std::size_t size = std::min(chunk_elements, words.size() - begin);
    const std::uint16_t* in = words.data() + begin;
    const std::uint64_t element = first_element + begin;
    ChunkWriter writer(target, chunk_bits[chunk]);
    std::size_t i = 0;
    for (; i + 4 <= size; i += 4) {
      const TopCode& a = top[exponent_of(in[i])];
      const TopCode& b = top[exponent_of(in[i + 1])];
      const TopCode& c = top[exponent_of(in[i + 2])];
      const TopCode& d = top[exponent_of(in[i + 3])];
      if (writer.put_four(a, b, c, d)) continue;
      writer.put(a, element + i);
      writer.put(b, element + i + 1);
      writer.put(c, element + i + 2);
      writer.put(d, element + i + 3);
    }
    for (; i < size; ++i) writer.put(top[exponent_of(in[i])], element + i);
    writer.finish();
    if (chunk + 1 < chunks && writer.bit() != chunk_bits[chunk + 1]) {
      throw CorruptData("chunk offsets do not follow from the code lengths");
    }
  });
}

void pack_gaps(std::span<const std::uint8_t> gaps, std::span<std::uint8_t> packed) {
  if (gaps.size() % 8 != 0 || packed.size() != gaps.size() / 8 * 5) {
    throw CorruptData("gap arrays do not fit each other");
  }
  for (std::size_t group = 0; group < gaps.size() / 8; ++group) {
    std::uint64_t bits = 0;  // [39:35] first gap ... [4:0] eighth
    for (std::size_t i = 0; i < 8; ++i) bits = (bits << 5) | (gaps[group * 8 + i] & 31u);
    for (std::size_t i = 0; i < 5; ++i) packed[group * 5 + i] = static_cast<std::uint8_t>(bits >> (32 - 8 * i));
  }
}

}  // namespace bitforbit::df11
