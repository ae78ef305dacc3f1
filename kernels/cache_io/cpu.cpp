// Packing and unpacking of cache entries, and writes to ring buffers and pages.
#include "../native/common.h"

namespace fiftyfold {
namespace {

// float32 [..., size] -> uint8 [..., nbytes].
Tensor pack(const Tensor& input, at::IntArrayRef spec) {
  const Layout layout(spec);
  const Tensor x = contiguous_float(input, "pack: x");
  TORCH_CHECK_VALUE(x.size(-1) == layout.size(), "pack: expected ", layout.size(), " dims, found ", x.size(-1));
  auto shape = x.sizes().vec();
  shape.back() = layout.nbytes();
  Tensor out = at::empty(shape, x.options().dtype(at::kByte));
  const float* from = x.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<uint8_t>();
  const int64_t size = layout.size(), nbytes = layout.nbytes();
  parallel_rows(rows_of(x), 4 * size, [&](int64_t r) { pack_row(from + r * size, layout, to + r * nbytes); });
  return out;
}

// uint8 [..., nbytes] -> float32 [..., size].
Tensor unpack(const Tensor& packed, at::IntArrayRef spec) {
  const Layout layout(spec);
  const int64_t size = layout.size(), nbytes = layout.nbytes();
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.size(-1) == nbytes, "unpack: expected uint8 [..., ",
                    nbytes, "], found ", packed.scalar_type(), " ", packed.sizes());
  const Tensor rows = packed.contiguous();
  auto shape = rows.sizes().vec();
  shape.back() = size;
  Tensor out = at::empty(shape, rows.options().dtype(at::kFloat));
  const auto* from = rows.const_data_ptr<uint8_t>();
  float* to = out.mutable_data_ptr<float>();
  parallel_rows(rows_of(rows), size, [&](int64_t r) { unpack_row(from + r * nbytes, layout, to + r * size); });
  return out;
}

// Write rows [B, n, width] of any dtype into ring [B, capacity, width]. The first row of a sequence has the position
// `first`, int64 [B or 1]; position p is at index p % capacity.
void write_ring(Tensor& ring, const Tensor& given, const Tensor& first) {
  const Tensor rows = given.contiguous();
  TORCH_CHECK_VALUE(ring.is_contiguous() && ring.dim() == 3 && rows.dim() == 3 && ring.scalar_type() == rows.scalar_type() &&
                        ring.size(2) == rows.size(2) && ring.size(0) == rows.size(0) && rows.size(1) <= ring.size(1),
                    "write_ring: rows ", rows.sizes(), " do not match ring ", ring.sizes());
  const int64_t width = rows.size(2) * rows.element_size(), n = rows.size(1), capacity = ring.size(1);
  const std::vector<int64_t> position = per_sequence(first, rows.size(0), "write_ring: first");
  auto* to = static_cast<uint8_t*>(ring.mutable_data_ptr());
  const auto* from = static_cast<const uint8_t*>(rows.const_data_ptr());
  for (int64_t b = 0; b < rows.size(0); ++b) {
    TORCH_CHECK_VALUE(position[b] >= 0, "write_ring: rows cannot begin at position ", position[b]);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = (position[b] + i) % capacity;
      std::memcpy(to + (b * capacity + place) * width, from + (b * n + i) * width, width);
    }
  }
}

// Pack the first last[b] - first[b] of x float32 [B, n, size] as entries first[b].. of sequence b, into rows of storage
// uint8 [R, nbytes] by way of page_table int64 [B, P]. first and last are int64 [B or 1].
void write_pages(Tensor& storage, const Tensor& table, int64_t page_size, const Tensor& input, at::IntArrayRef spec,
                 const Tensor& firsts, const Tensor& lasts) {
  const Tensor x = contiguous_float(input, "write_pages: x");
  TORCH_CHECK_VALUE(x.dim() == 3, "write_pages: expected x [B, n, size], found ", x.sizes());
  const int64_t B = x.size(0), n = x.size(1), size = x.size(2);
  const WritablePages pages(storage, table, page_size, spec, B, "write_pages");
  TORCH_CHECK_VALUE(size == pages.layout.size(), "write_pages: expected ", pages.layout.size(), " dims, found ", size);
  const std::vector<int64_t> first = per_sequence(firsts, B, "write_pages: first");
  const std::vector<int64_t> last = per_sequence(lasts, B, "write_pages: last");
  const float* from = x.const_data_ptr<float>();
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(0 <= first[b] && last[b] - first[b] <= n && last[b] <= pages.capacity(), "write_pages: entries ",
                      first[b], " to ", last[b], " of sequence ", b, " do not fit ", n, " entries and ", table.size(1),
                      " pages");
    for (int64_t i = first[b]; i < last[b]; ++i) pages.pack(b, i, from + (b * n + i - first[b]) * size);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("pack(Tensor x, int[] layout) -> Tensor");
  m.def("unpack(Tensor packed, int[] layout) -> Tensor");
  m.def("write_ring(Tensor(a!) ring, Tensor rows, Tensor first) -> ()");
  m.def("write_pages(Tensor(a!) storage, Tensor page_table, int page_size, Tensor x, int[] layout, Tensor first, "
        "Tensor last) -> ()");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("pack", pack);
  m.impl("unpack", unpack);
  m.impl("write_ring", write_ring);
  m.impl("write_pages", write_pages);
}

}  // namespace fiftyfold
