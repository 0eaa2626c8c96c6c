// What few rows need of a CPU: products with a weight, and attention over a cache. Both take as long as the weight or the
// cache takes to read, where nothing packs it first and nothing waits for it. So every kernel here walks once through
// what is large, where and in the order it lies, asks for what comes next (prefetch), and keeps the rows near. Products
// of more than 16 rows are bound by arithmetic: they pack a piece of the weight at a time and keep sums in registers.
// A weight may be bfloat16, which takes half as long to read; it is widened where it is used, and sums are the same.
//
// Work is cut into parts by shapes alone, each part sums up in one sequence, and parts are added in theirs: no result
// depends on threads, and none of a product with an unturned weight on how many rows there are.
//
// Compiled by domino_jax/ops/cpu_kernels.py on the machine it runs on; the interface is XLA's FFI (jax.ffi).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // rows whose sums stay in registers, with the weight's numbers beside them
constexpr int kDotRows = 8, kDotColumns = 3;  // the same of a few rows and a turned weight, and as many of its rows
#else
constexpr int kLanes = 8;
constexpr int kTileRows = 6;
constexpr int kDotRows = 4, kDotColumns = 3;
#endif
constexpr int kVectors = 2;  // sums of a row that stay in registers for one step
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int kMaxRows = 16;              // rows of one walk through the weight
constexpr int kNarrow = 8;                // rows that share one vector in products with turned weights
constexpr int kMaxDotRows = 12;           // rows whose lanes are contracted numbers there
constexpr int kUnroll = 4;                // the weight's rows of one step
constexpr int64_t kAhead = 3;             // steps that are asked for in advance
constexpr int64_t kPartRows = 128;        // contracted rows of a part, at least
constexpr int64_t kMaxParts = 16;         // each has sums of its own; a power of two, for as many threads
constexpr int64_t kShareColumns = 256;    // columns of a thread's share, at least: long pieces of the weight's rows
constexpr int64_t kSharesPerThread = 4;   // of products of many rows: a thread that begins late has less to do
constexpr int64_t kMaxSums = 1 << 22;     // sums in all parts
constexpr int64_t kTurnedPart = 1 << 16;  // numbers of a part of a turned weight
constexpr int64_t kShared = 1 << 14;      // numbers of a weight that are worth a second thread
constexpr int64_t kTakenColumns = 64;     // columns of a table that are taken at a time
constexpr int64_t kChunk = 256;           // positions that are attended to at a time
constexpr float kSmallest = -126.0f;      // exponents below it are taken for 0

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));

// A bfloat16 number: the upper half of the float32 that it is, so that widening it is exact.
struct BFloat16 {
  uint16_t bits;
};

template <typename Number>
constexpr int64_t kNumberBytes = sizeof(Number);

inline Lanes load(const float* numbers) { return *reinterpret_cast<const Lanes*>(numbers); }

inline Lanes load(const BFloat16* numbers) {
  return reinterpret_cast<Lanes>(__builtin_convertvector(*reinterpret_cast<const Halves*>(numbers), Words) << 16);
}

inline void widen(const float* from, int64_t size, float* to) { std::memcpy(to, from, size * sizeof(float)); }

