// AdamW on the CPU. Every element takes the same operations, each rounded separately. So its bits do not depend on its place
// in a vector, a part of a tensor or a thread. The random words of a chunk are always drawn for the whole chunk.

#include "adamw.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vectors.h"

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

namespace clipcore {
namespace {

constexpr int kChunk = 4096, kWords = 4, kLanes = kChunk / kWords, kRounds = 7; // as in kernels/adamw.py
constexpr uint32_t kMoments = 0, kWeights = 1; // purposes of random words

struct Factors {
  float decay, coefficient1, beta2, coefficient2, step_size, root_correction, eps, grad_scale;
};

// One tensor's pointers, each of one of two types.
struct Update {
  void *param, *exp_avg, *exp_avg_sq, *shadow;
  const void* grad;
  bool param_is_narrow, grad_is_narrow, moments_are_narrow;
  int64_t numel, first;
  uint32_t stream;
};

// The Philox words of a chunk. Element i uses word i / kLanes of block i % kLanes, as in the Triton kernel.
CLIPCORE_VECTORS void draw_words(
    uint64_t seed, int64_t chunk, uint32_t purpose, uint32_t step, uint32_t stream, uint32_t* __restrict words) {
  for (int lane = 0; lane < kLanes; lane++) {
    uint32_t c0 = static_cast<uint32_t>(chunk * kLanes + lane), c1 = purpose, c2 = step, c3 = stream;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < kRounds; round++) {
      const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
      const uint64_t product2 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(product2 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(product2);
      c3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[lane] = c0;
    words[kLanes + lane] = c1;
    words[2 * kLanes + lane] = c2;
    words[3 * kLanes + lane] = c3;
  }
}

CLIPCORE_VECTORS void take_step(
    int64_t count,
    const float* __restrict grad,
    float* __restrict exp_avg,
    float* __restrict exp_avg_sq,
    float* __restrict param,
    const Factors f) {
  for (int64_t i = 0; i < count; i++) {
    const float g = grad[i] * f.grad_scale;
    const float m = exp_avg[i] + f.coefficient1 * (g - exp_avg[i]);
    const float v = f.beta2 * exp_avg_sq[i] + f.coefficient2 * (g * g);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = f.decay * param[i] - f.step_size * (m / (std::sqrt(v) * f.root_correction + f.eps));
  }
}

CLIPCORE_VECTORS void widen(int64_t count, const uint16_t* __restrict from, float* __restrict to) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

// Convert to bfloat16; round up if adding the 16 bits of a word from `shift` on carries over.
CLIPCORE_VECTORS void round_stochastically(
    int64_t count, const float* __restrict from, const uint32_t* __restrict words, int shift, uint16_t* __restrict to) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const uint32_t carried = (bits + ((words[i] >> shift) & 0xFFFFu)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : carried);
  }
}

CLIPCORE_VECTORS void round_to_nearest(int64_t count, const float* __restrict from, uint16_t* __restrict to) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const uint32_t even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : even);
  }
}

// The numbers from `at` on as float32: in place if they are float32, else copied to `room`.
float* widened(void* numbers, bool is_narrow, int64_t at, int64_t count, float* room) {
  if (!is_narrow)
    return static_cast<float*>(numbers) + at;
  widen(count, static_cast<const uint16_t*>(numbers) + at, room);
  return room;
}

