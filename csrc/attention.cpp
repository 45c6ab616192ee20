// Packed attention in float32 on the CPU. A task is one head of one row of tokens. It copies its operands from the packed
// projection into its own panels, a few hundred KB that stay in the cache, and writes packed results once.
//
// Queries are processed in blocks of kBlock. A block multiplies only with keys that at least one of its queries sees. The order
// of sums over keys does not depend on the number of threads.

#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "panels.h"

namespace clipcore {
namespace {

constexpr int64_t kBlock = 32; // queries

int64_t round_up(int64_t number, int64_t step) {
  return (number + step - 1) / step * step;
}

// The inputs of a call.
struct Problem {
  const float* qkv;
  int64_t rows, length, heads, size;
  int64_t row_stride, token_stride, part_stride, head_stride;
  bool is_causal;
  const int32_t* segments; // [R, L], or none
  const int32_t* first; // [R, L]: the first token of each token's segment in its row, and one past the last
  const int32_t* end;

  const float* part(int64_t row, int64_t head, int64_t which) const {
    return qkv + row * row_stride + which * part_stride + head * head_stride;
  }
};

// Sizes, in floats, of the parts of a task, with rows and columns padded to whole vectors and tiles.
template <int W, int M>
struct Sizes {
  int64_t length, size; // padded
  int64_t wide_length, wide_size; // padded to whole panels
  explicit Sizes(const Problem& p)
      : length(round_up(p.length, std::max(W, M))),
        size(round_up(p.size, W)),
        wide_length(round_up(p.length, 2 * W)),
        wide_size(round_up(p.size, 2 * W)) {}
};

// The keys that a block of queries multiplies with: whole panels from `first`, whole vectors to `end`.
struct Keys {
  int64_t first, end;
};

template <int W>
CLIPCORE_INLINE Keys keys_of(const Problem& p, int64_t row, int64_t query, int64_t some) {
  Keys keys{0, p.is_causal ? query + some : p.length};
  if (p.segments) {
    const int32_t* first = p.first + row * p.length + query;
    const int32_t* end = p.end + row * p.length + query;
    keys.first = p.length;
    int64_t last = 0;
    for (int64_t i = 0; i < some; i++) {
      keys.first = std::min<int64_t>(keys.first, first[i]);
      last = std::max<int64_t>(last, end[i]);
    }
    keys.end = std::min(keys.end, last);
  }
  return {keys.first / (2 * W) * (2 * W), round_up(keys.end, W)};
}

// A mask of the keys from `key` on: all bits set if the query sees a key; `segments` are padded beyond the row's end.
template <int W>
CLIPCORE_INLINE void seen_from(
    const Problem& p,
    const int32_t* segments,
    int64_t query,
    int64_t key,
    typename Lanes<W>::I& seen) {
  typedef typename Lanes<W>::I I;
  I numbers;
  number_from<W>(static_cast<int32_t>(key), numbers);
  seen = numbers < static_cast<int32_t>(p.is_causal ? query + 1 : p.length);
  if (p.segments)
    seen &= *reinterpret_cast<const I*>(segments + key) == segments[query];
}

template <int W, int M>
CLIPCORE_INLINE void forward_tasks(
    const Problem& p, float* out_RLD, float* lse_RHL, int64_t begin, int64_t end) {
  typedef typename Lanes<W>::F F;
  typedef typename Lanes<W>::I I;
  const Sizes<W, M> to(p);
  const int64_t block = round_up(kBlock, M);
  std::vector<float> memory(
      to.length * to.size + to.wide_length * p.size + to.wide_size * to.wide_length +
      block * (to.wide_length + to.size));
  std::vector<int32_t> segments(to.wide_length, std::numeric_limits<int32_t>::min());
  float* q = memory.data();
  float* k_columns = q + to.length * to.size;
  float* v_panels = k_columns + to.wide_length * p.size;
  float* scores = v_panels + to.wide_size * to.wide_length;
  float* out = scores + block * to.wide_length;
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.size));
  const int64_t width = p.heads * p.size;

