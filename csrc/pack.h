// Gathering the pieces of a message into one buffer, and scattering them back.
//
// No torch here: pointers and byte counts only, so that the same functions serve other bindings.
#pragma once

#include <cstddef>
#include <cstdint>

namespace realflow {

// `rows` runs of `row_bytes` bytes in storage, `row_stride` bytes apart, the first at
// `bases[tensor] + offset`; in the buffer they lie without gaps from `packed` on.
struct Piece {
  std::int64_t tensor;
  std::int64_t offset;
  std::int64_t rows;
  std::int64_t row_bytes;
  std::int64_t row_stride;
  std::int64_t packed;
};
static_assert(sizeof(Piece) == 6 * sizeof(std::int64_t), "a table row is six int64");

// Copies every piece from storage to the buffer. Pieces may overlap in storage, not in the buffer.
void pack(const Piece* pieces, std::int64_t count, const std::byte* const* bases, std::byte* buffer,
          int threads);

// Copies every piece from the buffer to storage. Pieces must not overlap in storage.
void unpack(const Piece* pieces, std::int64_t count, std::byte* const* bases, const std::byte* buffer,
            int threads);

// A 64-bit checksum that depends on every byte and its place. The same for any number of threads.
// It guards against mistakes and bad memory, not against an adversary.
std::uint64_t checksum(const std::byte* data, std::int64_t bytes, int threads);

}  // namespace realflow
