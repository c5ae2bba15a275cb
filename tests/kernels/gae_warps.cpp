// A warp of csrc/gae_warp.h as 32 threads in lockstep, for `test_gae_kernel.py`.
#include "gae_warp.h"

#include <array>
#include <barrier>
#include <thread>
#include <vector>

namespace {

struct Meeting {
  std::barrier<> all{realflow::kLanes};
  std::array<double, realflow::kLanes> numbers{};
  std::array<bool, realflow::kLanes> said{};
  int off = 0;  // how far beside the right thread each one listens: 0 but in a control
};

struct Warp {
  Meeting& meeting;
  int number;

  int lane() const { return number; }
  std::uint32_t ballot(bool own) const {
    meeting.said[static_cast<std::size_t>(number)] = own;
    meeting.all.arrive_and_wait();
    std::uint32_t bits = 0;
    for (int lane = 0; lane < realflow::kLanes; ++lane) {
      if (meeting.said[static_cast<std::size_t>(lane)]) bits |= 1u << lane;
    }
    meeting.all.arrive_and_wait();
    return bits;
  }
  double from(double own, int lane) const {
    meeting.numbers[static_cast<std::size_t>(number)] = own;
    meeting.all.arrive_and_wait();
    const double heard = meeting.numbers[static_cast<std::size_t>((lane + meeting.off) % realflow::kLanes)];
    meeting.all.arrive_and_wait();
    return heard;
  }
};

}  // namespace

extern "C" void gae_warps(const double* rewards, const double* values, const bool* mask,
                          const std::int64_t* bounds, const double* bootstrap, double* advantages,
                          double* returns, double gamma, double factor, std::int64_t samples, int off) {
  const realflow::Gae batch{rewards, values, mask, bounds, bootstrap, advantages, returns, gamma, factor};
  Meeting meeting;
  meeting.off = off;
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < realflow::kLanes; ++lane) {
    lanes.emplace_back([&batch, &meeting, samples, lane] {
      Warp warp{meeting, lane};
      for (std::int64_t sample = 0; sample < samples; ++sample) realflow::gae_sample(batch, sample, warp);
    });
  }
  for (std::thread& lane : lanes) lane.join();
}
