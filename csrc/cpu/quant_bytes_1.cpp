// Products with activations of one digit.
#include "cpu/quant_bytes.h"

namespace tilewise {

template bool multiply_bytes<1>(const QuantizedMatmul& call, const Finisher& finish);

}  // namespace tilewise
