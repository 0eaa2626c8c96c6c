// Products of a few rows with a weight, for CPUs: the weight is read once, where and in the order it lies.
//
// A product of few rows takes as long as its weight takes to read, where nothing packs it first, and nothing waits for
// it. So every kernel here walks through the weight and asks for what comes next (prefetch), and the few rows stay in
// the nearest caches. Work is cut into parts by the weight's shape alone, each part sums up in one sequence, and parts
// are added in theirs: what a row becomes depends neither on the rows beside it nor on threads.
//
// Compiled by domino_jax/ops/few_rows.py on the machine it runs on; the interface is XLA's FFI (jax.ffi).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kVectors = 2;  // sums of a row that stay in registers for one step
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int kMaxRows = 16;              // rows of one walk through the weight
constexpr int kUnroll = 4;                // the weight's rows of one step
constexpr int64_t kAhead = 3;             // steps that are asked for in advance
constexpr int64_t kPartRows = 128;        // contracted rows of a part, at least
constexpr int64_t kMaxParts = 16;         // each has sums of its own; a power of two, for as many threads
constexpr int64_t kTurnedPart = 1 << 16;  // numbers of a part of a turned weight
constexpr int64_t kTurnedRows = 24;       // rows of it that stay near while several groups of rows are multiplied
constexpr int64_t kShared = 1 << 14;      // numbers of a weight that are worth a second thread
constexpr int kNarrow = 8;                // rows that share one vector in products with turned weights

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

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

// sums += x[:, i : i + U] @ weight[i : i + U, :] for R rows; x and weight point at i. Sums lie as [blocks, R, kBlock]: one
// stream, whatever the stride of the weight's rows.
template <int R, int U>
void add_step(const float* x, int64_t x_stride, const float* weight, int64_t num_out, float* sums) {
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
      const float* row = weight + u * num_out + o;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[u][v] = reinterpret_cast<const Lanes*>(row)[v];
        __builtin_prefetch(row + kAhead * U * num_out + v * kLanes, 0, 2);
      }
    }
    add();
  }
  if (o == num_out) return;
  for (int u = 0; u < U; ++u) {
    std::memset(w[u], 0, sizeof(w[u]));
    std::memcpy(w[u], weight + u * num_out + o, (num_out - o) * sizeof(float));
  }
  add();
}

using AddStep = void (*)(const float*, int64_t, const float*, int64_t, float*);

template <int U, int... R>
AddStep choose(int64_t num_rows, std::integer_sequence<int, R...>) {
  static constexpr AddStep steps[] = {add_step<R + 1, U>...};
  return steps[num_rows - 1];
}

// sums = x[:, first : last] @ weight[first : last, :] for at most kMaxRows rows
void multiply_part(const float* x, int64_t num_rows, int64_t num_in, const float* weight, int64_t num_out, int64_t first,
                   int64_t last, float* sums) {
  constexpr auto all = std::make_integer_sequence<int, kMaxRows>();
  const AddStep step = choose<kUnroll>(num_rows, all), one = choose<1>(num_rows, all);
  int64_t i = first;
  for (; i + kUnroll <= last; i += kUnroll) step(x + i, num_in, weight + i * num_out, num_out, sums);
  for (; i < last; ++i) one(x + i, num_in, weight + i * num_out, num_out, sums);
}

ffi::Error multiply_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                         ffi::ResultBuffer<ffi::F32> out) {
  const int64_t num_rows = x.dimensions()[0], num_in = x.dimensions()[1], num_out = weight.dimensions()[1];
  if (weight.dimensions()[0] != num_in) return ffi::Error::InvalidArgument("x [rows, in] and weight [in, out] differ");
  int64_t num_parts = 1;
  while (2 * num_parts <= std::min(num_in / kPartRows, kMaxParts)) num_parts *= 2;
  const int64_t num_steps = (num_in + kUnroll - 1) / kUnroll;
  const int64_t num_blocks = (num_out + kBlock - 1) / kBlock;
  const int64_t size = num_rows * num_blocks * kBlock;
  thread_local std::vector<float> scratch;
  if (scratch.size() < static_cast<size_t>(num_parts * size)) scratch.resize(num_parts * size);
  float* const sums = scratch.data();
  const float* const rows = x.typed_data();
  const float* const numbers = weight.typed_data();
  run_parts(pool, num_parts, num_in * num_out >= kShared, [=](int64_t part) {
    const int64_t first = num_steps * part / num_parts * kUnroll;
    const int64_t last = std::min(num_in, num_steps * (part + 1) / num_parts * kUnroll);
    float* own = sums + part * size;
    std::memset(own, 0, size * sizeof(float));
    for (int64_t row = 0; row < num_rows; row += kMaxRows)
      multiply_part(rows + row * num_in, std::min<int64_t>(kMaxRows, num_rows - row), num_in, numbers, num_out, first,
                    last, own + row * num_blocks * kBlock);
  });
  float* result = out->typed_data();
  for (int64_t row = 0; row < num_rows; ++row, result += num_out) {
    const int64_t start = row / kMaxRows * kMaxRows, width = std::min<int64_t>(kMaxRows, num_rows - start);
    const float* own = sums + start * num_blocks * kBlock + (row - start) * kBlock;
    for (int64_t o = 0; o < num_out; o += kBlock, own += width * kBlock) {
      Lanes sum[kVectors] = {};
      for (int64_t part = 0; part < num_parts; ++part)
        for (int v = 0; v < kVectors; ++v) sum[v] += reinterpret_cast<const Lanes*>(own + part * size)[v];
      std::memcpy(result + o, sum, std::min(kBlock, num_out - o) * sizeof(float));
    }
  }
  return ffi::Error::Success();
}

