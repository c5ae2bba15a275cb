// Moving strided pieces between tensors and buffers: packing, unpacking and copying are one function.
//
// No torch here: pointers and byte counts only, so that the same functions serve CPU, GPU and tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "elements.h"

namespace realflow {

// What the elements are. Bytes are copied as they are; the others are numbers and may be converted.
enum Kind : std::int64_t { kBytes = 0, kFloat64 = 1, kFloat32 = 2, kBFloat16 = 3 };

// `groups` groups of `rows` rows of `row` elements (bytes, where the kinds are kBytes). Offsets and
// strides are in bytes: `*_group` from group to group, `*_stride` from row to row. Within a row the
// elements lie without gaps on both sides. `blended` pieces are averaged into what is there.
struct Piece {
  std::int64_t source;  // index into the base pointers
  std::int64_t source_offset;
  std::int64_t source_group;
  std::int64_t source_stride;
  std::int64_t destination;
  std::int64_t destination_offset;
  std::int64_t destination_group;
  std::int64_t destination_stride;
  std::int64_t groups;
  std::int64_t rows;
  std::int64_t row;
  std::int64_t source_kind;
  std::int64_t destination_kind;
  std::int64_t blended;
};
constexpr std::int64_t kColumns = 14;
static_assert(sizeof(Piece) == kColumns * sizeof(std::int64_t), "a table row is 14 int64");

// A part of one piece, the unit of work: rows counted over all groups, and where one row exceeds a
// block, some of its elements.
struct Block {
  std::int64_t row;
  std::int64_t rows;
  std::int64_t begin;  // first element of each row that belongs to the block
  std::int64_t length;
};

REALFLOW_BOTH std::int64_t size_of(std::int64_t kind) {
  return kind == kFloat64 ? 8 : kind == kFloat32 ? 4 : kind == kBFloat16 ? 2 : 1;
}

// A piece is cut into blocks of at most `limit` elements.
REALFLOW_BOTH std::int64_t blocks_in(const Piece& piece, std::int64_t limit) {
  if (piece.groups == 0 || piece.rows == 0 || piece.row == 0) return 0;
  const std::int64_t rows = piece.groups * piece.rows;
  if (piece.row > limit) return rows * ((piece.row + limit - 1) / limit);
  const std::int64_t step = limit / piece.row;
  return (rows + step - 1) / step;
}

REALFLOW_BOTH Block block_at(const Piece& piece, std::int64_t index, std::int64_t limit) {
  const std::int64_t rows = piece.groups * piece.rows;
  if (piece.row > limit) {
    const std::int64_t cuts = (piece.row + limit - 1) / limit;
    const std::int64_t begin = index % cuts * limit;
    const std::int64_t rest = piece.row - begin;
    return {index / cuts, 1, begin, rest < limit ? rest : limit};
  }
  const std::int64_t step = limit / piece.row;
  const std::int64_t row = index * step;
  return {row, rows - row < step ? rows - row : step, 0, piece.row};
}

// Moves every piece from `sources` to `destinations`. Destinations must not overlap one another, nor
// a source; `decay` is that of blended pieces. The result does not depend on the number of threads.
void move(const Piece* pieces, std::int64_t count, const std::byte* const* sources,
          std::byte* const* destinations, double decay, int threads);

// A 64-bit checksum of each range [bounds[i], bounds[i + 1]) of a buffer, which depends on every byte
// and its place in the range. It guards against mistakes and bad memory, not against an adversary.
void checksums(const std::byte* buffer, const std::int64_t* bounds, std::int64_t count,
               std::uint64_t* sums, int threads);

}  // namespace realflow
