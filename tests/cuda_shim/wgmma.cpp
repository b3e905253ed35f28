// Products of warpgroups that go on while threads do other things: what wgmma.cuh promises, as the PTX manual has it.
//
// Seeds that are odd make a product at once, which shows that b was not there yet; others as late as can be, which
// shows that b was overwritten, or that nobody waited: until then the sums are NaNs. The registers of a must be at the
// wait what they were at the product. All four warps of a warpgroup must issue the same products, of the same b.
#include <algorithm>
#include <string>

#include "state.hpp"

namespace shim {

constexpr unsigned kSharedBase = 1024;  // of dynamic shared memory at the least, as instructions address it

// Of the array that is made first; alignment to more than 128 bytes differs between seeds.
static unsigned window(const State& s) { return kSharedBase + 128 * (s.seed % 8); }

unsigned shared_address(const void* smem) {
  const State& s = *g_state;
  const char* at = static_cast<const char*>(smem);
  if (s.dynamic_bytes == 0 || at < s.shared.front().begin || at > s.shared.front().begin + s.dynamic_bytes) {
    fail("an address that is not in dynamic shared memory");
  }
  return window(s) + static_cast<unsigned>(at - s.shared.front().begin);
}

// PTX ISA, "Matrix Descriptor Format".
struct Descriptor {
  unsigned address, leading, stride, base, mode;

  explicit Descriptor(uint64_t bits)
      : address(unsigned(bits & 0x3FFF) << 4),
        leading(unsigned(bits >> 16 & 0x3FFF) << 4),
        stride(unsigned(bits >> 32 & 0x3FFF) << 4),
        base(unsigned(bits >> 49 & 7)),
        mode(unsigned(bits >> 62)) {
    if ((bits & ~(0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 7ull << 49 | 3ull << 62)) != 0) {
      fail("wgmma: reserved bits of the descriptor are set");
    }
    if (base != 0) fail("wgmma: a base offset is not emulated");
  }

