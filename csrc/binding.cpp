// torch.ops.realflow.{pack, unpack, checksum}: checks every range, then calls pack.h.
//
// Only torch/library.h and the tensor class are included: torch/extension.h triples the build time.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "pack.h"

namespace realflow {
namespace {

struct Table {
  const Piece* pieces;
  std::int64_t count;
};

// The most bytes that may be reached from a tensor's first element on: the rest of its storage.
std::int64_t reach(const at::Tensor& tensor) {
  const auto first = tensor.storage_offset() * static_cast<std::int64_t>(tensor.element_size());
  return static_cast<std::int64_t>(tensor.storage().nbytes()) - first;
}

// A table that is known to stay inside the tensors' storage and the buffer.
Table checked(const at::Tensor& table, at::TensorList tensors, const at::Tensor& buffer) {
  TORCH_CHECK(buffer.device().is_cpu() && buffer.is_contiguous() && buffer.scalar_type() == at::kByte,
              "realflow.pack: the buffer must be a contiguous uint8 tensor on the CPU");
  TORCH_CHECK(table.device().is_cpu() && table.is_contiguous() && table.scalar_type() == at::kLong &&
                  table.dim() == 2 && table.size(1) == 6,
              "realflow.pack: the table must be a contiguous int64 [n, 6] tensor on the CPU");
  std::vector<std::int64_t> reaches;
  reaches.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device().is_cpu(), "realflow.pack: every tensor must be on the CPU");
    reaches.push_back(reach(tensor));
  }
  const auto* pieces = reinterpret_cast<const Piece*>(table.const_data_ptr<std::int64_t>());
  const std::int64_t room = buffer.numel();
  for (std::int64_t index = 0; index < table.size(0); ++index) {
    const Piece& piece = pieces[index];
    TORCH_CHECK(piece.tensor >= 0 && piece.tensor < static_cast<std::int64_t>(tensors.size()) &&
                    piece.offset >= 0 && piece.rows >= 0 && piece.row_bytes >= 0 &&
                    piece.row_stride >= 0 && piece.packed >= 0,
                "realflow.pack: row ", index, " of the table has an entry out of range");
    if (piece.rows == 0 || piece.row_bytes == 0) continue;
    std::int64_t span = 0;
    std::int64_t packed = 0;
    const bool overflow = __builtin_mul_overflow(piece.rows - 1, piece.row_stride, &span) ||
                          __builtin_add_overflow(span, piece.row_bytes, &span) ||
                          __builtin_add_overflow(span, piece.offset, &span) ||
                          __builtin_mul_overflow(piece.rows, piece.row_bytes, &packed) ||
                          __builtin_add_overflow(packed, piece.packed, &packed);
    TORCH_CHECK(!overflow && span <= reaches[static_cast<std::size_t>(piece.tensor)] && packed <= room,
                "realflow.pack: row ", index, " of the table leaves its tensor or the buffer");
  }
  return {pieces, table.size(0)};
}

void pack_cpu(at::TensorList sources, const at::Tensor& table, at::Tensor& buffer) {
  const Table rows = checked(table, sources, buffer);
  std::vector<const std::byte*> bases;
  bases.reserve(sources.size());
  for (const at::Tensor& source : sources) {
    bases.push_back(static_cast<const std::byte*>(source.const_data_ptr()));
  }
  pack(rows.pieces, rows.count, bases.data(), static_cast<std::byte*>(buffer.mutable_data_ptr()),
       at::get_num_threads());
}

void unpack_cpu(const at::Tensor& buffer, const at::Tensor& table, at::TensorList destinations) {
  const Table rows = checked(table, destinations, buffer);
  std::vector<std::byte*> bases;
  bases.reserve(destinations.size());
  for (const at::Tensor& destination : destinations) {
    bases.push_back(static_cast<std::byte*>(destination.mutable_data_ptr()));
  }
  unpack(rows.pieces, rows.count, bases.data(), static_cast<const std::byte*>(buffer.const_data_ptr()),
         at::get_num_threads());
}

std::int64_t checksum_cpu(const at::Tensor& data) {
  TORCH_CHECK(data.device().is_cpu() && data.is_contiguous(),
              "realflow.checksum: the tensor must be contiguous and on the CPU");
  const auto bytes = data.numel() * static_cast<std::int64_t>(data.element_size());
  return static_cast<std::int64_t>(
      checksum(static_cast<const std::byte*>(data.const_data_ptr()), bytes, at::get_num_threads()));
}

}  // namespace

TORCH_LIBRARY(realflow, library) {
  library.def("pack(Tensor[] sources, Tensor table, Tensor(a!) buffer) -> ()");
  library.def("unpack(Tensor buffer, Tensor table, Tensor(a!)[] destinations) -> ()");
  library.def("checksum(Tensor data) -> int");
}

TORCH_LIBRARY_IMPL(realflow, CPU, library) {
  library.impl("pack", &pack_cpu);
  library.impl("unpack", &unpack_cpu);
  library.impl("checksum", &checksum_cpu);
}

}  // namespace realflow
