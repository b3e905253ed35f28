// Python view of planes.hpp and dispatch.hpp. Arguments are checked by the typed wrappers in bitforbit.cpu.
#include "planes.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/module.hpp"
#include "dispatch.hpp"
#include "planes_tables.hpp"

namespace {

using bitforbit::Buffer;
using bitforbit::Kind;
using bitforbit::Layout;

Kind kind_of(std::string_view name) {
  if (name == "BF16") return Kind::kBF16;
  if (name == "F16") return Kind::kF16;
  if (name == "F32") return Kind::kF32;
  if (name == "F8_E4M3") return Kind::kF8E4M3;
  if (name == "F8_E5M2") return Kind::kF8E5M2;
  throw std::invalid_argument("unknown float kind " + std::string(name));
}

const bitforbit::PlanesOps& ops_of(std::string_view isa) {
  const bitforbit::Implementation* found = bitforbit::find_implementation(isa);
  if (!found) throw std::invalid_argument("no such instruction set on this CPU: " + std::string(isa));
  return *found->planes;
}

NumpyBytes hand_over(Buffer buffer) {
  const std::size_t size = buffer.size();
  std::uint8_t* data = buffer.release();
  nb::capsule owner(data, [](void* p) noexcept { std::free(p); });
  return NumpyBytes(data, {size}, owner);
}

nb::tuple encode(ConstBytes src, std::string_view kind, bool wide, std::size_t rows, std::size_t cols,
                 std::size_t rows_per_table, std::string_view isa, int threads) {
  const Layout layout{kind_of(kind), wide, rows, cols, rows_per_table};
  if (rows == 0 || cols == 0 || src.size() != rows * layout.row_bytes()) throw std::invalid_argument("size mismatch");
  const bitforbit::PlanesOps& ops = ops_of(isa);
  bitforbit::EncodedPlanes out;
  {
    nb::gil_scoped_release release;
    out = bitforbit::encode_planes(src.data(), layout, ops, threads);
  }
  return nb::make_tuple(out.rows_per_table, hand_over(std::move(out.code)), hand_over(std::move(out.digits)),
                        hand_over(std::move(out.sign_mantissa)), hand_over(std::move(out.tails)));
}

void decode(ConstBytes code, ConstBytes digits, ConstBytes sign_mantissa, ConstBytes tails, std::string_view kind,
            bool wide, std::size_t rows, std::size_t cols, std::size_t rows_per_table, std::size_t begin,
            std::size_t end, MutableBytes out, std::string_view isa, int threads) {
  const Layout layout{kind_of(kind), wide, rows, cols, rows_per_table};
  if (rows == 0 || cols == 0 || rows_per_table == 0 || begin > end || end > rows ||
      out.size() != (end - begin) * layout.row_bytes()) {
    throw std::invalid_argument("size mismatch");
  }
  const bitforbit::PlanesOps& ops = ops_of(isa);
  const bitforbit::PlanesParts parts{{code.data(), code.size()},
                                     {digits.data(), digits.size()},
                                     {sign_mantissa.data(), sign_mantissa.size()},
                                     {tails.data(), tails.size()}};
  nb::gil_scoped_release release;
  bitforbit::decode_planes(parts, layout, begin, end, out.data(), ops, threads);
}

std::vector<std::uint64_t> histogram(ConstBytes src, std::string_view kind, bool wide) {
  const Layout layout{kind_of(kind), wide, 1, 1, 1};
  std::vector<std::uint64_t> counts(256);
  nb::gil_scoped_release release;
  bitforbit::exponent_histogram(src.data(), src.size() / layout.item_bytes(), layout.kind, wide, counts.data());
  return counts;
}

// Kind and width do not matter to plan and choice.
Layout counted_layout(std::size_t rows, std::size_t cols, std::size_t rows_per_table) {
  if (rows == 0 || cols == 0) throw std::invalid_argument("size mismatch");
  return {Kind::kBF16, false, rows, cols, rows_per_table};
}

std::tuple<std::size_t, std::size_t, std::size_t, std::size_t> plan_histograms(std::size_t rows, std::size_t cols,
                                                                               std::size_t rows_per_table) {
  const bitforbit::HistogramPlan plan = bitforbit::plan_histograms(counted_layout(rows, cols, rows_per_table));
  return {plan.rows, plan.count, plan.stride, plan.last_stride};
}

nb::tuple choose_tables(nb::ndarray<const std::uint32_t, nb::shape<-1, 256>, nb::c_contig, nb::device::cpu> counts,
                        std::size_t rows, std::size_t cols, std::size_t rows_per_table) {
  const Layout layout = counted_layout(rows, cols, rows_per_table);
  if (counts.shape(0) != bitforbit::plan_histograms(layout).count) throw std::invalid_argument("size mismatch");
  std::vector<bitforbit::Histogram> histograms(counts.shape(0));
  for (std::size_t i = 0; i < histograms.size(); ++i) {
    std::memcpy(histograms[i].data(), counts.data() + 256 * i, sizeof histograms[i]);
  }
  bitforbit::CodeTables chosen;
  {
    nb::gil_scoped_release release;
    chosen = bitforbit::choose_tables(std::move(histograms), layout);
  }
  Buffer bytes(chosen.bytes.size());
  std::memcpy(bytes.data(), chosen.bytes.data(), chosen.bytes.size());
  return nb::make_tuple(chosen.rows_per_table, hand_over(std::move(bytes)));
}

bool is_widened_bf16(ConstBytes src) {
  nb::gil_scoped_release release;
  return bitforbit::is_widened_bf16(src.data(), src.size() / 4);
}

NumpyBytes empty(std::size_t size) { return hand_over(Buffer(size)); }

std::vector<std::tuple<std::string, bool>> implementations() {
  std::vector<std::tuple<std::string, bool>> names;
  for (const auto& i : bitforbit::implementations()) names.emplace_back(i.name, i.supported);
  return names;
}

}  // namespace

void bind_planes(nb::module_& m) {
  m.def("implementations", &implementations);
  m.def("empty_aligned", &empty, nb::arg("size"));
  m.def("is_widened_bf16", &is_widened_bf16, nb::arg("src"));
  m.def("exponent_histogram", &histogram, nb::arg("src"), nb::arg("kind"), nb::arg("wide"));
  m.def("planes_plan_histograms", &plan_histograms, nb::arg("rows"), nb::arg("cols"), nb::arg("rows_per_table"));
  m.def("planes_choose_tables", &choose_tables, nb::arg("counts"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("rows_per_table"));
  m.def("planes_encode", &encode, nb::arg("src"), nb::arg("kind"), nb::arg("wide"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("rows_per_table"), nb::arg("isa"), nb::arg("threads"));
  m.def("planes_decode", &decode, nb::arg("code"), nb::arg("digits"), nb::arg("sign_mantissa"), nb::arg("tails"),
        nb::arg("kind"), nb::arg("wide"), nb::arg("rows"), nb::arg("cols"), nb::arg("rows_per_table"), nb::arg("begin"),
        nb::arg("end"), nb::arg("out"), nb::arg("isa"), nb::arg("threads"));
}
