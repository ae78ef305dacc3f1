// Copies of weights in huge pages. With 4 KiB pages, address translation halves the memory bandwidth.
#include <ATen/ops/from_blob.h>

#include "common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fiftyfold {
namespace {

#ifdef __linux__
constexpr size_t kHuge = size_t{2} << 20, kLine = 64;

inline size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Append copies of the tensors, adjacent in one mapping, which is freed with the last copy.
void copy_into_mapping(const std::vector<Tensor>& tensors, std::vector<Tensor>& copies) {
  if (tensors.empty()) return;
  size_t total = 0;
  for (const Tensor& t : tensors) total += round_up(t.nbytes(), kLine);
  const size_t mapped = round_up(total, kHuge) + kHuge;  // room for alignment to a huge page
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(memory != MAP_FAILED, "in_huge_pages: cannot allocate ", total, " bytes");
  const std::shared_ptr<void> arena(memory, [mapped](void* p) { munmap(p, mapped); });
  auto* next = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(memory), kHuge));
  madvise(next, round_up(total, kHuge), MADV_HUGEPAGE);
  for (const Tensor& t : tensors) {
    std::memcpy(next, t.const_data_ptr(), t.nbytes());
    copies.push_back(at::from_blob(next, t.sizes(), [arena](void*) {}, t.options()));
    next += round_up(t.nbytes(), kLine);
  }
}
#endif

// Copy contiguous tensors into huge pages, if the system provides them. Every large tensor has its own mapping, which is
// freed when the tensor is replaced. Consecutive small tensors share a mapping.
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
    copy_into_mapping(small, copies);
    small.clear();
    copy_into_mapping({t}, copies);
  }
  copy_into_mapping(small, copies);
#else
  copies.assign(tensors.begin(), tensors.end());
#endif
  return copies;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) { m.def("in_huge_pages(Tensor[] tensors) -> Tensor[]"); }
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("in_huge_pages", in_huge_pages); }

}  // namespace fiftyfold