inline void widen(const BFloat16* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) *reinterpret_cast<Lanes*>(to + i) = load(from + i);
  for (; i < size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

// Runs work(0) ... work(num_parts - 1) on this thread and on those of the pool that are free. A part is waited for only
// once a thread has begun it, so threads that never come are no loss.
template <typename Work>
void run_parts(ffi::ThreadPool& pool, int64_t num_parts, bool is_shared, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> num_done{0};
  };
  auto state = std::make_shared<State>();
  auto claim = [state, num_parts, &work] {  // `work` lives until every part that was claimed is done
    for (int64_t part; (part = state->next.fetch_add(1)) < num_parts;) {
      work(part);
      state->num_done.fetch_add(1, std::memory_order_release);
    }
  };
  if (is_shared) {
    int64_t num_helpers = std::min(pool.num_threads(), num_parts) - 1;
    for (int64_t i = 0; i < num_helpers; ++i) pool.Schedule(decltype(claim)(claim));
  }
  claim();
  for (int spins = 0; state->num_done.load(std::memory_order_acquire) < num_parts; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

// Numbers of a row that vectors hold whole; at least one vector.
inline int64_t fill_up(int64_t size) { return std::max<int64_t>(1, (size + kLanes - 1) / kLanes) * kLanes; }

// Scratch memory of a thread, of a call and of the parts that the thread runs meanwhile.
enum Use { kCall, kPart };
float* get_scratch(Use use, int64_t size) {
  thread_local std::vector<float> memories[2];
  const size_t needed = size + kLine / sizeof(float);
  if (memories[use].size() < needed) memories[use].resize(needed);
  const auto address = reinterpret_cast<uintptr_t>(memories[use].data());
  // Vectors at addresses that are no multiple of theirs take two accesses.
  return reinterpret_cast<float*>((address + kLine - 1) & ~uintptr_t{kLine - 1});
}

// sums += x[:, :U] @ weight[:U, :num_out] for R rows. Sums lie as [blocks, R, kBlock]: one stream, whatever the strides.
template <int R, int U, typename Number>
void add_step(const float* x, int64_t x_stride, const Number* weight, int64_t weight_stride, int64_t num_out,
              float* sums) {
  float factors[R][U];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) factors[r][u] = x[r * x_stride + u];
  Lanes w[U][kVectors];
  auto add = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, sums += kBlock) {
      Lanes* places = reinterpret_cast<Lanes*>(sums);
      Lanes sum[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] = places[v];
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[v] += w[u][v] * factors[r][u];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) places[v] = sum[v];
    }
  };
  int64_t o = 0;
  for (; o + kBlock <= num_out; o += kBlock) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const Number* row = weight + u * weight_stride + o;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[u][v] = load(row + v * kLanes);
        if (v * kLanes * kNumberBytes<Number> % kLine == 0)
          __builtin_prefetch(row + kAhead * U * weight_stride + v * kLanes, 0, 2);
      }
    }
    add();
  }
  if (o == num_out) return;
  for (int u = 0; u < U; ++u) {
    std::memset(w[u], 0, sizeof(w[u]));
    widen(weight + u * weight_stride + o, num_out - o, reinterpret_cast<float*>(w[u]));
  }
  add();
}

template <typename Number>
using AddStep = void (*)(const float*, int64_t, const Number*, int64_t, int64_t, float*);

template <int U, typename Number, int... R>
AddStep<Number> choose(int64_t num_rows, std::integer_sequence<int, R...>) {
  static constexpr AddStep<Number> steps[] = {add_step<R + 1, U, Number>...};
  return steps[num_rows - 1];
}

template <int U, typename Number>
AddStep<Number> choose(int64_t num_rows) {
  return choose<U, Number>(num_rows, std::make_integer_sequence<int, kMaxRows>());
}

// The parts that the contracted numbers of a product are summed up in, whatever its rows.
struct Parts {
  int64_t num_in, number = 1;

  Parts(int64_t num_in, int64_t num_out) : num_in(num_in) {
    const int64_t max_sums = kMaxSums / (2 * kMaxRows) / num_out;
    while (2 * number <= std::min({num_in / kPartRows, kMaxParts, max_sums})) number *= 2;
  }

  int64_t begin(int64_t part) const {
    return std::min(num_in, (num_in + kUnroll - 1) / kUnroll * part / number * kUnroll);
  }
};

// out = x @ weight for at most kMaxRows rows, which take no longer than the weight takes to read: it is walked through in
// the order it lies.
template <typename Number>
void multiply_few(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t num_in, const Number* weight,
                  int64_t num_out, float* out) {
  const Parts parts(num_in, num_out);
  const int64_t num_parts = parts.number;
  const int64_t num_blocks = (num_out + kBlock - 1) / kBlock;
  const int64_t size = num_rows * num_blocks * kBlock;
  float* const sums = get_scratch(kCall, num_parts * size);
  const auto step = choose<kUnroll, Number>(num_rows), one = choose<1, Number>(num_rows);
  // Where there are more threads than parts they share the columns of a part.
  const int64_t max_shares = std::max<int64_t>(1, num_out / kShareColumns);
  const int64_t num_shares = std::clamp<int64_t>(pool.num_threads() / num_parts, 1, max_shares);
  run_parts(pool, num_parts * num_shares, num_in * num_out >= kShared, [=](int64_t task) {
    const int64_t part = task / num_shares, share = task % num_shares;
    const int64_t last = parts.begin(part + 1);
    const int64_t first_block = num_blocks * share / num_shares, last_block = num_blocks * (share + 1) / num_shares;
    const int64_t column = first_block * kBlock, width = std::min(num_out, last_block * kBlock) - column;
    float* const own = sums + part * size + column * num_rows;
    std::memset(own, 0, (last_block - first_block) * kBlock * num_rows * sizeof(float));
    int64_t i = parts.begin(part);
    for (; i + kUnroll <= last; i += kUnroll) step(x + i, num_in, weight + i * num_out + column, num_out, width, own);
    for (; i < last; ++i) one(x + i, num_in, weight + i * num_out + column, num_out, width, own);
  });
  for (int64_t row = 0; row < num_rows; ++row, out += num_out) {
    const float* own = sums + row * kBlock;
    for (int64_t o = 0; o < num_out; o += kBlock, own += num_rows * kBlock) {
      Lanes sum[kVectors] = {};
      for (int64_t part = 0; part < num_parts; ++part)
        for (int v = 0; v < kVectors; ++v) sum[v] += reinterpret_cast<const Lanes*>(own + part * size)[v];
      std::memcpy(out + o, sum, std::min(kBlock, num_out - o) * sizeof(float));
    }
  }
}

