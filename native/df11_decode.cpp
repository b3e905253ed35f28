// DFloat11 decoder. A look-up of 11 bits gives up to six exponents; four blocks are decoded side by side, because one
// look-up waits for the one before it. Codes longer than 11 bits, and the last codes of a block, walk the stored
// tables.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "df11.hpp"
#include "errors.hpp"
#include "parallel.hpp"

namespace bitforbit::df11 {
namespace {

constexpr int kIndexBits = 11;
constexpr std::size_t kMaxSymbolsPerEntry = 6;
constexpr std::size_t kLookupsPerLoad = 5;  // 5 * 11 of the at least 57 bits that a load gives
constexpr std::size_t kStreams = 4;
constexpr std::size_t kBlocksPerTask = 4 * kStreams;
// A step is kLookupsPerLoad look-ups and perhaps one long code.
constexpr std::size_t kMaxSymbolsPerStep = kLookupsPerLoad * kMaxSymbolsPerEntry;
constexpr std::size_t kMaxBitsPerStep = kLookupsPerLoad * kIndexBits + kMaxCodeBits;
constexpr std::size_t kMaxCodesPerBlock = kBlockBytes * 8;
constexpr std::size_t kScratchBytes = kMaxCodesPerBlock + 64;
constexpr std::uint8_t kFirstPointer = 240;

// [47:0] exponents, first in the low byte; [55:48] their bits; [63:56] their number, 0 for a long code
using Entry = std::uint64_t;

std::uint64_t load_big_endian(const std::uint8_t* p) {
  std::uint64_t value;
  std::memcpy(&value, p, sizeof value);
  if constexpr (std::endian::native == std::endian::little) value = __builtin_bswap64(value);
  return value;
}

struct Code {
  std::uint8_t value;
  std::uint8_t length;  // 0: no code starts with these bits
};

class Decoder {
 public:
  explicit Decoder(std::span<const std::uint8_t> luts)
      : luts_(luts.data()), lengths_(luts.data() + luts.size() - 256), entries_(std::size_t{1} << kIndexBits) {
    for (std::size_t index = 0; index < entries_.size(); ++index) entries_[index] = make_entry(index);
  }

  // The code at the top of `bits`.
  Code walk(std::uint64_t bits) const {
    std::size_t table = 0;
    for (int level = 0; level < 4; ++level) {
      const std::uint8_t value = luts_[table * 256 + (bits >> 56)];
      if (value < kFirstPointer) {
        const std::uint8_t length = lengths_[value];
        if (length <= 8 * level || length > 8 * level + 8) return {0, 0};
        return {value, length};
      }
      const std::size_t next = 256 - std::size_t{value};
      if (next <= table || luts_ + next * 256 >= lengths_) return {0, 0};
      table = next;
      bits <<= 8;
    }
    return {0, 0};
  }

  Entry entry(std::uint64_t bits) const { return entries_[bits >> (64 - kIndexBits)]; }

 private:
  Entry make_entry(std::size_t index) const {
    std::uint64_t bits = std::uint64_t{index} << (64 - kIndexBits);
    Entry symbols = 0;
    unsigned used = 0;
    unsigned count = 0;
    while (count < kMaxSymbolsPerEntry) {
      const Code code = walk(bits);
      if (code.length == 0 || used + code.length > kIndexBits) break;
      // Bits past the index read as zeros here and may lead to an entry that belongs to no code and repeats another
      // one. A code's own bits lead to it whatever follows.
      const Code same = walk(bits | (~std::uint64_t{0} >> code.length));
      if (same.value != code.value || same.length != code.length) break;
      symbols |= Entry{code.value} << (8 * count++);
      used += code.length;
      bits <<= code.length;
    }
    return symbols | (Entry{used} << 48) | (Entry{count} << 56);
  }

