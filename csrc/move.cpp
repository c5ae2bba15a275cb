#include "move.h"

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define REALFLOW_AVX2 __attribute__((target("avx2")))
#endif

namespace realflow {
namespace {

// The unit of work of one thread: large enough to hide the cost of scheduling it.
constexpr std::int64_t kBlock = 256 * 1024;

// From here on stores go around the caches. Less than that is about to be read again by whoever
// sends it, and is better off in them.
constexpr std::int64_t kStreamedBytes = 8 * 1024 * 1024;
constexpr std::int64_t kStreamedRow = 256;

#if defined(__x86_64__)
constexpr bool kCanStream = true;

// How far ahead of the reading, in bytes of the block, its source is asked for. The processor's own
// prefetching follows neither a row to the next nor a page to the next.
constexpr std::int64_t kAhead = 8 * 1024;

// memcpy of one row whose stores go around the caches, so that no destination line is read first.
// The bytes kAhead later lie `near` bytes from it, from `turn` on `far` bytes. Both may leave the memory:
// asking for what is not there does nothing.
void stream_row(std::byte* to, const std::byte* from, std::int64_t bytes, std::int64_t near,
                std::int64_t far, std::int64_t turn) {
  const auto misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) & 63);
  const std::int64_t head = std::min((64 - misaligned) & 63, bytes);
  std::memcpy(to, from, static_cast<std::size_t>(head));
  const auto place = reinterpret_cast<std::uintptr_t>(from);
  std::int64_t at = head;
  for (; at + 64 <= bytes; at += 64) {
    const auto ahead = place + static_cast<std::uintptr_t>(at + (at < turn ? near : far));
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    const auto* line = reinterpret_cast<const __m128i*>(from + at);
    auto* out = reinterpret_cast<__m128i*>(to + at);
    const __m128i a = _mm_loadu_si128(line), b = _mm_loadu_si128(line + 1);
    const __m128i c = _mm_loadu_si128(line + 2), d = _mm_loadu_si128(line + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  std::memcpy(to + at, from + at, static_cast<std::size_t>(bytes - at));
}

void stream_end() { _mm_sfence(); }
bool wide_vectors() {
  static const bool found = __builtin_cpu_supports("avx2");
  return found;
}
#else
constexpr bool kCanStream = false;
constexpr std::int64_t kAhead = 0;
void stream_row(std::byte* to, const std::byte* from, std::int64_t bytes, std::int64_t, std::int64_t,
                std::int64_t) {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}
void stream_end() {}
bool wide_vectors() { return false; }
#endif

// Calls row(source, destination) for each row of a block.
template <typename Row>
inline __attribute__((always_inline)) void each_row(const Piece& piece, const Block& block,
                                                    const std::byte* source, std::byte* destination,
                                                    Row row) {
  std::int64_t group = block.row / piece.rows;
  std::int64_t index = block.row % piece.rows;
  source += piece.source_offset + block.begin * size_of(piece.source_kind);
  destination += piece.destination_offset + block.begin * size_of(piece.destination_kind);
  for (std::int64_t left = block.rows; left > 0; ++group, index = 0) {
    const std::byte* from = source + group * piece.source_group + index * piece.source_stride;
    std::byte* to = destination + group * piece.destination_group + index * piece.destination_stride;
    const std::int64_t here = std::min(left, piece.rows - index);
    for (std::int64_t i = 0; i < here; ++i) {
      row(from, to);
      from += piece.source_stride;
      to += piece.destination_stride;
    }
    left -= here;
  }
}

template <std::size_t Bytes>
void copy_elements(const Piece& piece, const Block& block, const std::byte* source, std::byte* destination) {
  each_row(piece, block, source, destination,
           [](const std::byte* from, std::byte* to) { std::memcpy(to, from, Bytes); });
}

void copy_block(const Piece& piece, const Block& block, const std::byte* source, std::byte* destination,
                bool streamed) {
  const std::int64_t bytes = block.length;
  if (streamed && bytes >= kStreamedRow) {
    const std::int64_t rows = kAhead / bytes;
    const std::int64_t rest = kAhead % bytes;
    const std::int64_t near = rows * piece.source_stride + rest;
    const std::int64_t far = near + piece.source_stride - bytes;
    each_row(piece, block, source, destination, [=](const std::byte* from, std::byte* to) {
      stream_row(to, from, bytes, near, far, bytes - rest);
    });
    stream_end();
    return;
  }
  switch (bytes) {  // what a transposed tensor has for rows
    case 1: return copy_elements<1>(piece, block, source, destination);
    case 2: return copy_elements<2>(piece, block, source, destination);
    case 4: return copy_elements<4>(piece, block, source, destination);
    case 8: return copy_elements<8>(piece, block, source, destination);
    case 16: return copy_elements<16>(piece, block, source, destination);
    default:
      each_row(piece, block, source, destination, [=](const std::byte* from, std::byte* to) {
        std::memcpy(to, from, static_cast<std::size_t>(bytes));
      });
  }
}

// Elements may lie at any byte of a buffer, so they are read and written as bytes.
template <typename From, typename To, bool Blended>
inline __attribute__((always_inline)) void number_rows(const Piece& piece, const Block& block,
                                                       const std::byte* source, std::byte* destination,
                                                       double decay) {
  each_row(piece, block, source, destination, [=](const std::byte* from, std::byte* to) {
    for (std::int64_t i = 0; i < block.length; ++i) {
      From value;
      To result;
      std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof(From)), sizeof(From));
      std::byte* place = to + i * static_cast<std::int64_t>(sizeof(To));
      if constexpr (Blended) {
        std::memcpy(&result, place, sizeof(To));
        blend(value, result, decay);
      } else {
        convert(value, result);
      }
      std::memcpy(place, &result, sizeof(To));
    }
  });
}