// What a tile of many rows is multiplied with, and where its sums go.
struct Piece {
  int64_t num_in, depth, num_out;
  const float* packed;  // the weight's numbers, [depth, kBlock]
  const void* ahead;    // is asked for meanwhile, so many bytes further for every row of the weight
  int64_t ahead_bytes;
  bool is_first;  // of the parts: sums begin with it
};

// out (+)= x[:, :depth] @ packed for R rows, whose sums stay in registers.
template <int R>
void multiply_tile(const Piece& piece, const float* x, float* out) {
  Lanes sums[R][kVectors] = {};
  const Lanes* w = reinterpret_cast<const Lanes*>(piece.packed);
  const char* ahead = static_cast<const char*>(piece.ahead);
  for (int64_t i = 0; i < piece.depth; ++i, w += kVectors, ahead += piece.ahead_bytes) {
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float factor = x[r * piece.num_in + i];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += w[v] * factor;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Lanes& place = reinterpret_cast<Lanes*>(out + r * piece.num_out)[v];
      place = piece.is_first ? sums[r][v] : place + sums[r][v];
    }
}

using MultiplyTile = void (*)(const Piece&, const float*, float*);

template <int... R>
MultiplyTile choose_tile(int64_t num_rows, std::integer_sequence<int, R...>) {
  static constexpr MultiplyTile tiles[] = {multiply_tile<R + 1>...};
  return tiles[num_rows - 1];
}

// out = x @ weight for more rows, whose sums would not stay near: a panel of columns at a time, which threads share, a
// piece of it at a time, packed, and of that as many rows as registers hold. Meanwhile the next piece comes.
template <typename Number>
void multiply_many(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t num_in, const Number* weight,
                   int64_t num_out, float* out) {
  const Parts parts(num_in, num_out);
  int64_t longest = 0;
  for (int64_t part = 0; part < parts.number; ++part)
    longest = std::max(longest, parts.begin(part + 1) - parts.begin(part));
  const int64_t num_panels = (num_out + kBlock - 1) / kBlock;
  const int64_t num_shares = std::min<int64_t>(num_panels, kSharesPerThread * pool.num_threads());
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  run_parts(pool, num_shares, num_in * num_out >= kShared, [=](int64_t share) {
    float* const packed = get_scratch(kPart, (longest + num_rows) * kBlock);
    float* const rest = packed + longest * kBlock;  // sums of the last columns, which fill no panel
    for (int64_t panel = num_panels * share / num_shares; panel < num_panels * (share + 1) / num_shares; ++panel) {
      const int64_t column = panel * kBlock, width = std::min(kBlock, num_out - column);
      float* const sums = width < kBlock ? rest : out + column;
      const int64_t stride = width < kBlock ? kBlock : num_out;
      for (int64_t part = 0; part < parts.number; ++part) {
        const int64_t first = parts.begin(part), depth = parts.begin(part + 1) - first;
        const Number* from = weight + first * num_out + column;
        for (int64_t i = 0; i < depth; ++i) {
          if (width < kBlock) std::memset(packed + i * kBlock, 0, kBlock * sizeof(float));
          widen(from + i * num_out, width, packed + i * kBlock);
        }
        const bool is_last = part + 1 == parts.number;
        const Number* next = is_last ? weight + std::min(column + kBlock, num_out - 1) : from + depth * num_out;
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
          const int64_t row = num_rows * tile / num_tiles;
          constexpr int64_t kNumbers = kLine / kNumberBytes<Number>;
          const bool is_asking = tile < kBlock / kNumbers;  // each for another line of the rows
          const void* const ahead = is_asking ? static_cast<const void*>(next + tile * kNumbers) : x;
          const Piece piece = {num_in, depth, stride, packed, ahead, is_asking ? num_out * kNumberBytes<Number> : 0,
                               part == 0};
          choose_tile(num_rows * (tile + 1) / num_tiles - row, std::make_integer_sequence<int, kTileRows>())(
              piece, x + row * num_in + first, sums + row * stride);
        }
      }
      if (width < kBlock)
        for (int64_t row = 0; row < num_rows; ++row)
          std::memcpy(out + row * num_out + column, rest + row * kBlock, width * sizeof(float));
    }
  });
}