  for (int64_t task = begin; task < end; task++) {
    const int64_t row = task / p.heads, head = task % p.heads;
    copy_rows<W>(p.part(row, head, 0), p.token_stride, p.length, p.size, to.size, scale, q);
    copy_transposed<W>(p.part(row, head, 1), p.token_stride, p.length, p.size, k_columns);
    copy_panels<W>(p.part(row, head, 2), p.token_stride, p.length, p.size, 1.0f, v_panels);
    if (p.segments)
      std::copy_n(p.segments + row * p.length, p.length, segments.data());
    for (int64_t query = 0; query < p.length; query += block) {
      const int64_t some = std::min(block, p.length - query);
      const Keys keys = keys_of<W>(p, row, query, some);
      const int64_t number = keys.end - keys.first;
      multiply<W, M, false>(
          round_up(some, M), number, p.size, q + query * to.size, to.size, 1,
          k_columns + keys.first * p.size, 2 * W * p.size, scores, to.wide_length);
      float inverse[kBlock + M];
      for (int64_t i = 0; i < some; i++) {
        float* line = scores + i * to.wide_length;
        F most_lanes = F{} - std::numeric_limits<float>::infinity();
        for (int64_t j = 0; j < number; j += W) {
          I seen;
          seen_from<W>(p, segments.data(), query + i, keys.first + j, seen);
          const F score = load<W>(line + j);
          most_lanes = (seen & (score > most_lanes)) ? score : most_lanes;
        }
        float most = most_lanes[0];
        for (int lane = 1; lane < W; lane++)
          most = std::max(most, most_lanes[lane]);
        F sums = F{};
        for (int64_t j = 0; j < number; j += W) {
          I seen;
          seen_from<W>(p, segments.data(), query + i, keys.first + j, seen);
          const F power = where<W>(seen, exponential<W>(load<W>(line + j) - most));
          sums += power;
          store<W>(line + j, power);
        }
        float sum = 0.0f;
        for (int lane = 0; lane < W; lane++)
          sum += sums[lane];
        inverse[i] = 1.0f / sum;
        lse_RHL[task * p.length + query + i] = most + std::log(sum);
      }
      multiply<W, M, false>(
          round_up(some, M), to.size, std::min(number, p.length - keys.first), scores, to.wide_length, 1,
          v_panels + keys.first * 2 * W, p.length * 2 * W, out, to.size);
      for (int64_t i = 0; i < some; i++) {
        float* target = out_RLD + (row * p.length + query + i) * width + head * p.size;
        const bool is_padding = p.segments && segments[query + i] < 0;
        if (is_padding)
          std::fill_n(target, p.size, 0.0f);
        else
          copy_rows<W>(out + i * to.size, 0, 1, p.size, 0, inverse[i], target);
      }
    }
  }
}

