// What a table of pieces must satisfy before a kernel may believe it. For the bindings.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "move.h"

namespace realflow {

// One side of a piece stays inside the memory that its tensor can reach.
inline bool inside(std::int64_t offset, std::int64_t group, std::int64_t stride, std::int64_t size,
                   const Piece& piece, std::int64_t reach) {
  if (offset < 0 || group < 0 || stride < 0) return false;
  std::int64_t groups = 0;
  std::int64_t rows = 0;
  std::int64_t span = 0;
  return !__builtin_mul_overflow(piece.groups - 1, group, &groups) &&
         !__builtin_mul_overflow(piece.rows - 1, stride, &rows) &&
         !__builtin_mul_overflow(piece.row, size, &span) && !__builtin_add_overflow(span, groups, &span) &&
         !__builtin_add_overflow(span, rows, &span) && !__builtin_add_overflow(span, offset, &span) &&
         span <= reach;
}

// The bytes from each tensor's first element to the end of its storage.
inline std::vector<std::int64_t> reaches(at::TensorList tensors, const at::Device& device) {
  std::vector<std::int64_t> found;
  found.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device() == device, "realflow.move: a tensor is on ", tensor.device(),
                ", others are on ", device);
    const auto first = tensor.storage_offset() * static_cast<std::int64_t>(tensor.element_size());
    found.push_back(static_cast<std::int64_t>(tensor.storage().nbytes()) - first);
  }
  return found;
}

// The table's pieces, which are then known to stay inside the tensors' storage.
inline const Piece* checked(const at::Tensor& table, at::TensorList sources, at::TensorList destinations,
                            const at::Device& device) {
  TORCH_CHECK(table.device().is_cpu() && table.is_contiguous() && table.scalar_type() == at::kLong &&
                  table.dim() == 2 && table.size(1) == kColumns,
              "realflow.move: the table must be a contiguous int64 [n, ", kColumns, "] tensor on the CPU");
  const std::vector<std::int64_t> from = reaches(sources, device);
  const std::vector<std::int64_t> to = reaches(destinations, device);
  const auto* pieces = reinterpret_cast<const Piece*>(table.const_data_ptr<std::int64_t>());
  for (std::int64_t index = 0; index < table.size(0); ++index) {
    const Piece& piece = pieces[index];
    const bool bytes = piece.source_kind == kBytes && piece.destination_kind == kBytes && !piece.blended;
    const bool numbers = piece.source_kind > kBytes && piece.source_kind <= kBFloat16 &&
                         piece.destination_kind > kBytes && piece.destination_kind <= kBFloat16;
    TORCH_CHECK((bytes || numbers) && piece.source >= 0 &&
                    piece.source < static_cast<std::int64_t>(from.size()) && piece.destination >= 0 &&
                    piece.destination < static_cast<std::int64_t>(to.size()) && piece.groups >= 0 &&
                    piece.rows >= 0 && piece.row >= 0,
                "realflow.move: row ", index, " of the table has an entry out of range");
    if (piece.groups == 0 || piece.rows == 0 || piece.row == 0) continue;
    std::int64_t total = 0;
    TORCH_CHECK(
        !__builtin_mul_overflow(piece.groups, piece.rows, &total) &&
            !__builtin_mul_overflow(total, piece.row, &total) &&
            inside(piece.source_offset, piece.source_group, piece.source_stride, size_of(piece.source_kind),
                   piece, from[static_cast<std::size_t>(piece.source)]) &&
            inside(piece.destination_offset, piece.destination_group, piece.destination_stride,
                   size_of(piece.destination_kind), piece, to[static_cast<std::size_t>(piece.destination)]),
        "realflow.move: row ", index, " of the table leaves its tensor");
  }
  return pieces;
}

// The ranges whose checksums are wanted, known to rise and to stay inside the buffer.
inline const std::int64_t* checked_bounds(const at::Tensor& bounds, const at::Tensor& buffer) {
  TORCH_CHECK(buffer.is_contiguous() && buffer.scalar_type() == at::kByte,
              "realflow.checksums: the buffer must be a contiguous uint8 tensor");
  TORCH_CHECK(bounds.device().is_cpu() && bounds.is_contiguous() && bounds.scalar_type() == at::kLong &&
                  bounds.dim() == 1 && bounds.numel() > 0,
              "realflow.checksums: the bounds must be a contiguous int64 [n + 1] tensor on the CPU");
  const auto* at = bounds.const_data_ptr<std::int64_t>();
  std::int64_t before = 0;
  for (std::int64_t index = 0; index < bounds.numel(); ++index) {
    TORCH_CHECK(at[index] >= before && at[index] <= buffer.numel(), "realflow.checksums: bound ", index,
                " leaves the buffer or the order");
    before = at[index];
  }
  return at;
}

}  // namespace realflow
