// Products with activations of two digits.
#include "cpu/quant_bytes.h"

namespace tilewise {

template bool multiply_bytes<2>(const QuantizedMatmul& call, const Finisher& finish);

}  // namespace tilewise