template <int W, int M>
CLIPCORE_INLINE void backward_tasks(
    const Problem& p,
    const float* grad_RLD,
    const float* lse_RHL,
    float* dqkv_RL3HK,
    int64_t begin,
    int64_t end) {
  typedef typename Lanes<W>::F F;
  typedef typename Lanes<W>::I I;
  const Sizes<W, M> to(p);
  const int64_t block = round_up(kBlock, M);
  const int64_t rows = to.length * to.size, panels = to.wide_size * p.length, columns = to.wide_length * p.size;
  std::vector<float> memory(
      2 * rows + 3 * panels + 2 * columns + block * (2 * to.wide_length + to.size) +
      2 * to.wide_length * to.size);
  std::vector<int32_t> segments(to.wide_length, std::numeric_limits<int32_t>::min());
  float* q = memory.data();
  float* g = q + rows;
  float* q_panels = g + rows;
  float* g_panels = q_panels + panels;
  float* k_panels = g_panels + panels;
  float* k_columns = k_panels + panels;
  float* v_columns = k_columns + columns;
  float* p_block = v_columns + columns;
  float* ds_block = p_block + block * to.wide_length;
  float* dq = ds_block + block * to.wide_length;
  float* dk = dq + block * to.size;
  float* dv = dk + to.wide_length * to.size;
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.size));
  const int64_t width = p.heads * p.size;

  for (int64_t task = begin; task < end; task++) {
    const int64_t row = task / p.heads, head = task % p.heads;
    const float* grad = grad_RLD + row * p.length * width + head * p.size;
    copy_rows<W>(p.part(row, head, 0), p.token_stride, p.length, p.size, to.size, scale, q);
    copy_panels<W>(p.part(row, head, 0), p.token_stride, p.length, p.size, scale, q_panels);
    copy_panels<W>(p.part(row, head, 1), p.token_stride, p.length, p.size, scale, k_panels);
    copy_transposed<W>(p.part(row, head, 1), p.token_stride, p.length, p.size, k_columns);
    copy_transposed<W>(p.part(row, head, 2), p.token_stride, p.length, p.size, v_columns);
    copy_rows<W>(grad, width, p.length, p.size, to.size, 1.0f, g);
    copy_panels<W>(grad, width, p.length, p.size, 1.0f, g_panels);
    if (p.segments) {
      std::copy_n(p.segments + row * p.length, p.length, segments.data());
      // The gradient of the padding's output is dropped.
      for (int64_t i = 0; i < p.length; i++)
        if (segments[i] < 0) {
          std::fill_n(g + i * to.size, p.size, 0.0f);
          for (int64_t k = 0; k < to.wide_size; k += 2 * W)
            std::fill_n(g_panels + k * p.length + i * 2 * W, 2 * W, 0.0f);
        }
    }
    std::fill(dk, dv + to.wide_length * to.size, 0.0f);
    for (int64_t query = 0; query < p.length; query += block) {
      const int64_t some = std::min(block, p.length - query);
      const Keys keys = keys_of<W>(p, row, query, some);
      const int64_t number = keys.end - keys.first;
      multiply<W, M, false>(
          round_up(some, M), number, p.size, q + query * to.size, to.size, 1,
          k_columns + keys.first * p.size, 2 * W * p.size, p_block, to.wide_length);
      multiply<W, M, false>(
          round_up(some, M), number, p.size, g + query * to.size, to.size, 1,
          v_columns + keys.first * p.size, 2 * W * p.size, ds_block, to.wide_length);
      for (int64_t i = 0; i < some; i++) {
        float* line = p_block + i * to.wide_length;
        float* ds_line = ds_block + i * to.wide_length;
        const float lse = lse_RHL[task * p.length + query + i];
        F sums = F{};
        for (int64_t j = 0; j < number; j += W) {
          I seen;
          seen_from<W>(p, segments.data(), query + i, keys.first + j, seen);
          const F power = where<W>(seen, exponential<W>(load<W>(line + j) - lse));
          sums += where<W>(seen, power * load<W>(ds_line + j));
          store<W>(line + j, power);
        }
        // The sum of these very probabilities, so that a token that sees only itself has no gradient.
        float sum = 0.0f;
        for (int lane = 0; lane < W; lane++)
          sum += sums[lane];
        for (int64_t j = 0; j < number; j += W) {
          I seen;
          seen_from<W>(p, segments.data(), query + i, keys.first + j, seen);
          const F ds = load<W>(line + j) * (load<W>(ds_line + j) - sum);
          store<W>(ds_line + j, where<W>(seen, ds));
        }
      }
      // Rows beyond the last query add nothing.
      const int64_t m = round_up(number, M);
      multiply<W, M, true>(
          m, to.size, some, p_block, 1, to.wide_length, g_panels + query * 2 * W, p.length * 2 * W,
          dv + keys.first * to.size, to.size);
      multiply<W, M, true>(
          m, to.size, some, ds_block, 1, to.wide_length, q_panels + query * 2 * W, p.length * 2 * W,
          dk + keys.first * to.size, to.size);
      multiply<W, M, false>(
          round_up(some, M), to.size, std::min(number, p.length - keys.first), ds_block, to.wide_length, 1,
          k_panels + keys.first * 2 * W, p.length * 2 * W, dq, to.size);
      for (int64_t i = 0; i < some; i++)
        std::copy_n(
            dq + i * to.size, p.size,
            dqkv_RL3HK + ((row * p.length + query + i) * 3 * p.heads + head) * p.size);
    }
    for (int64_t i = 0; i < p.length; i++) {
      float* target = dqkv_RL3HK + ((row * p.length + i) * 3 * p.heads + head) * p.size;
      std::copy_n(dk + i * to.size, p.size, target + width);
      std::copy_n(dv + i * to.size, p.size, target + 2 * width);
    }
  }
}

