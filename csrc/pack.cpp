#include "pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace realflow {
namespace {

// The unit of work of one thread: large enough to hide the cost of scheduling it.
constexpr std::int64_t kBlockBytes = 256 * 1024;

// A part of one piece: either some of its rows, or, where one row exceeds a block, some of its bytes.
struct Block {
  const Piece* piece;
  std::int64_t row;
  std::int64_t rows;
  std::int64_t begin;  // first byte of each row that belongs to the block
  std::int64_t bytes;  // bytes of each row
};

std::vector<Block> blocks_of(const Piece* pieces, std::int64_t count) {
  std::vector<Block> blocks;
  blocks.reserve(static_cast<std::size_t>(count));
  for (const Piece* piece = pieces; piece != pieces + count; ++piece) {
    if (piece->rows == 0 || piece->row_bytes == 0) continue;
    if (piece->row_bytes > kBlockBytes) {
      for (std::int64_t row = 0; row < piece->rows; ++row) {
        for (std::int64_t begin = 0; begin < piece->row_bytes; begin += kBlockBytes) {
          blocks.push_back({piece, row, 1, begin, std::min(kBlockBytes, piece->row_bytes - begin)});
        }
      }
      continue;
    }
    const std::int64_t step = kBlockBytes / piece->row_bytes;
    for (std::int64_t row = 0; row < piece->rows; row += step) {
      blocks.push_back({piece, row, std::min(step, piece->rows - row), 0, piece->row_bytes});
    }
  }
  return blocks;
}

// Calls copy(tensor, offset in storage, offset in buffer, bytes) for every run of a block.
template <typename Copy>
void for_each_run(const Block& block, Copy copy) {
  const Piece& piece = *block.piece;
  std::int64_t offset = piece.offset + block.row * piece.row_stride + block.begin;
  std::int64_t packed = piece.packed + block.row * piece.row_bytes + block.begin;
  if (piece.row_stride == piece.row_bytes) {  // rows without gaps are one run
    copy(piece.tensor, offset, packed, (block.rows - 1) * piece.row_bytes + block.bytes);
    return;
  }
  for (std::int64_t row = 0; row < block.rows; ++row) {
    copy(piece.tensor, offset, packed, block.bytes);
    offset += piece.row_stride;
    packed += piece.row_bytes;
  }
}

template <typename Copy>
void for_all_runs(const Piece* pieces, std::int64_t count, int threads, Copy copy) {
  const std::vector<Block> blocks = blocks_of(pieces, count);
  const std::int64_t total = static_cast<std::int64_t>(blocks.size());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && total > 1)
  for (std::int64_t index = 0; index < total; ++index) {
    for_each_run(blocks[static_cast<std::size_t>(index)], copy);
  }
}

std::uint64_t mix(std::uint64_t value) {
  value = (value ^ (value >> 32)) * 0xd6e8feb86659fd93ULL;
  value = (value ^ (value >> 32)) * 0xd6e8feb86659fd93ULL;
  return value ^ (value >> 32);
}

// Four lanes of multiply-and-add keep the multiplier busy; each lane is a polynomial in an odd
// constant, so that the place of a word counts.
std::uint64_t checksum_block(const std::byte* data, std::int64_t bytes) {
  constexpr std::uint64_t kFactor = 0x9e3779b97f4a7c15ULL;
  std::uint64_t lanes[4] = {1, 2, 3, 4};
  std::uint64_t words[4];
  std::int64_t at = 0;
  for (; at + 32 <= bytes; at += 32) {
    std::memcpy(words, data + at, 32);
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = (lanes[lane] ^ words[lane]) * kFactor;
    // Without this the highest bit of a word would never reach another bit.
    for (int lane = 0; lane < 4; ++lane) lanes[lane] ^= lanes[lane] >> 29;
  }
  if (at < bytes) {
    std::memset(words, 0, 32);
    std::memcpy(words, data + at, static_cast<std::size_t>(bytes - at));
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = (lanes[lane] ^ words[lane]) * kFactor;
  }
  std::uint64_t sum = static_cast<std::uint64_t>(bytes);
  for (const std::uint64_t lane : lanes) sum = mix(sum ^ lane) + kFactor;
  return sum;
}

}  // namespace

void pack(const Piece* pieces, std::int64_t count, const std::byte* const* bases, std::byte* buffer,
          int threads) {
  for_all_runs(pieces, count, threads,
               [=](std::int64_t tensor, std::int64_t offset, std::int64_t packed, std::int64_t bytes) {
                 std::memcpy(buffer + packed, bases[tensor] + offset, static_cast<std::size_t>(bytes));
               });
}

void unpack(const Piece* pieces, std::int64_t count, std::byte* const* bases, const std::byte* buffer,
            int threads) {
  for_all_runs(pieces, count, threads,
               [=](std::int64_t tensor, std::int64_t offset, std::int64_t packed, std::int64_t bytes) {
                 std::memcpy(bases[tensor] + offset, buffer + packed, static_cast<std::size_t>(bytes));
               });
}

std::uint64_t checksum(const std::byte* data, std::int64_t bytes, int threads) {
  const std::int64_t blocks = (bytes + kBlockBytes - 1) / kBlockBytes;
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(blocks));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && blocks > 1)
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t begin = block * kBlockBytes;
    sums[static_cast<std::size_t>(block)] =
        checksum_block(data + begin, std::min(kBlockBytes, bytes - begin));
  }
  std::uint64_t sum = mix(static_cast<std::uint64_t>(bytes));
  for (const std::uint64_t part : sums) sum = mix(sum ^ part) * 3;
  return sum;
}

}  // namespace realflow