  const std::uint8_t* luts_;
  const std::uint8_t* lengths_;
  std::vector<Entry> entries_;
};

// One block being decoded.
struct Stream {
  std::uint64_t bit = 0;
  std::uint8_t* out = nullptr;
  std::size_t remaining = 0;
};

class BlockDecoder {
 public:
  BlockDecoder(const Decoder& decoder, std::span<const std::uint8_t> encoded) : decoder_(decoder), encoded_(encoded) {}

  template <std::size_t N>
  void run_steps(std::array<Stream, N>& streams) const {
    for (;;) {
      std::size_t steps = steps_left(streams[0]);
      for (std::size_t s = 1; s < N; ++s) steps = std::min(steps, steps_left(streams[s]));
      if (steps == 0) return;
      std::array<std::uint8_t*, N> begin;
      for (std::size_t s = 0; s < N; ++s) begin[s] = streams[s].out;
      std::array<Stream, N> local = streams;
      for (; steps > 0; --steps) step(local);
      for (std::size_t s = 0; s < N; ++s) {
        local[s].remaining -= static_cast<std::size_t>(local[s].out - begin[s]);
        streams[s] = local[s];
      }
    }
  }

  void run_tail(Stream& stream) const {
    for (; stream.remaining > 0; --stream.remaining) put_one(stream);
  }

 private:
  std::size_t steps_left(const Stream& stream) const {
    const std::size_t byte = stream.bit / 8;
    if (byte + 8 > encoded_.size()) return 0;
    // Every step begins with an 8-byte load; the first of them is inside, and so are those that follow so many bits on.
    const std::size_t by_input = (encoded_.size() - 8 - byte) * 8 / kMaxBitsPerStep + 1;
    return std::min(stream.remaining / kMaxSymbolsPerStep, by_input);
  }

  template <std::size_t N>
  void step(std::array<Stream, N>& streams) const {
    std::array<std::uint64_t, N> bits;
    std::array<Entry, N> entry;
    for (std::size_t s = 0; s < N; ++s) {
      bits[s] = load_big_endian(encoded_.data() + streams[s].bit / 8) << (streams[s].bit % 8);
    }
    for (std::size_t i = 0; i < kLookupsPerLoad; ++i) {
      for (std::size_t s = 0; s < N; ++s) {
        const Entry e = decoder_.entry(bits[s]);
        std::memcpy(streams[s].out, &e, sizeof e);
        const std::uint64_t used = (e >> 48) & 0xFF;
        streams[s].out += e >> 56;
        streams[s].bit += used;
        bits[s] <<= used;
        entry[s] = e;
      }
    }
    // A long code stops its stream: all later look-ups of the step found it again.
    for (std::size_t s = 0; s < N; ++s) {
      if ((entry[s] >> 56) == 0) put_one(streams[s]);
    }
  }

  void put_one(Stream& stream) const {
    const Code code = decoder_.walk(peek(stream.bit));
    if (code.length == 0) throw CorruptData("bit " + std::to_string(stream.bit) + " starts no code of the tables");
    if (stream.bit + code.length > encoded_.size() * 8) throw CorruptData("the stream ends before its last code");
    *stream.out++ = code.value;
    stream.bit += code.length;
  }

  // At least 57 bits of the stream, zeros past its end.
  std::uint64_t peek(std::uint64_t bit) const {
    const std::size_t byte = bit / 8;
    if (byte + 8 <= encoded_.size()) return load_big_endian(encoded_.data() + byte) << (bit % 8);
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < 8; ++i) {
      value = (value << 8) | (byte + i < encoded_.size() ? encoded_[byte + i] : 0u);
    }
    return value << (bit % 8);
  }