// The tasks for each kind of processor: 32 registers of 16 floats, or 16 of 8.

using Forward = void (*)(const Problem&, float*, float*, int64_t, int64_t);
using Backward = void (*)(const Problem&, const float*, const float*, float*, int64_t, int64_t);

struct Tasks {
  Forward forward;
  Backward backward;
};

#define CLIPCORE_TASKS(name, instructions, W, M)                                                         \
  __attribute__((target(instructions))) void forward_##name(                                             \
      const Problem& p, float* out, float* lse, int64_t begin, int64_t end) {                            \
    forward_tasks<W, M>(p, out, lse, begin, end);                                                        \
  }                                                                                                      \
  __attribute__((target(instructions))) void backward_##name(                                            \
      const Problem& p, const float* grad, const float* lse, float* dqkv, int64_t begin, int64_t end) {  \
    backward_tasks<W, M>(p, grad, lse, dqkv, begin, end);                                                \
  }

#ifdef CLIPCORE_X86_VECTORS
CLIPCORE_TASKS(avx512, "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma", 16, 8)
CLIPCORE_TASKS(avx2, "avx2,fma", 8, 4)
#endif

Tasks tasks_of([[maybe_unused]] int64_t lanes) {
#ifdef CLIPCORE_X86_VECTORS
  const std::vector<int64_t> known = attention_lanes();
  if (std::find(known.begin(), known.end(), lanes) != known.end())
    return lanes == 16 ? Tasks{forward_avx512, backward_avx512} : Tasks{forward_avx2, backward_avx2};
#endif
  TORCH_CHECK(false, "this processor has no vectors of ", lanes, " floats, or clipcore._C was built without them");
}

// The ranges of the segments, held together with the problem that points to them.
struct Ranges {
  std::vector<int32_t> first, end;

  Ranges(const int32_t* segments, int64_t rows, int64_t length) : first(rows * length), end(rows * length) {
    // A segment usually is one run of tokens. A later run of the same segment widens the ranges of all of its tokens.
    std::vector<std::pair<int32_t, int32_t>> order(length);
    for (int64_t row = 0; row < rows; row++) {
      for (int32_t i = 0; i < length; i++)
        order[i] = {segments[row * length + i], i};
      if (!std::is_sorted(order.begin(), order.end()))
        std::sort(order.begin(), order.end());
      for (int64_t from = 0, to = 0; from < length; from = to) {
        while (to < length && order[to].first == order[from].first)
          to++;
        for (int64_t i = from; i < to; i++) {
          first[row * length + order[i].second] = order[from].second;
          end[row * length + order[i].second] = order[to - 1].second + 1;
        }
      }
    }
  }
};