using NumberBlock = void (*)(const Piece&, const Block&, const std::byte*, std::byte*, double);

template <typename From, typename To, bool Blended>
void number_block(const Piece& piece, const Block& block, const std::byte* source, std::byte* destination,
                  double decay) {
  number_rows<From, To, Blended>(piece, block, source, destination, decay);
}

#if defined(__x86_64__)
template <typename From, typename To, bool Blended>
REALFLOW_AVX2 void number_block_avx2(const Piece& piece, const Block& block, const std::byte* source,
                                     std::byte* destination, double decay) {
  number_rows<From, To, Blended>(piece, block, source, destination, decay);
}
#endif

template <typename From, typename To, bool Blended>
NumberBlock chosen() {
#if defined(__x86_64__)
  if (wide_vectors()) return &number_block_avx2<From, To, Blended>;
#endif
  return &number_block<From, To, Blended>;
}

template <typename From, typename To>
NumberBlock chosen(bool blended) {
  return blended ? chosen<From, To, true>() : chosen<From, To, false>();
}

template <typename From>
NumberBlock chosen(std::int64_t to, bool blended) {
  if (to == kFloat64) return chosen<From, double>(blended);
  if (to == kFloat32) return chosen<From, float>(blended);
  return chosen<From, BFloat16>(blended);
}

NumberBlock chosen(std::int64_t from, std::int64_t to, bool blended) {
  if (from == kFloat64) return chosen<double>(to, blended);
  if (from == kFloat32) return chosen<float>(to, blended);
  return chosen<BFloat16>(to, blended);
}

struct Task {
  const Piece* piece;
  std::int64_t index;
};

std::uint64_t sum_of_terms(const std::byte* data, std::int64_t bytes, std::int64_t first_word) {
  std::uint64_t sum = 0;
  std::uint64_t word;
  std::int64_t at = 0;
  auto place = static_cast<std::uint64_t>(first_word);
  for (; at + 8 <= bytes; at += 8) {
    std::memcpy(&word, data + at, 8);
    sum += term(word, place++);
  }
  if (at < bytes) {
    word = 0;
    std::memcpy(&word, data + at, static_cast<std::size_t>(bytes - at));
    sum += term(word, place);
  }
  return sum;
}

}  // namespace

void move(const Piece* pieces, std::int64_t count, const std::byte* const* sources,
          std::byte* const* destinations, double decay, int threads) {
  std::vector<Task> tasks;
  std::int64_t copied = 0;
  for (const Piece* piece = pieces; piece != pieces + count; ++piece) {
    const std::int64_t blocks = blocks_in(*piece, kBlock);
    for (std::int64_t index = 0; index < blocks; ++index) tasks.push_back({piece, index});
    if (piece->source_kind == kBytes) copied += piece->groups * piece->rows * piece->row;
  }
  const bool streamed = kCanStream && copied >= kStreamedBytes;
  const auto total = static_cast<std::int64_t>(tasks.size());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && total > 1)
  for (std::int64_t at = 0; at < total; ++at) {
    const Task& task = tasks[static_cast<std::size_t>(at)];
    const Piece& piece = *task.piece;
    const Block block = block_at(piece, task.index, kBlock);
    const std::byte* source = sources[piece.source];
    std::byte* destination = destinations[piece.destination];
    if (piece.source_kind == kBytes) {
      copy_block(piece, block, source, destination, streamed);
    } else {
      chosen(piece.source_kind, piece.destination_kind, piece.blended != 0)(piece, block, source, destination,
                                                                            decay);
    }
  }
}

void checksums(const std::byte* buffer, const std::int64_t* bounds, std::int64_t count, std::uint64_t* sums,
               int threads) {
  for (std::int64_t range = 0; range < count; ++range) {
    const std::byte* data = buffer + bounds[range];
    const std::int64_t bytes = bounds[range + 1] - bounds[range];
    const std::int64_t blocks = (bytes + kBlock - 1) / kBlock;
    std::uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum) if (threads > 1 && blocks > 1)
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t begin = block * kBlock;
      sum += sum_of_terms(data + begin, std::min(kBlock, bytes - begin), begin / 8);
    }
    sums[range] = finished(sum, bytes);
  }
}

}  // namespace realflow