  const Decoder& decoder_;
  std::span<const std::uint8_t> encoded_;
};

void join(const std::uint8_t* exponent, const std::uint8_t* sign_mantissa, std::size_t size, std::uint16_t* words) {
  for (std::size_t i = 0; i < size; ++i) {
    const unsigned sm = sign_mantissa[i];
    words[i] = static_cast<std::uint16_t>(((sm & 0x80u) << 8) | (unsigned{exponent[i]} << 7) | (sm & 0x7Fu));
  }
}

void check(const EncodedUnit& unit, std::size_t blocks, std::size_t elements) {
  if (unit.luts.size() % 256 != 0 || unit.luts.size() < 512) throw CorruptData("tables of no whole rows");
  if (unit.positions.size() != blocks + 1 || unit.gaps.size() != blocks * kGapBytesPerBlock ||
      unit.sign_mantissa.size() != elements) {
    throw CorruptData("arrays of the unit do not fit each other");
  }
  if (unit.positions[0] != 0 || unit.positions[blocks] != elements) {
    throw CorruptData("output positions do not run from 0 to the number of weights");
  }
  if (blocks > 0 && (elements == 0 || unit.gaps[0] / 8 != 0)) {
    throw CorruptData("the stream does not begin with the code of the first weight");
  }
  for (std::size_t b = 0; b < blocks; ++b) {
    if (unit.positions[b + 1] < unit.positions[b] || unit.positions[b + 1] - unit.positions[b] > kMaxCodesPerBlock) {
      throw CorruptData("output position " + std::to_string(b + 1) + " is out of order or too far from the one before");
    }
  }
}

}  // namespace

void decode(const EncodedUnit& unit, int threads, std::span<std::uint16_t> words) {
  const std::size_t blocks = unit.encoded.size() / kBlockBytes + (unit.encoded.size() % kBlockBytes != 0 ? 1 : 0);
  check(unit, blocks, words.size());
  const Decoder decoder(unit.luts);
  const BlockDecoder block_decoder(decoder, unit.encoded);
  const std::uint64_t total_bits = std::uint64_t{unit.encoded.size()} * 8;

  // [7:3] gap of the block's first window
  auto first_bit = [&](std::size_t block) {
    return block * kBlockBytes * 8 + std::uint64_t{unit.gaps[block * kGapBytesPerBlock]} / 8;
  };
  auto check_end = [&](std::size_t block, std::uint64_t bit) {
    const bool last = unit.positions[block + 1] == words.size();
    if (last && (bit > total_bits || total_bits - bit >= 8)) {
      throw CorruptData("the last code ends at bit " + std::to_string(bit) + " of " + std::to_string(total_bits));
    }
    if (!last && bit != first_bit(block + 1)) {
      throw CorruptData("the codes of block " + std::to_string(block) + " end at bit " + std::to_string(bit) +
                        ", the next block starts at bit " + std::to_string(first_bit(block + 1)));
    }
  };

  const std::size_t tasks = (blocks + kBlocksPerTask - 1) / kBlocksPerTask;
  parallel_for(tasks, 1, threads, [&](std::size_t task) {
    const auto scratch = std::make_unique_for_overwrite<std::uint8_t[]>(kStreams * kScratchBytes);
    const std::size_t task_end = std::min(blocks, (task + 1) * kBlocksPerTask);
    for (std::size_t block = task * kBlocksPerTask; block < task_end; block += kStreams) {
      const std::size_t count = std::min(kStreams, task_end - block);
      std::array<Stream, kStreams> streams;
      for (std::size_t s = 0; s < count; ++s) {
        streams[s] = {first_bit(block + s), scratch.get() + s * kScratchBytes,
                      unit.positions[block + s + 1] - unit.positions[block + s]};
      }
      if (count == kStreams) block_decoder.run_steps(streams);
      for (std::size_t s = 0; s < count; ++s) {
        std::array<Stream, 1> single{streams[s]};
        block_decoder.run_steps(single);
        block_decoder.run_tail(single[0]);
        const std::size_t begin = unit.positions[block + s];
        const std::size_t size = unit.positions[block + s + 1] - begin;
        if (size > 0) check_end(block + s, single[0].bit);
        join(scratch.get() + s * kScratchBytes, unit.sign_mantissa.data() + begin, size, words.data() + begin);
      }
    }
  });
}

}  // namespace bitforbit::df11