Problem problem_of(
    const at::Tensor& qkv, bool is_causal, const std::optional<at::Tensor>& segments, const Ranges& ranges) {
  TORCH_CHECK_VALUE(
      qkv.device().is_cpu() && qkv.scalar_type() == at::kFloat && qkv.dim() == 5 && qkv.size(2) == 3 &&
          (qkv.stride(4) == 1 || qkv.size(4) <= 1),
      "attention on the CPU takes float32 [R, L, 3, H, K] with the columns of a head side by side");
  return {
      qkv.const_data_ptr<float>(), qkv.size(0),   qkv.size(1),   qkv.size(3), qkv.size(4),
      qkv.stride(0),               qkv.stride(1), qkv.stride(2), qkv.stride(3), is_causal,
      segments ? segments->const_data_ptr<int32_t>() : nullptr, ranges.first.data(), ranges.end.data()};
}

Ranges ranges_of(const at::Tensor& qkv, const std::optional<at::Tensor>& segments) {
  if (!segments)
    return {nullptr, 0, 0};
  TORCH_CHECK_VALUE(
      segments->device().is_cpu() && segments->scalar_type() == at::kInt && segments->is_contiguous() &&
          segments->dim() == 2 && segments->size(0) == qkv.size(0) && segments->size(1) == qkv.size(1),
      "segments must be contiguous int32 [R, L]");
  return {segments->const_data_ptr<int32_t>(), segments->size(0), segments->size(1)};
}

} // namespace

std::vector<int64_t> attention_lanes() {
  std::vector<int64_t> lanes;
#ifdef CLIPCORE_X86_VECTORS
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    lanes.push_back(16);
  if (has_avx2)
    lanes.push_back(8);
#endif
  return lanes;
}

std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& qkv_RL3HK,
    bool is_causal,
    const std::optional<at::Tensor>& segments_RL,
    int64_t lanes) {
  const Ranges ranges = ranges_of(qkv_RL3HK, segments_RL);
  const Problem problem = problem_of(qkv_RL3HK, is_causal, segments_RL, ranges);
  at::Tensor out = at::empty({problem.rows, problem.length, problem.heads * problem.size}, qkv_RL3HK.options());
  at::Tensor lse = at::empty({problem.rows, problem.heads, problem.length}, qkv_RL3HK.options());
  float *out_data = out.mutable_data_ptr<float>(), *lse_data = lse.mutable_data_ptr<float>();
  const Forward tasks = tasks_of(lanes).forward;
  at::parallel_for(0, problem.rows * problem.heads, 1, [&](int64_t begin, int64_t end) {
    tasks(problem, out_data, lse_data, begin, end);
  });
  return {out, lse};
}

at::Tensor attention_backward(
    const at::Tensor& grad_RLD,
    const at::Tensor& qkv_RL3HK,
    const at::Tensor& lse_RHL,
    bool is_causal,
    const std::optional<at::Tensor>& segments_RL,
    int64_t lanes) {
  const Ranges ranges = ranges_of(qkv_RL3HK, segments_RL);
  const Problem problem = problem_of(qkv_RL3HK, is_causal, segments_RL, ranges);
  TORCH_CHECK_VALUE(
      grad_RLD.scalar_type() == at::kFloat && grad_RLD.is_contiguous() && lse_RHL.is_contiguous() &&
          lse_RHL.scalar_type() == at::kFloat &&
          grad_RLD.numel() == problem.rows * problem.length * problem.heads * problem.size &&
          lse_RHL.numel() == problem.rows * problem.length * problem.heads,
      "the gradient [R, L, H*K] and the sums [R, H, L] must be contiguous float32");
  at::Tensor dqkv =
      at::empty({problem.rows, problem.length, 3, problem.heads, problem.size}, qkv_RL3HK.options());
  const float *grad = grad_RLD.const_data_ptr<float>(), *lse = lse_RHL.const_data_ptr<float>();
  float* dqkv_data = dqkv.mutable_data_ptr<float>();
  const Backward tasks = tasks_of(lanes).backward;
  at::parallel_for(0, problem.rows * problem.heads, 1, [&](int64_t begin, int64_t end) {
    tasks(problem, grad, lse, dqkv_data, begin, end);
  });
  return dqkv;
}

} // namespace clipcore
