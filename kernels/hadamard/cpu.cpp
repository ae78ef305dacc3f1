// Walsh-Hadamard rotation.
#include "../native/rows.h"

namespace fiftyfold {
namespace {

// Orthonormal Walsh-Hadamard rotation of the last dim of x, float32 [..., n], n a power of two.
Tensor hadamard(const Tensor& input) {
  const Tensor x = contiguous_float(input, "hadamard: x");
  const int64_t n = x.size(-1);
  TORCH_CHECK_VALUE(n >= 1 && (n & (n - 1)) == 0, "hadamard: the last dim must be a power of two, found ", n);
  Tensor out = at::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_rows(rows_of(x), 4 * n, [&](int64_t r) {
    std::memcpy(to + r * n, from + r * n, 4 * n);
    hadamard_row(to + r * n, n);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) { m.def("hadamard(Tensor x) -> Tensor"); }
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("hadamard", hadamard); }

}  // namespace fiftyfold