bool is_known(const ffi::AnyBuffer& weight) {
  return weight.element_type() == ffi::F32 || weight.element_type() == ffi::BF16;
}

template <typename Number>
void multiply(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t num_in, const void* weight,
              int64_t num_out, float* out) {
  const auto multiply = num_rows <= kMaxRows ? multiply_few<Number> : multiply_many<Number>;
  multiply(pool, x, num_rows, num_in, static_cast<const Number*>(weight), num_out, out);
}

ffi::Error multiply_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight,
                         ffi::ResultBuffer<ffi::F32> out) {
  if (weight.dimensions().size() != 2 || weight.dimensions()[0] != x.dimensions()[1])
    return ffi::Error::InvalidArgument("x [rows, in] and weight [in, out] differ");
  const int64_t num_rows = x.dimensions()[0], num_in = x.dimensions()[1], num_out = weight.dimensions()[1];
  if (!is_known(weight)) return ffi::Error::InvalidArgument("weight is neither float32 nor bfloat16");
  if (num_rows * num_out == 0) return ffi::Error::Success();
  const auto run = weight.element_type() == ffi::F32 ? multiply<float> : multiply<BFloat16>;
  run(pool, x.typed_data(), num_rows, num_in, weight.untyped_data(), num_out, out->typed_data());
  return ffi::Error::Success();
}

// Up to W * V rows of x for products with a turned weight, packed as [in, W * V]: every lane is a row, and one number of
// the weight is multiplied with all of them. The sums lie alike.
struct Columns {
  int64_t num_rows, num_in, num_out;
  const float* packed;
  const char* ahead;  // is asked for meanwhile: rows of so many bytes, a line whenever i & mask is 0, so many bytes an i
  int64_t ahead_bytes, mask, number_bytes;
};

// out[:, :N] = x @ weight[:N, :].T
template <int W, int V, int N>
void dot_rows(const Columns& columns, const float* weight, float* out) {
  typedef float Rows __attribute__((vector_size(W * sizeof(float)), aligned(sizeof(float)), may_alias));
  Rows sums[V][N] = {};
  const Rows* x = reinterpret_cast<const Rows*>(columns.packed);
  for (int64_t i = 0; i < columns.num_in; ++i, x += V) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const float number = weight[n * columns.num_in + i];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[v][n] += x[v] * number;
    }
    if ((i & columns.mask) == 0)
      for (int n = 0; n < N; ++n)
        __builtin_prefetch(columns.ahead + n * columns.ahead_bytes + i * columns.number_bytes, 0, 2);
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v)
    for (int64_t r = 0; r < std::min<int64_t>(W, columns.num_rows - v * W); ++r)
      for (int n = 0; n < N; ++n) out[(v * W + r) * columns.num_out + n] = sums[v][n][r];
}

// What all parts of a product with a turned weight share.
template <typename Number>
struct Turned {
  int64_t num_rows, num_in, num_out;
  const float* packed;  // [groups, in, W * V]
  const Number* weight;
  float* out;
};

// out[:, v : v + N], group by group of rows; numbers of another type are widened once for all of them.
template <int W, int V, int N, typename Number>
void dot_tile(const Turned<Number>& turned, int64_t v) {
  const int64_t num_in = turned.num_in, row_bytes = num_in * kNumberBytes<Number>;
  const Number* const tile = turned.weight + v * num_in;
  const float* numbers;
  if constexpr (std::is_same_v<Number, float>) {
    numbers = tile;
  } else {
    float* const wide = get_scratch(kPart, N * num_in);
    widen(tile, N * num_in, wide);
    numbers = wide;
  }
  for (int64_t row = 0; row < turned.num_rows; row += W * V) {
    const int64_t mask = row == 0 ? kLine / kNumberBytes<Number> - 1 : -1;  // the first group asks for the next tile
    const Columns columns = {std::min<int64_t>(W * V, turned.num_rows - row), num_in, turned.num_out,
                             turned.packed + row * num_in, reinterpret_cast<const char*>(tile + N * num_in), row_bytes,
                             mask, kNumberBytes<Number>};
    dot_rows<W, V, N>(columns, numbers, turned.out + row * turned.num_out + v);
  }
}

