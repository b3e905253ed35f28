// Quantized caches: every instruction set against the portable one, with buffers of exactly the size promised.
#include "kv.hpp"

#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.hpp"
#include "tests/check.hpp"

namespace bitforbit::testing {
namespace {

struct Shape {
  KvDtype dtype;
  int k_bits, v_bits;
  std::size_t head_dim, group, v_group, residual, sink;
};

constexpr Shape kShapes[] = {
    {KvDtype::kBF16, 4, 4, 128, 32, 32, 128, 0}, {KvDtype::kBF16, 2, 2, 80, 32, 16, 64, 3},
    {KvDtype::kBF16, 8, 8, 16, 64, 16, 64, 0},   {KvDtype::kBF16, 4, 2, 64, 128, 64, 128, 40},
    {KvDtype::kF16, 2, 4, 96, 32, 32, 32, 1},    {KvDtype::kF16, 8, 2, 512, 32, 128, 32, 0},
    {KvDtype::kF32, 4, 8, 48, 32, 16, 96, 5},    {KvDtype::kF32, 2, 2, 256, 64, 128, 64, 0},
};

// Finite numbers of a dtype near 1, some zero, some constant runs.
void fill(KvDtype dtype, std::uint8_t* p, std::size_t count, Random& random) {
  for (std::size_t i = 0; i < count; ++i) {
    const float x = random.below(9) ? (static_cast<float>(random.below(4001)) - 2000.0f) / 1000.0f : 0.0f;
    std::uint32_t word;
    std::memcpy(&word, &x, 4);
    if (dtype == KvDtype::kF32) {
      std::memcpy(p + 4 * i, &word, 4);
      continue;
    }
    std::uint16_t bits = static_cast<std::uint16_t>(word >> 16);
    if (dtype == KvDtype::kF16) {  // [14:0] below 0x4000: less than 2
      bits = static_cast<std::uint16_t>((random.bits() & 0xbfff) % 0xbc00);
      if ((bits & 0x7fff) >= 0x4000) bits &= 0x83ff;
    }
    std::memcpy(p + 2 * i, &bits, 2);
  }
}

// A cache of two rows, one of them padded, whose every tensor is an allocation of its own.
struct Case {
  static constexpr std::size_t kBatch = 2, kHeads = 2, kTokens = 600, kSegments = 2;
  KvRecord record;
  std::size_t sink, capacity;
  ExactBytes window_k, window_v, sink_k, sink_v, pending_k, pending_v;
  std::vector<ExactBytes> segments;
  std::vector<std::uint8_t*> table;
  std::int32_t start[kBatch] = {0, 77};
  KvCache cache{};

  std::size_t rows(std::size_t n) const { return kBatch * kHeads * n * record.head_dim * record.item; }

  Case(const Shape& s, Random& random)
      : record(make_kv_record(s.dtype, s.k_bits, s.v_bits, s.head_dim, s.group, s.v_group)),
        sink(s.sink),
        capacity(s.residual + 1),
        window_k(rows(capacity)),
        window_v(rows(capacity)),
        sink_k(rows(sink)),
        sink_v(rows(sink)),
        pending_k(rows(kTokens)),
        pending_v(rows(kTokens)) {
    for (ExactBytes* x : {&window_k, &window_v, &sink_k, &sink_v, &pending_k, &pending_v}) {
      fill(s.dtype, x->data(), x->size() / record.item, random);
    }
    for (std::size_t i = 0; i < kSegments; ++i) {
      segments.emplace_back(kBatch * kHeads * record.bytes);
      std::memset(segments.back().data(), 0, segments.back().size());
    }
    for (ExactBytes& segment : segments) table.push_back(segment.data());
    cache = {record,          kBatch,          kHeads,        s.residual,    sink,  capacity, table,
             window_k.data(), window_v.data(), sink_k.data(), sink_v.data(), start, 0};
  }

