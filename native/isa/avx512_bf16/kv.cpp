// Quantized caches with AVX-512 BF16.
#include "isa/avx512/kv.hpp"

#include "generic/kv_exact.hpp"
#include "generic/kv_products.hpp"
#include "generic/kv_quantize.hpp"

namespace bitforbit {

const KvOps kKvAvx512Bf16 = {
    "avx512_bf16", true,    float_params_bytes,   quantize_keys, quantize_values, score_quantized<Kv512>,
    score_exact,   softmax, sum_quantized<Kv512>, sum_exact};
}  // namespace bitforbit
