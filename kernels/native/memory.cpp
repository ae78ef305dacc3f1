// Copies weights into huge pages: with 4 KiB pages, address translation halves memory bandwidth.
#include <ATen/ops/from_blob.h>

#include "common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fiftyfold {
namespace {

#ifdef __linux__
constexpr size_t kHuge = size_t{2} << 20, kLine = 64;

inline size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Add copies of the tensors, one after the other in one mapping, which is freed with the last of them.
void place_together(const std::vector<Tensor>& tensors, std::vector<Tensor>& copies) {
  if (tensors.empty()) return;
  size_t total = 0;
  for (const Tensor& t : tensors) total += rounded_up(t.nbytes(), kLine);
  const size_t mapped = rounded_up(total, kHuge) + kHuge;  // room to begin at a huge page's border
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(memory != MAP_FAILED, "in_huge_pages: no memory for ", total, " bytes");
  const std::shared_ptr<void> arena(memory, [mapped](void* p) { munmap(p, mapped); });
  auto* next = reinterpret_cast<char*>(rounded_up(reinterpret_cast<uintptr_t>(memory), kHuge));
  madvise(next, rounded_up(total, kHuge), MADV_HUGEPAGE);
  for (const Tensor& t : tensors) {
    std::memcpy(next, t.const_data_ptr(), t.nbytes());
    copies.push_back(at::from_blob(next, t.sizes(), [arena](void*) {}, t.options()));
    next += rounded_up(t.nbytes(), kLine);
  }
}
#endif

// Copies of contiguous tensors in huge pages, where the system gives them. Large ones get a mapping of their own, so
// that replacing them frees it; small neighbors share one.
std::vector<Tensor> in_huge_pages(at::TensorList tensors) {
  std::vector<Tensor> copies;
#ifdef __linux__
  std::vector<Tensor> small;
  for (const Tensor& t : tensors) {
    TORCH_CHECK_VALUE(t.is_contiguous(), "in_huge_pages: expected contiguous tensors");
    if (t.nbytes() < kHuge) {
      small.push_back(t);
      continue;
    }
    place_together(small, copies);
    small.clear();
    place_together({t}, copies);
  }
  place_together(small, copies);
#else
  copies.assign(tensors.begin(), tensors.end());
#endif
  return copies;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) { m.def("in_huge_pages(Tensor[] tensors) -> Tensor[]"); }
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("in_huge_pages", in_huge_pages); }

}  // namespace fiftyfold
