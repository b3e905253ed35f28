// DFloat11 for Python: numpy arrays in and out, the interpreter's lock released.
#include "df11.hpp"

#include <span>

#include "bindings/module.hpp"

namespace {

template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
std::span<T> span_of(const Vector<T>& array) {
  return {array.data(), array.size()};
}

void split_and_count(const Vector<const std::uint16_t>& words, std::size_t chunk_elements, int threads,
                     const Vector<std::uint8_t>& sign_mantissa, const Vector<std::uint32_t>& histograms) {
  const nb::gil_scoped_release unlocked;
  bitforbit::df11::split_and_count(span_of(words), chunk_elements, threads, span_of(sign_mantissa),
                                   span_of(histograms));
}

void encode(const Vector<const std::uint16_t>& words, std::size_t chunk_elements,
            const Vector<const std::uint64_t>& chunk_bits, std::uint64_t first_element,
            const Vector<const std::uint32_t>& codes, const Vector<const std::uint8_t>& lengths, int threads,
            const Vector<std::uint64_t>& windows, const Vector<std::uint8_t>& gaps,
            const Vector<std::uint32_t>& positions) {
  const nb::gil_scoped_release unlocked;
  bitforbit::df11::encode(span_of(words), chunk_elements, span_of(chunk_bits), first_element,
                          {span_of(codes), span_of(lengths)}, threads,
                          {span_of(windows), span_of(gaps), span_of(positions)});
}

void pack_gaps(const Vector<const std::uint8_t>& gaps, const Vector<std::uint8_t>& packed) {
  const nb::gil_scoped_release unlocked;
  bitforbit::df11::pack_gaps(span_of(gaps), span_of(packed));
}

void decode(const Vector<const std::uint8_t>& luts, const Vector<const std::uint8_t>& encoded,
            const Vector<const std::uint8_t>& sign_mantissa, const Vector<const std::uint32_t>& positions,
            const Vector<const std::uint8_t>& gaps, int threads, const Vector<std::uint16_t>& words) {
  const nb::gil_scoped_release unlocked;
  bitforbit::df11::decode({span_of(luts), span_of(encoded), span_of(sign_mantissa), span_of(positions), span_of(gaps)},
                          threads, span_of(words));
}

}  // namespace

void bind_df11(nb::module_& m) {
  m.def("df11_split_and_count", &split_and_count, nb::arg("words"), nb::arg("chunk_elements"), nb::arg("threads"),
        nb::arg("sign_mantissa").noconvert(), nb::arg("histograms").noconvert());
  m.def("df11_encode", &encode, nb::arg("words"), nb::arg("chunk_elements"), nb::arg("chunk_bits"),
        nb::arg("first_element"), nb::arg("codes"), nb::arg("lengths"), nb::arg("threads"),
        nb::arg("windows").noconvert(), nb::arg("gaps").noconvert(), nb::arg("positions").noconvert());
  m.def("df11_pack_gaps", &pack_gaps, nb::arg("gaps"), nb::arg("packed").noconvert());
  m.def("df11_decode", &decode, nb::arg("luts"), nb::arg("encoded"), nb::arg("sign_mantissa"), nb::arg("positions"),
        nb::arg("gaps"), nb::arg("threads"), nb::arg("words").noconvert());
}