// out[:, v : v + N] = x @ weight[v : v + N, :].T for up to W * V rows; packed holds x as [in, W * V], and so lie the sums:
// every lane is a row, and one number of the weight is multiplied with all of them.
template <int W, int V, int N>
void dot_rows(const float* packed, int64_t num_rows, int64_t num_in, const float* weight, int64_t num_out, float* out) {
  typedef float Rows __attribute__((vector_size(W * sizeof(float)), aligned(sizeof(float)), may_alias));
  Rows sums[V][N] = {};
  const Rows* x = reinterpret_cast<const Rows*>(packed);
  for (int64_t i = 0; i < num_in; ++i, x += V) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const float number = weight[n * num_in + i];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[v][n] += x[v] * number;
    }
    if (i % 16 == 0)
      for (int n = 0; n < N; ++n) __builtin_prefetch(weight + (n + N) * num_in + i, 0, 2);
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v)
    for (int64_t r = 0; r < std::min<int64_t>(W, num_rows - v * W); ++r)
      for (int n = 0; n < N; ++n) out[(v * W + r) * num_out + n] = sums[v][n][r];
}

// out[:, first : last], tile by tile; a last tile that is not full begins sooner.
template <int W, int V>
void dot_part(const float* packed, int64_t num_rows, int64_t num_in, const float* weight, int64_t num_out, int64_t first,
              int64_t last, float* out) {
  constexpr int kTile = V == 1 ? 8 : 6;  // as many sums as there are registers
  for (int64_t v = first; v < last; v += kTile) {
    if (last - first < kTile) {
      dot_rows<W, V, 1>(packed, num_rows, num_in, weight + v * num_in, num_out, out + v);
      v += 1 - kTile;
    } else {
      const int64_t start = std::min(v, last - kTile);
      dot_rows<W, V, kTile>(packed, num_rows, num_in, weight + start * num_in, num_out, out + start);
    }
  }
}

ffi::Error multiply_turned_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                                ffi::ResultBuffer<ffi::F32> out) {
  const int64_t num_rows = x.dimensions()[0], num_in = x.dimensions()[1], num_out = weight.dimensions()[0];
  if (weight.dimensions()[1] != num_in) return ffi::Error::InvalidArgument("x [rows, in] and weight [out, in] differ");
  const int64_t num_groups = (num_rows + kMaxRows - 1) / kMaxRows;
  auto num_vectors = [=](int64_t group) { return num_rows - group * kMaxRows > kNarrow ? 2 : 1; };
  thread_local std::vector<float> scratch;
  scratch.assign(num_groups * kMaxRows * num_in, 0.0f);
  float* const packed = scratch.data();
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t group = row / kMaxRows, width = kNarrow * num_vectors(group);
    float* place = packed + group * kMaxRows * num_in + row % kMaxRows;
    for (int64_t i = 0; i < num_in; ++i) place[i * width] = x.typed_data()[row * num_in + i];
  }
  const float* const numbers = weight.typed_data();
  float* const result = out->typed_data();
  const int64_t num_parts = std::max<int64_t>(1, num_in * num_out / kTurnedPart);
  run_parts(pool, num_parts, num_in * num_out >= kShared, [=](int64_t part) {
    for (int64_t v = num_out * part / num_parts, end = num_out * (part + 1) / num_parts; v < end; v += kTurnedRows) {
      for (int64_t group = 0; group < num_groups; ++group) {
        const int64_t row = group * kMaxRows, rows = std::min<int64_t>(kMaxRows, num_rows - row);
        const auto dot = num_vectors(group) == 1 ? dot_part<kNarrow, 1> : dot_part<kLanes, kMaxRows / kLanes>;
        dot(packed + row * num_in, rows, num_in, numbers, num_out, v, std::min(end, v + kTurnedRows),
            result + row * num_out);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MultiplyRows, multiply_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MultiplyTurnedRows, multiply_turned_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