// out[:, first : last], tile by tile; a last tile that is not full begins sooner.
template <int W, int V, typename Number>
void dot_part(const Turned<Number>& turned, int64_t first, int64_t last) {
  constexpr int kTile = V == 1 ? 8 : 6;  // as many sums as there are registers
  if (last - first < kTile) {
    for (int64_t v = first; v < last; ++v) dot_tile<W, V, 1>(turned, v);
  } else {
    for (int64_t v = first; v < last; v += kTile) dot_tile<W, V, kTile>(turned, std::min(v, last - kTile));
  }
}

template <typename Number>
void multiply_turned(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t num_in, const Number* weight,
                     int64_t num_out, float* out) {
  const bool is_narrow = num_rows <= kNarrow;
  const int64_t width = is_narrow ? kNarrow : kMaxRows, num_groups = (num_rows + width - 1) / width;
  float* const packed = get_scratch(kCall, num_groups * num_in * width);
  std::memset(packed, 0, num_groups * num_in * width * sizeof(float));
  for (int64_t row = 0; row < num_rows; ++row)
    for (int64_t i = 0; i < num_in; ++i) packed[(row / width * num_in + i) * width + row % width] = x[row * num_in + i];
  const Turned<Number> turned = {num_rows, num_in, num_out, packed, weight, out};
  const auto dot = is_narrow ? dot_part<kNarrow, 1, Number> : dot_part<kLanes, kMaxRows / kLanes, Number>;
  const int64_t num_parts = std::max<int64_t>(1, num_in * num_out / kTurnedPart);
  run_parts(pool, num_parts, num_in * num_out >= kShared, [=](int64_t part) {
    dot(turned, num_out * part / num_parts, num_out * (part + 1) / num_parts);
  });
}

#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Words{__VA_ARGS__})
#endif

