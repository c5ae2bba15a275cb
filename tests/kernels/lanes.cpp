// The GPU's functions of csrc/lanes.h with every thread in turn but `skipped`, for `test_kernels.py`.
#include "lanes.h"

extern "C" void lanes_move(const realflow::Piece* pieces, std::int64_t count, const std::byte* source,
                           std::byte* destination, double decay, std::int64_t limit, std::uint32_t lanes,
                           std::uint32_t skipped) {
  for (std::int64_t at = 0; at < count; ++at) {
    const std::int64_t blocks = realflow::blocks_in(pieces[at], limit);
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::uint32_t lane = lanes; lane-- > 0;) {  // in another order than the elements'
        if (lane == skipped) continue;
        realflow::move_lane(pieces[at], block, limit, source, destination, decay, lane, lanes);
      }
    }
  }
}

extern "C" std::uint64_t lanes_checksum(const std::byte* data, std::int64_t bytes, std::uint32_t lanes) {
  std::uint64_t sum = 0;
  for (std::uint32_t lane = 0; lane < lanes; ++lane) {
    sum += realflow::checksum_lane(data, bytes, 0, (bytes + 7) / 8, lane, lanes);
  }
  return realflow::finished(sum, bytes);
}
