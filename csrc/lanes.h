// The work of one GPU thread on a block of a piece, as a function of (lane, lanes): move.cu calls it
// with its thread's number, and tests on the CPU with every number in turn.
#pragma once

#include "move.h"

namespace realflow {

struct alignas(16) Wide {
  std::uint64_t low;
  std::uint64_t high;
};

// The unit (16, 8, 4, 2 or 1 bytes) in which a piece of bytes may be read and written: everything
// that is added to form an address is a multiple of it.
REALFLOW_BOTH std::int64_t unit_of(const Piece& piece, const void* source, const void* destination) {
  const std::uint64_t bits =
      reinterpret_cast<std::uintptr_t>(source) | reinterpret_cast<std::uintptr_t>(destination) |
      static_cast<std::uint64_t>(piece.source_offset | piece.destination_offset | piece.row) |
      static_cast<std::uint64_t>(piece.groups > 1 ? piece.source_group | piece.destination_group : 0) |
      static_cast<std::uint64_t>(piece.rows > 1 ? piece.source_stride | piece.destination_stride : 0);
  const std::uint64_t lowest = bits & (~bits + 1);
  return lowest == 0 || lowest >= 16 ? 16 : static_cast<std::int64_t>(lowest);
}

// Calls step(from, to) for the units lane, lane + lanes, ... of a block, whose elements are taken in
// row-major order, `per` of them a unit. The divisions are outside of the loop: a thread knows by
// how many rows and units it advances.
template <typename Step>
REALFLOW_BOTH void walk(const Piece& piece, const Block& block, std::int64_t per, const std::byte* source,
                        std::byte* destination, std::uint32_t lane, std::uint32_t lanes, Step step) {
  const auto units = static_cast<std::uint32_t>(block.length / per);
  const auto rows = static_cast<std::uint32_t>(block.rows);
  const std::int64_t from_unit = per * size_of(piece.source_kind);
  const std::int64_t to_unit = per * size_of(piece.destination_kind);
  source += piece.source_offset + block.begin * size_of(piece.source_kind);
  destination += piece.destination_offset + block.begin * size_of(piece.destination_kind);
  std::uint32_t row = lane / units;
  std::uint32_t unit = lane % units;
  const std::uint32_t more_rows = lanes / units;
  const std::uint32_t more_units = lanes % units;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
  while (row < rows) {
    std::int64_t group = 0;
    std::int64_t index = block.row + row;
    if (piece.groups > 1) {
      group = index / piece.rows;
      index -= group * piece.rows;
    }
    step(source + group * piece.source_group + index * piece.source_stride + unit * from_unit,
         destination + group * piece.destination_group + index * piece.destination_stride + unit * to_unit);
    row += more_rows;
    unit += more_units;
    if (unit >= units) {
      unit -= units;
      ++row;
    }
  }
}

template <typename Unit>
REALFLOW_BOTH void copy_lane(const Piece& piece, const Block& block, const std::byte* source,
                             std::byte* destination, std::uint32_t lane, std::uint32_t lanes) {
  walk(piece, block, static_cast<std::int64_t>(sizeof(Unit)), source, destination, lane, lanes,
       [](const std::byte* from, std::byte* to) {
         *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(from);
       });
}

template <typename From, typename To>
REALFLOW_BOTH void number_lane(const Piece& piece, const Block& block, const std::byte* source,
                               std::byte* destination, double decay, std::uint32_t lane,
                               std::uint32_t lanes) {
  const bool blended = piece.blended != 0;
  walk(piece, block, 1, source, destination, lane, lanes, [=](const std::byte* from, std::byte* to) {
    if (blended) {
      blend(*reinterpret_cast<const From*>(from), *reinterpret_cast<To*>(to), decay);
    } else {
      convert(*reinterpret_cast<const From*>(from), *reinterpret_cast<To*>(to));
    }
  });
}

template <typename From>
REALFLOW_BOTH void number_lane(const Piece& piece, const Block& block, const std::byte* source,
                               std::byte* destination, double decay, std::uint32_t lane,
                               std::uint32_t lanes) {
  if (piece.destination_kind == kFloat64) {
    number_lane<From, double>(piece, block, source, destination, decay, lane, lanes);
  } else if (piece.destination_kind == kFloat32) {
    number_lane<From, float>(piece, block, source, destination, decay, lane, lanes);
  } else {
    number_lane<From, BFloat16>(piece, block, source, destination, decay, lane, lanes);
  }
}

// One thread's share of a block. `limit` (a multiple of 16) is that with which the piece was cut.
REALFLOW_BOTH void move_lane(const Piece& piece, std::int64_t index, std::int64_t limit,
                             const std::byte* source, std::byte* destination, double decay,
                             std::uint32_t lane, std::uint32_t lanes) {
  const Block block = block_at(piece, index, limit);
  if (piece.source_kind == kFloat64) {
    number_lane<double>(piece, block, source, destination, decay, lane, lanes);
  } else if (piece.source_kind == kFloat32) {
    number_lane<float>(piece, block, source, destination, decay, lane, lanes);
  } else if (piece.source_kind == kBFloat16) {
    number_lane<BFloat16>(piece, block, source, destination, decay, lane, lanes);
  } else {
    switch (unit_of(piece, source, destination)) {
      case 16: return copy_lane<Wide>(piece, block, source, destination, lane, lanes);
      case 8: return copy_lane<std::uint64_t>(piece, block, source, destination, lane, lanes);
      case 4: return copy_lane<std::uint32_t>(piece, block, source, destination, lane, lanes);
      case 2: return copy_lane<std::uint16_t>(piece, block, source, destination, lane, lanes);
      default: return copy_lane<std::uint8_t>(piece, block, source, destination, lane, lanes);
    }
  }
}

// One thread's share of the terms of words [first, stop) of a range of bytes.
REALFLOW_BOTH std::uint64_t checksum_lane(const std::byte* data, std::int64_t bytes, std::int64_t first,
                                          std::int64_t stop, std::uint32_t lane, std::uint32_t lanes) {
  const bool aligned = (reinterpret_cast<std::uintptr_t>(data) & 7) == 0;
  std::uint64_t sum = 0;
  for (std::int64_t place = first + lane; place < stop; place += lanes) {
    const std::byte* at = data + place * 8;
    const std::int64_t here = bytes - place * 8 < 8 ? bytes - place * 8 : 8;
    std::uint64_t word = 0;
    if (aligned && here == 8) {
      word = *reinterpret_cast<const std::uint64_t*>(at);
    } else {
      for (std::int64_t i = 0; i < here; ++i) word |= static_cast<std::uint64_t>(at[i]) << (8 * i);
    }
    sum += term(word, static_cast<std::uint64_t>(place));
  }
  return sum;
}

}  // namespace realflow