// Of every four lanes (0 1 2 3) of x and y: x0 + x2, y0 + y2, x1 + x3, y1 + y3.
inline Lanes add_halves(Lanes x, Lanes y) {
#ifdef __AVX512F__
  return SHUFFLE(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
         SHUFFLE(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#else
  return SHUFFLE(x, y, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
#endif
}

// Of every four lanes of x and y: x0 + x2, x1 + x3, y0 + y2, y1 + y3.
inline Lanes add_pairs(Lanes x, Lanes y) {
#ifdef __AVX512F__
  return SHUFFLE(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SHUFFLE(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#else
  return SHUFFLE(x, y, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
#endif
}

typedef float Four __attribute__((vector_size(4 * sizeof(float)), aligned(sizeof(float)), may_alias));

// The sums of four vectors' numbers.
inline Four sum_up(Lanes x, Lanes y, Lanes z, Lanes w) {
  const Lanes all = add_pairs(add_halves(x, y), add_halves(z, w));
  Four parts[kLanes / 4];
  std::memcpy(parts, &all, sizeof(all));
#pragma GCC unroll 2
  for (int half = kLanes / 8; half > 0; half /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

// out[:R, :N] = x[:R] @ weight[:N].T, a vector of the contracted numbers at a time; `ahead` is asked for meanwhile. Rows of
// x begin at multiples of a line, and zeros fill their last vector.
template <int R, int N, typename Number>
void dot_few(const float* x, const Number* weight, int64_t num_in, const Number* ahead, float* out, int64_t num_out) {
  const int64_t stride = fill_up(num_in), num_whole = num_in / kLanes * kLanes;
  Lanes sums[R][N] = {};
  auto add = [&](const float* rows, const Number* w, int64_t w_stride) {
    Lanes numbers[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) numbers[n] = load(w + n * w_stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Lanes row = load(rows + r * stride);
#ifdef __AVX512F__
      __asm__("" : "+v"(row));  // else it is read again for every product
#endif
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] += row * numbers[n];
    }
  };
  if (num_whole < num_in) {
    Number rest[N * kLanes] = {};
    for (int n = 0; n < N; ++n)
      std::memcpy(rest + n * kLanes, weight + n * num_in + num_whole, (num_in - num_whole) * sizeof(Number));
    add(x + num_whole, rest, kLanes);
  }
  for (int64_t i = 0; i < num_whole; i += kLanes) {
    if (i % (kLine / kNumberBytes<Number>) == 0)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(ahead + n * num_in + i, 0, 2);
    add(x + i, weight + i, num_in);
  }
#pragma GCC unroll 8
  for (int first = 0; first < R * N; first += 4) {
    auto get = [&](int i) { return first + i < R * N ? sums[(first + i) / N][(first + i) % N] : Lanes{}; };
    const Four four = sum_up(get(0), get(1), get(2), get(3));
    for (int i = first; i < std::min(first + 4, R * N); ++i) out[i / N * num_out + i % N] = four[i - first];
  }
}

template <typename Number>
using DotFew = void (*)(const float*, const Number*, int64_t, const Number*, float*, int64_t);

template <int N, typename Number, int... R>
DotFew<Number> choose_dot_few(int64_t num_rows, std::integer_sequence<int, R...>) {
  static constexpr DotFew<Number> dots[] = {dot_few<R + 1, N, Number>...};
  return dots[num_rows - 1];
}

// The same for a few rows, of which many lanes would be empty: lanes are contracted numbers, to be summed up at the end.
// Where the weight takes longer to read than either takes to multiply, as float32 does, nothing is won.
template <typename Number>
void multiply_turned_few(ffi::ThreadPool& pool, const float* x, int64_t num_rows, int64_t num_in, const Number* weight,
                         int64_t num_out, float* out) {
  const int64_t num_parts = std::max<int64_t>(1, num_in * num_out / kTurnedPart);
  const int64_t num_groups = (num_rows + kDotRows - 1) / kDotRows, stride = fill_up(num_in);
  float* const rows = get_scratch(kCall, num_rows * stride);
  for (int64_t row = 0; row < num_rows; ++row) {
    std::memset(rows + (row + 1) * stride - kLanes, 0, kLanes * sizeof(float));
    std::memcpy(rows + row * stride, x + row * num_in, num_in * sizeof(float));
  }
  run_parts(pool, num_parts, num_in * num_out >= kShared, [=](int64_t part) {
    const int64_t first = num_out * part / num_parts, last = num_out * (part + 1) / num_parts;
    auto multiply = [&](int64_t v, auto width) {
      constexpr int N = decltype(width)::value;
      const Number* const tile = weight + v * num_in;
      for (int64_t group = 0; group < num_groups; ++group) {
        const int64_t row = num_rows * group / num_groups, end = num_rows * (group + 1) / num_groups;
        choose_dot_few<N, Number>(end - row, std::make_integer_sequence<int, kDotRows>())(
            rows + row * stride, tile, num_in, group == 0 ? tile + N * num_in : tile, out + row * num_out + v, num_out);
      }
    };
    int64_t v = first;
    for (; v + kDotColumns <= last; v += kDotColumns) multiply(v, std::integral_constant<int, kDotColumns>());
    for (; v < last; ++v) multiply(v, std::integral_constant<int, 1>());
  });
}

ffi::Error multiply_turned_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight,
                                ffi::ResultBuffer<ffi::F32> out) {
  if (weight.dimensions().size() != 2 || weight.dimensions()[1] != x.dimensions()[1])
    return ffi::Error::InvalidArgument("x [rows, in] and weight [out, in] differ");
  if (!is_known(weight)) return ffi::Error::InvalidArgument("weight is neither float32 nor bfloat16");
  const int64_t num_rows = x.dimensions()[0], num_in = x.dimensions()[1], num_out = weight.dimensions()[0];
  if (weight.element_type() == ffi::F32) {
    const auto* numbers = static_cast<const float*>(weight.untyped_data());
    multiply_turned(pool, x.typed_data(), num_rows, num_in, numbers, num_out, out->typed_data());
  } else {
    const auto* numbers = static_cast<const BFloat16*>(weight.untyped_data());
    const auto run = num_rows <= kMaxDotRows ? multiply_turned_few<BFloat16> : multiply_turned<BFloat16>;
    run(pool, x.typed_data(), num_rows, num_in, numbers, num_out, out->typed_data());
  }
  return ffi::Error::Success();
}

// Rows of a table, widened; ids outside of it are those of its ends.
ffi::Error take_rows(ffi::Buffer<ffi::BF16> table, ffi::Buffer<ffi::S32> ids, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t num_rows = table.dimensions()[0], width = table.dimensions()[1];
  if (num_rows == 0) return ffi::Error::InvalidArgument("the table [rows, width] has no rows");
  const auto* const numbers = static_cast<const BFloat16*>(table.untyped_data());
  const int64_t num_ids = ids.element_count();
  for (int64_t i = 0; i < num_ids; ++i) {
    const int64_t row = std::clamp<int64_t>(ids.typed_data()[i], 0, num_rows - 1);
    widen(numbers + row * width, width, out->typed_data() + i * width);
  }
  return ffi::Error::Success();
}

// Columns of a table, widened, as rows; ids as above.
ffi::Error take_columns(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> table, ffi::Buffer<ffi::S32> ids,
                        ffi::ResultBuffer<ffi::F32> out) {
  const int64_t height = table.dimensions()[0], num_columns = table.dimensions()[1], num_ids = ids.element_count();
  if (num_columns == 0) return ffi::Error::InvalidArgument("the table [height, columns] has no columns");
  const auto* const numbers = static_cast<const BFloat16*>(table.untyped_data());
  const int64_t num_parts = (num_ids + kTakenColumns - 1) / kTakenColumns;
  run_parts(pool, num_parts, height * num_ids >= kShared, [&](int64_t part) {
    const int64_t last = std::min(num_ids, (part + 1) * kTakenColumns);
    for (int64_t h = 0; h < height; ++h)
      for (int64_t i = part * kTakenColumns; i < last; ++i) {
        const int64_t column = std::clamp<int64_t>(ids.typed_data()[i], 0, num_columns - 1);
        widen(numbers + h * num_columns + column, 1, out->typed_data() + i * height + h);
      }
  });
  return ffi::Error::Success();
}

// 2^x for x <= 0 that is above the smallest exponent: the series of its fraction, then its whole part as an exponent.
Lanes exp2(Lanes x) {
  typedef int32_t Whole __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(sizeof(float)), may_alias));
  const float to_whole = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const Lanes shifted = x + to_whole;
  const Lanes f = x - (shifted - to_whole);
  Lanes sum = f * 1.5252733804e-5f + 1.5403530393e-4f;
  sum = sum * f + 1.3333558146e-3f;
  sum = sum * f + 9.6181291076e-3f;
  sum = sum * f + 5.5504108665e-2f;
  sum = sum * f + 2.4022650696e-1f;
  sum = sum * f + 6.9314718056e-1f;
  sum = sum * f + 1.0f;
  return reinterpret_cast<Lanes>(reinterpret_cast<Whole>(sum) + (reinterpret_cast<Whole>(shifted) << 23));
}

// Attention of at most kMaxRows queries [R, H] of one key/value head, row r over the first limits[r] positions of keys
// [H, S] and values [S, H]; positions are read a chunk at a time, and what was summed up is scaled as maxima grow.
struct Rows {
  int64_t num_rows, head_dim, num_positions;
  const float *queries, *keys, *values;  // queries scaled by log2(e) / sqrt(H)
  int64_t limits[kMaxRows];
  float* out[kMaxRows];
};

void attend_part(const Rows& rows, float* scratch) {
  const int64_t num_rows = rows.num_rows, head_dim = rows.head_dim;
  const int64_t num_blocks = (head_dim + kBlock - 1) / kBlock;
  float* const scores = scratch;  // [blocks, R, kBlock], then weights
  float* const mixed = scores + kChunk * num_rows;
  std::memset(mixed, 0, num_blocks * kBlock * num_rows * sizeof(float));
  float largest[kMaxRows], total[kMaxRows] = {};
  std::fill(largest, largest + kMaxRows, -INFINITY);
  const int64_t length = *std::max_element(rows.limits, rows.limits + num_rows);
  const auto step = choose<kUnroll, float>(num_rows), one = choose<1, float>(num_rows);
  for (int64_t first = 0; first < length; first += kChunk) {
    const int64_t width = std::min(kChunk, length - first), num_score_blocks = (width + kBlock - 1) / kBlock;
    std::memset(scores, 0, num_score_blocks * kBlock * num_rows * sizeof(float));
    int64_t h = 0;
    for (; h + kUnroll <= head_dim; h += kUnroll)
      step(rows.queries + h, head_dim, rows.keys + h * rows.num_positions + first, rows.num_positions, width, scores);
    for (; h < head_dim; ++h)
      one(rows.queries + h, head_dim, rows.keys + h * rows.num_positions + first, rows.num_positions, width, scores);
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t seen = std::min(rows.limits[r] - first, width);  // may be none
      float* const own = scores + r * kBlock;
      auto place = [&](int64_t s) -> float& { return own[s / kBlock * num_rows * kBlock + s % kBlock]; };
      for (int64_t s = std::max<int64_t>(seen, 0); s < num_score_blocks * kBlock; ++s) place(s) = -INFINITY;
      if (seen <= 0) {
        for (int64_t s = 0; s < num_score_blocks * kBlock; ++s) place(s) = 0.0f;
        continue;
      }
      Lanes most = Lanes{} - INFINITY;
      for (int64_t s = 0; s < num_score_blocks * kBlock; s += kLanes) {
        const Lanes here = *reinterpret_cast<Lanes*>(&place(s));
        most = here > most ? here : most;
      }
      float now = largest[r];
      for (int lane = 0; lane < kLanes; ++lane) now = std::max(now, most[lane]);
      const float scale = std::exp2(largest[r] - now);
      Lanes sum = {};
      for (int64_t s = 0; s < num_score_blocks * kBlock; s += kLanes) {
        Lanes* here = reinterpret_cast<Lanes*>(&place(s));
        const Lanes x = *here - now;
        *here = x != x ? x : x > kSmallest ? exp2(x) : Lanes{};  // what is no number must not look like one
        sum += *here;
      }
      total[r] *= scale;
      for (int lane = 0; lane < kLanes; ++lane) total[r] += sum[lane];
      largest[r] = now;
      if (scale != 1.0f)
        for (int64_t block = 0; block < num_blocks; ++block)
          for (int64_t o = 0; o < kBlock; ++o) mixed[(block * num_rows + r) * kBlock + o] *= scale;
    }
    const float* values = rows.values + first * head_dim;
    int64_t s = 0;
    for (; s + kUnroll <= width; s += kUnroll)
      step(scores + s / kBlock * num_rows * kBlock + s % kBlock, kBlock, values + s * head_dim, head_dim, head_dim, mixed);
    for (; s < width; ++s)
      one(scores + s / kBlock * num_rows * kBlock + s % kBlock, kBlock, values + s * head_dim, head_dim, head_dim, mixed);
  }
  for (int64_t r = 0; r < num_rows; ++r)
    for (int64_t o = 0; o < head_dim; ++o)
      rows.out[r][o] = mixed[(o / kBlock * num_rows + r) * kBlock + o % kBlock] / total[r];
}

ffi::Error attend_cached(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries, ffi::Buffer<ffi::F32> keys,
                         ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::S32> start, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t batch = queries.dimensions()[0], num_tokens = queries.dimensions()[1];
  const int64_t num_heads = queries.dimensions()[2], head_dim = queries.dimensions()[3];
  const int64_t num_kv = keys.dimensions()[1], num_positions = keys.dimensions()[3];
  auto fits = [](auto dimensions, std::initializer_list<int64_t> expected) {
    return std::equal(dimensions.begin(), dimensions.end(), expected.begin(), expected.end());
  };
  if (num_kv == 0 || num_heads % num_kv != 0 || num_positions == 0 ||
      !fits(keys.dimensions(), {batch, num_kv, head_dim, num_positions}) ||
      !fits(values.dimensions(), {batch, num_kv, num_positions, head_dim}) || !fits(start.dimensions(), {batch})) {
    return ffi::Error::InvalidArgument("queries [B, T, N, H], keys [B, K, H, S], values [B, K, S, H] and start [B] differ");
  }
  const int64_t num_groups = num_heads / num_kv, all = num_groups * num_tokens;
  const int64_t num_parts = (all + kMaxRows - 1) / kMaxRows;
  const float factor = 1.44269504089f / std::sqrt(static_cast<float>(head_dim));
  int64_t read = 0;
  for (int64_t b = 0; b < batch; ++b) read += (start.typed_data()[b] + num_tokens) * num_kv * head_dim;
  run_parts(pool, batch * num_kv * num_parts, read * num_parts >= kShared, [&](int64_t part) {
    const int64_t b = part / (num_kv * num_parts), k = part / num_parts % num_kv, row = part % num_parts * kMaxRows;
    Rows rows;
    rows.num_rows = std::min<int64_t>(kMaxRows, all - row);
    rows.head_dim = head_dim;
    rows.num_positions = num_positions;
    float* const scaled = get_scratch(kPart, kMaxRows * (2 * head_dim + kBlock + kChunk));
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      const int64_t token = (row + r) / num_groups, head = k * num_groups + (row + r) % num_groups;
      const int64_t place = ((b * num_tokens + token) * num_heads + head) * head_dim;
      for (int64_t h = 0; h < head_dim; ++h) scaled[r * head_dim + h] = queries.typed_data()[place + h] * factor;
      rows.limits[r] = std::clamp<int64_t>(start.typed_data()[b] + token + 1, 1, num_positions);
      rows.out[r] = out->typed_data() + place;
    }
    rows.queries = scaled;
    rows.keys = keys.typed_data() + (b * num_kv + k) * head_dim * num_positions;
    rows.values = values.typed_data() + (b * num_kv + k) * head_dim * num_positions;
    attend_part(rows, scaled + kMaxRows * head_dim);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MultiplyRows, multiply_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MultiplyTurnedRows, multiply_turned_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(TakeRows, take_rows,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(TakeColumns, take_columns,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendCached, attend_cached,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