  // Where 16 bytes of a K-major matrix are: row n, columns 8 * piece on. PTX ISA, "Shared Memory Matrix Layout" and
  // "Strides": swizzled rows are 128, 64 or 32 bytes apart and the leading dimension's offset means nothing; without
  // swizzle eight rows of 16 bytes are together, and the offset leads to the next eight columns.
  unsigned at(unsigned n, unsigned piece) const {
    const unsigned group = address + n / 8 * stride;
    if (mode == 0) return group + n % 8 * 16 + piece * leading;
    const unsigned plain = group + n % 8 * (256u >> mode) + piece * 16;
    return plain ^ (plain >> 3 & (0x70u & 0x70u >> (mode - 1)));  // [6:4] ^= [9:7], [5:4] ^= [8:7], [4] ^= [7]
  }
};

static float number(uint64_t words, unsigned at, bool is_f16) {
  const auto word = static_cast<uint16_t>(words >> (16 * at));
  if (is_f16) {
    _Float16 value;
    std::memcpy(&value, &word, 2);
    return float(value);
  }
  const uint32_t bits = uint32_t(word) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// One column of b, its 16 rows.
static void load_column(const State& s, const Descriptor& b, unsigned n, bool is_f16, float (&column)[16]) {
  for (unsigned piece = 0; piece < 2; ++piece) {
    const unsigned at = b.at(n, piece), offset = at - window(s);
    if (at < window(s) || offset + 16 > s.dynamic_bytes) fail("wgmma: b lies outside of shared memory");
    const char* source = s.shared.front().begin + offset;
    if (g_races.access_by_proxy != nullptr) g_races.access_by_proxy(source, 16);
    uint64_t words[2];
    std::memcpy(words, source, 16);
    for (unsigned k = 0; k < 8; ++k) column[8 * piece + k] = number(words[k / 4], k % 4, is_f16);
  }
}

// This lane's part of a product.
static void add(const State& s, const Product& product, float* sum) {
  const Descriptor b(product.b);
  for (unsigned n = 0; n < 8 * product.tiles; ++n) {
    if (n % 8 / 2 != s.current->lane % 4) continue;
    float column[16];
    load_column(s, b, n, product.is_f16, column);
    for (unsigned half = 0; half < 2; ++half) {
      float& value = sum[4 * (n / 8) + 2 * half + n % 2];
      value = dot16(product.a[half], column, value);
    }
  }
}

static PendingSums& pending(Fibre& me, float* sum) {
  return *std::find_if(me.sums.begin(), me.sums.end(), [&](const PendingSums& p) { return p.at == sum; });
}

static void finish(State& s, const Product& product) {
  Fibre& me = *s.current;
  if (std::memcmp(product.registers, product.given, sizeof(product.given)) != 0) {
    fail(product.site, "registers of a were changed before the wait");
  }
  PendingSums& sums = pending(me, product.sum);
  if (!product.made) add(s, product, sums.values.data());
  if (--sums.products != 0) return;
  std::copy(sums.values.begin(), sums.values.end(), product.sum);
  me.sums.erase(me.sums.begin() + (&sums - me.sums.data()));
}

// Where in the sequence of its warpgroup's products a warp is; the four must issue the same.
static void join(State& s, const Site& site, uint64_t descriptor) {
  Fibre& me = *s.current;
  if (s.threads % (4 * kLanes) != 0) fail(site, "a block that is not made of warpgroups");
  s.warpgroups.resize(s.threads / (4 * kLanes));
  Warpgroup& group = s.warpgroups[me.warp / 4];
  const unsigned number = me.products++;
  if (number == group.descriptors.size()) group.descriptors.push_back(descriptor);
  if (group.descriptors[number] != descriptor) fail(site, "warps of a warpgroup multiply by different b");
  group.issued[me.warp % 4] = std::max(group.issued[me.warp % 4], me.products);
}

bool products_are_issued(const State& s, const Fibre& f) {
  const auto& issued = s.warpgroups[f.warp / 4].issued;
  return std::all_of(std::begin(issued), std::end(issued), [&](unsigned count) { return count >= f.products; });
}

void wgmma(const Site& site, float* sum, unsigned tiles, const unsigned* a, uint64_t descriptor, bool is_f16) {
  State& s = *g_state;
  Fibre& me = *s.current;
  if (!me.products_fenced) fail(site, "no wgmma_fence since the last wait");
  join(s, site, descriptor);
  Product product{site, sum, tiles, a, descriptor, is_f16};
  std::memcpy(product.given, a, sizeof(product.given));
  const uint64_t words[2] = {a[0] | uint64_t(a[1]) << 32, a[2] | uint64_t(a[3]) << 32};
  const Collective& all = meet(site, 0xFFFFFFFFu, words, 2);
  if (all.arrived != 0xFFFFFFFFu) fail(site, "a lane has exited");
  for (unsigned half = 0; half < 2; ++half) {
    for (unsigned k = 0; k < 16; ++k) {
      product.a[half][k] = number(all.values[me.lane / 4 * 4 + k % 8 / 2][k / 8], 2 * half + k % 2, is_f16);
    }
  }
  if (std::none_of(me.sums.begin(), me.sums.end(), [&](const PendingSums& p) { return p.at == sum; })) {
    me.sums.push_back({sum, {sum, sum + 4 * tiles}, 0});
    std::memset(sum, 0xFF, 16 * tiles);
  }
  PendingSums& sums = pending(me, sum);
  ++sums.products;
  product.made = s.seed % 2 != 0;
  if (product.made) add(s, product, sums.values.data());
  me.products_started.push_back(product);
}

void wgmma_fence(const Site& site) {
  meet(site, 0xFFFFFFFFu, nullptr, 0);
  g_state->current->products_fenced = true;
}

void wgmma_commit(const Site& site) {
  meet(site, 0xFFFFFFFFu, nullptr, 0);
  Fibre& me = *g_state->current;
  me.product_groups.push_back(std::move(me.products_started));
  me.products_started.clear();
  me.products_fenced = false;
}

void wgmma_wait(const Site& site, unsigned groups) {
  State& s = *g_state;
  meet(site, 0xFFFFFFFFu, nullptr, 0);
  Fibre& me = *s.current;
  while (me.product_groups.size() > groups) {
    me.site = site;
    while (!products_are_issued(s, me)) {
      me.wait = Wait::kProducts;
      yield();
    }
    me.wait = Wait::kNone;
    for (const Product& product : me.product_groups.front()) finish(s, product);
    me.product_groups.erase(me.product_groups.begin());
  }
}

void fence_async() { ++g_state->current->fences; }

}  // namespace shim
