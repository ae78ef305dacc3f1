// Weights in huge pages: of small ones a processor looks up so many addresses that it reads memory at half its speed.
#include <ATen/ops/from_blob.h>

#include "common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fiftyfold {
namespace {

// Copies of contiguous tensors, one after the other in memory of huge pages where the system gives them. The memory is
// freed with the last of them.
std::vector<Tensor> in_huge_pages(at::TensorList tensors) {
  std::vector<Tensor> copies;
#ifdef __linux__
  constexpr size_t kHuge = size_t{2} << 20, kLine = 64;
  size_t total = 0;
  for (const Tensor& t : tensors) total += (t.nbytes() + kLine - 1) / kLine * kLine;
  // Rounded up, and room to begin at a huge page's border.
  const size_t mapped = (total + kHuge - 1) / kHuge * kHuge + kHuge;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(memory != MAP_FAILED, "in_huge_pages: no memory for ", total, " bytes");
  const std::shared_ptr<void> arena(memory, [mapped](void* p) { munmap(p, mapped); });
  auto* next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge);
  madvise(next, (total + kHuge - 1) / kHuge * kHuge, MADV_HUGEPAGE);
  for (const Tensor& t : tensors) {
    TORCH_CHECK_VALUE(t.is_contiguous(), "in_huge_pages: expected contiguous tensors");
    std::memcpy(next, t.const_data_ptr(), t.nbytes());
    copies.push_back(at::from_blob(next, t.sizes(), [arena](void*) {}, t.options()));
    next += (t.nbytes() + kLine - 1) / kLine * kLine;
  }
#else
  for (const Tensor& t : tensors) copies.push_back(t);
#endif
  return copies;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) { m.def("in_huge_pages(Tensor[] tensors) -> Tensor[]"); }
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("in_huge_pages", in_huge_pages); }

}  // namespace fiftyfold