  // A long call whose tokens are pending, then one token that is in the window.
  std::size_t quantize(const KvOps& ops, int threads) {
    for (ExactBytes& segment : segments) std::memset(segment.data(), 0, segment.size());
    KvPending pending{pending_k.data(), pending_v.data(), {}, {}};
    for (std::size_t* strides : {pending.k_strides, pending.v_strides}) {
      strides[2] = record.head_dim, strides[1] = kTokens * strides[2], strides[0] = kHeads * strides[1];
    }
    cache.tokens = 0;
    std::size_t bad = kv_flush(cache, kTokens - 1, pending, ops, threads);
    cache.tokens = kTokens - 1;
    bad += kv_flush(cache, 1, {}, ops, threads);
    cache.tokens = kTokens;
    return bad;
  }
};

// Every implementation for that dtype that this CPU can run, the portable one first.
std::vector<const KvOps*> usable_kv(KvDtype dtype) {
  std::vector<const KvOps*> usable;
  for (const KvOps* ops : kv_implementations()) {
    if (find_implementation(ops->isa) && (ops->any_dtype || dtype == KvDtype::kBF16)) usable.push_back(ops);
  }
  return usable;
}

}  // namespace

TEST(kv_flush_same_bytes) {
  Random random(21);
  for (const Shape& shape : kShapes) {
    Case c(shape, random);
    std::vector<ExactBytes> expected;
    for (const KvOps* ops : usable_kv(shape.dtype)) {
      CHECK(c.quantize(*ops, 3) == 0);
      for (std::size_t i = 0; i < c.segments.size(); ++i) {
        if (expected.size() == i) expected.emplace_back(c.segments[i].span());
        CHECK_SAME_BYTES(expected[i].span(), c.segments[i].span(), std::string("kv_flush on ") + ops->isa);
      }
    }
  }
}

TEST(kv_attend_agrees) {
  Random random(22);
  for (const Shape& shape : kShapes) {
    Case c(shape, random);
    c.quantize(kKvScalar, 1);
    for (const std::size_t rows : {std::size_t{1}, std::size_t{5}}) {
      const std::size_t per_head = rows == 1 ? 7 : 2, queries = Case::kBatch * Case::kHeads * per_head * rows;
      ExactBytes q(queries * shape.head_dim * c.record.item), mask(queries * Case::kTokens);
      fill(shape.dtype, q.data(), queries * shape.head_dim, random);
      for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = random.below(4) != 0;
      std::vector<float> expected;
      for (const KvOps* ops : usable_kv(shape.dtype)) {
        std::vector<float> out(queries * shape.head_dim), lse(queries);
        KvAttention a{};
        a.visible = Case::kTokens;
        a.q = q.data();
        a.q_strides[2] = shape.head_dim, a.q_strides[1] = rows * shape.head_dim;
        a.q_strides[0] = Case::kHeads * per_head * a.q_strides[1];
        a.queries_per_head = per_head, a.query_rows = rows;
        a.scaling = 0.1f, a.softcap = rows == 1 ? 0.0f : 3.0f;
        if (rows != 1) {
          a.mask = mask.data();
          a.mask_strides[2] = Case::kTokens, a.mask_strides[1] = rows * Case::kTokens;
          a.mask_strides[0] = Case::kHeads * per_head * a.mask_strides[1];
        }
        a.out = reinterpret_cast<std::uint8_t*>(out.data()), a.out_f32 = true, a.lse = lse.data();
        a.threads = 2;
        kv_attend(c.cache, a, *ops);
        if (expected.empty()) expected = out;
        for (std::size_t i = 0; i < out.size(); ++i) {
          CHECK(std::fabs(out[i] - expected[i]) <= (ops == &kKvScalar ? 0.0f : 6e-3f));
        }
      }
    }
  }
}

TEST(kv_refuses_too_little_room) {
  Random random(23);
  Case c(kShapes[0], random);
  c.quantize(kKvScalar, 1);
  KvAttention a{};
  a.visible = Case::kTokens + 2;  // two tokens more than the window holds
  CHECK_THROWS(std::invalid_argument, kv_attend(c.cache, a, kKvScalar));
  c.cache.segments = c.cache.segments.first(0);
  a.visible = Case::kTokens;
  CHECK_THROWS(std::invalid_argument, kv_attend(c.cache, a, kKvScalar));
  CHECK_THROWS(std::invalid_argument, kv_flush(c.cache, 1, {}, kKvScalar, 1));
}

}  // namespace bitforbit::testing
