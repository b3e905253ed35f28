// Python view of kv.hpp. Addresses and sizes are checked by the typed wrapper in bitforbit.cpu.kv, where they can be.
#include "kv.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/module.hpp"

namespace {

using bitforbit::KvDtype;
using Strides = std::array<std::size_t, 3>;

KvDtype dtype_of(std::string_view name) {
  if (name == "BF16") return KvDtype::kBF16;
  if (name == "F16") return KvDtype::kF16;
  if (name == "F32") return KvDtype::kF32;
  throw std::invalid_argument("unknown float kind " + std::string(name));
}

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// bitforbit::KvCache with the table of segments that it points to.
struct Cache {
  std::vector<std::uint8_t*> segments;
  bitforbit::KvCache cache{};

  Cache(std::string_view dtype, std::pair<int, int> bits, std::size_t head_dim,
        std::pair<std::size_t, std::size_t> groups, std::pair<std::size_t, std::size_t> rows,
        std::array<std::size_t, 3> tokens, const std::vector<std::uintptr_t>& addresses,
        std::array<std::uintptr_t, 5> exact, std::size_t slots) {
    cache.record =
        bitforbit::make_kv_record(dtype_of(dtype), bits.first, bits.second, head_dim, groups.first, groups.second);
    cache.batch = rows.first, cache.heads = rows.second;
    cache.residual = tokens[0], cache.sink = tokens[1], cache.capacity = tokens[2];
    for (const std::uintptr_t address : addresses) segments.push_back(at<std::uint8_t>(address));
    cache.segments = segments;
    cache.window_k = at<const std::uint8_t>(exact[0]), cache.window_v = at<const std::uint8_t>(exact[1]);
    cache.sink_k = at<const std::uint8_t>(exact[2]), cache.sink_v = at<const std::uint8_t>(exact[3]);
    cache.start = at<const std::int32_t>(exact[4]);
    cache.tokens = slots;
  }
  Cache(const Cache&) = delete;
};

std::size_t flush(const Cache& c, std::size_t new_tokens, std::uintptr_t k, std::uintptr_t v, const Strides& k_strides,
                  const Strides& v_strides, std::string_view isa, int threads) {
  bitforbit::KvPending pending{at<const std::uint8_t>(k), at<const std::uint8_t>(v), {}, {}};
  for (std::size_t i = 0; i < 3; ++i) pending.k_strides[i] = k_strides[i], pending.v_strides[i] = v_strides[i];
  const bitforbit::KvOps& ops = bitforbit::find_kv(isa, c.cache.record.dtype);
  const nb::gil_scoped_release unlocked;
  return bitforbit::kv_flush(c.cache, new_tokens, pending, ops, threads);
}

void attend(const Cache& c, std::size_t visible, std::uintptr_t q, const Strides& q_strides,
            std::size_t queries_per_head, std::size_t query_rows, float scaling, float softcap, std::uintptr_t sinks,
            std::uintptr_t mask, const Strides& mask_strides, std::uintptr_t out, bool out_f32, std::uintptr_t lse,
            std::string_view isa, int threads) {
  bitforbit::KvAttention a{};
  a.visible = visible;
  a.q = at<const std::uint8_t>(q);
  a.queries_per_head = queries_per_head, a.query_rows = query_rows;
  a.scaling = scaling, a.softcap = softcap;
  a.sinks = at<const float>(sinks);
  a.mask = at<const std::uint8_t>(mask);
  for (std::size_t i = 0; i < 3; ++i) a.q_strides[i] = q_strides[i], a.mask_strides[i] = mask_strides[i];
  a.out = at<std::uint8_t>(out), a.out_f32 = out_f32, a.lse = at<float>(lse);
  a.threads = threads;
  const bitforbit::KvOps& ops = bitforbit::find_kv(isa, c.cache.record.dtype);
  const nb::gil_scoped_release unlocked;
  bitforbit::kv_attend(c.cache, a, ops);
}

std::string implementation(std::string_view isa, std::string_view dtype) {
  return bitforbit::find_kv(isa, dtype_of(dtype)).isa;
}

}  // namespace

void bind_kv(nb::module_& m) {
  nb::class_<Cache>(m, "KvCache")
      .def(nb::init<std::string_view, std::pair<int, int>, std::size_t, std::pair<std::size_t, std::size_t>,
                    std::pair<std::size_t, std::size_t>, std::array<std::size_t, 3>, const std::vector<std::uintptr_t>&,
                    std::array<std::uintptr_t, 5>, std::size_t>(),
           nb::arg("dtype"), nb::arg("bits"), nb::arg("head_dim"), nb::arg("groups"), nb::arg("rows"),
           nb::arg("tokens"), nb::arg("segments"), nb::arg("exact"), nb::arg("slots"));
  m.def("kv_implementation", &implementation, nb::arg("isa"), nb::arg("dtype"));
  m.def("kv_flush", &flush, nb::arg("cache"), nb::arg("new_tokens"), nb::arg("pending_k"), nb::arg("pending_v"),
        nb::arg("k_strides"), nb::arg("v_strides"), nb::arg("isa"), nb::arg("threads"));
  m.def("kv_attend", &attend, nb::arg("cache"), nb::arg("visible"), nb::arg("q"), nb::arg("q_strides"),
        nb::arg("queries_per_head"), nb::arg("query_rows"), nb::arg("scaling"), nb::arg("softcap"), nb::arg("sinks"),
        nb::arg("mask"), nb::arg("mask_strides"), nb::arg("out"), nb::arg("out_f32"), nb::arg("lse"), nb::arg("isa"),
        nb::arg("threads"));
}