// Update the part that lies in one chunk of the whole tensor, a quarter of the chunk at a time.
void update_chunk(const Update& update, int64_t chunk, const Factors& factors, int64_t step, uint64_t seed) {
  float g_room[kLanes], m_room[kLanes], v_room[kLanes], p_room[kLanes];
  uint32_t moment_words[kChunk], param_words[kChunk];
  if (update.moments_are_narrow)
    draw_words(seed, chunk, kMoments, static_cast<uint32_t>(step), update.stream, moment_words);
  if (update.param_is_narrow)
    draw_words(seed, chunk, kWeights, static_cast<uint32_t>(step), update.stream, param_words);
  for (int word = 0; word < kWords; word++) {
    const int64_t begin = chunk * kChunk + word * kLanes; // in the whole tensor
    const int64_t from = std::max(begin, update.first);
    const int64_t count = std::min(begin + kLanes, update.first + update.numel) - from;
    if (count <= 0)
      continue;
    const int64_t at = from - update.first, offset = word * kLanes + from - begin;
    const float* g = widened(const_cast<void*>(update.grad), update.grad_is_narrow, at, count, g_room);
    float* m = widened(update.exp_avg, update.moments_are_narrow, at, count, m_room);
    float* v = widened(update.exp_avg_sq, update.moments_are_narrow, at, count, v_room);
    float* p = widened(update.param, update.param_is_narrow, at, count, p_room);
    take_step(count, g, m, v, p, factors);
    if (update.moments_are_narrow) {
      round_stochastically(count, m, moment_words + offset, 0, static_cast<uint16_t*>(update.exp_avg) + at);
      round_stochastically(count, v, moment_words + offset, 16, static_cast<uint16_t*>(update.exp_avg_sq) + at);
    }
    if (update.param_is_narrow)
      round_stochastically(count, p, param_words + offset, 0, static_cast<uint16_t*>(update.param) + at);
    if (update.shadow)
      round_to_nearest(count, p, static_cast<uint16_t*>(update.shadow) + at);
  }
}

bool is_narrow(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16;
}

void check(const at::Tensor& tensor, const at::Tensor& param) {
  TORCH_CHECK_VALUE(
      tensor.device().is_cpu() && tensor.is_contiguous() && tensor.numel() == param.numel() &&
          (is_narrow(tensor) || tensor.scalar_type() == at::kFloat),
      "adamw takes contiguous float32 or bfloat16 of one size on the CPU");
}

} // namespace

void adamw(
    const std::vector<at::Tensor>& params,
    const std::vector<at::Tensor>& grads,
    const std::vector<at::Tensor>& exp_avgs,
    const std::vector<at::Tensor>& exp_avg_sqs,
    const std::vector<std::optional<at::Tensor>>& shadows,
    const std::vector<int64_t>& streams,
    const std::vector<int64_t>& firsts,
    const std::vector<double>& factors,
    double grad_scale,
    int64_t step,
    uint64_t seed) {
  const size_t number = params.size();
  TORCH_CHECK_VALUE(
      grads.size() == number && exp_avgs.size() == number && exp_avg_sqs.size() == number &&
          shadows.size() == number && streams.size() == number && firsts.size() == number && factors.size() == 7,
      "adamw takes as many of each tensor, and 7 factors");
  std::vector<Update> updates;
  std::vector<int64_t> begun{0}; // chunks before each update
  for (size_t i = 0; i < number; i++) {
    for (const at::Tensor& tensor : {params[i], grads[i], exp_avgs[i], exp_avg_sqs[i]})
      check(tensor, params[i]);
    TORCH_CHECK_VALUE(is_narrow(exp_avgs[i]) == is_narrow(exp_avg_sqs[i]), "both moments must be of one type");
    if (shadows[i]) {
      check(*shadows[i], params[i]);
      TORCH_CHECK_VALUE(is_narrow(*shadows[i]) && !is_narrow(params[i]), "a shadow is bfloat16, of float32");
    }
    if (params[i].numel() == 0)
      continue;
    updates.push_back(
        {params[i].mutable_data_ptr(), exp_avgs[i].mutable_data_ptr(), exp_avg_sqs[i].mutable_data_ptr(),
         shadows[i] ? shadows[i]->mutable_data_ptr() : nullptr, grads[i].const_data_ptr(), is_narrow(params[i]),
         is_narrow(grads[i]), is_narrow(exp_avgs[i]), params[i].numel(), firsts[i],
         static_cast<uint32_t>(streams[i])});
    const int64_t end = firsts[i] + params[i].numel();
    begun.push_back(begun.back() + (end + kChunk - 1) / kChunk - firsts[i] / kChunk);
  }
  float f[7];
  std::transform(factors.begin(), factors.end(), f, [](double factor) { return static_cast<float>(factor); });
  const Factors all{f[0], f[1], f[2], f[3], f[4], f[5], f[6], static_cast<float>(grad_scale)};
  at::parallel_for(0, begun.back(), 16, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(begun.begin(), begun.end(), begin) - begun.begin() - 1;
    for (int64_t chunk = begin; chunk < end; chunk++) {
      while (chunk >= begun[i + 1])
        i++;
      update_chunk(updates[i], updates[i].first / kChunk + chunk - begun[i], all, step, seed);
    }
  });
}

} // namespace clipcore
