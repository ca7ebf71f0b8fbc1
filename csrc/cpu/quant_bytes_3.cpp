// Products with activations of three digits.
#include "cpu/quant_bytes.h"

namespace tilewise {

template bool multiply_bytes<3>(const QuantizedMatmul& call, const Finisher& finish);

}  // namespace tilewise
