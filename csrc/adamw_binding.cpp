// Operator headrace::adamw_. Mathematics and layout: adamw.h.
#include <cmath>
#include <optional>
#include <vector>

#include "adamw.h"
#include "binding.h"
#include "tables.h"

namespace headrace {
namespace {

constexpr const char* kOp = "headrace::adamw_";
constexpr int64_t kSettings = 6;  // lr, weight_decay, beta1, beta2, eps, step

// A bijection of 64 bits in which every bit of the result depends on every bit of x (splitmix64, S. Vigna).
uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// What one group's tensors are updated with; `step` is the number of the update, counted from 1.
AdamwFactors factors_of(double lr, double weight_decay, double beta1, double beta2, double eps, double step) {
  const double correction1 = 1.0 - std::pow(beta1, step), correction2 = 1.0 - std::pow(beta2, step);
  const float rest1 = static_cast<float>(1.0 - beta1);
  AdamwFactors factors;
  factors.decay = static_cast<float>(1.0 - lr * weight_decay);
  factors.from_gradient = rest1 >= 0.5f;
  factors.rest1 = factors.from_gradient ? rest1 - 1.0f : rest1;
  factors.beta2 = static_cast<float>(beta2);
  factors.rest2 = static_cast<float>(1.0 - beta2);
  factors.minus_step_size = -static_cast<float>(lr / correction1);
  factors.root_correction2 = static_cast<float>(std::sqrt(correction2));
  factors.eps = static_cast<float>(eps);
  return factors;
}

// Of the random numbers of a step.
uint64_t key_of(uint64_t seed, uint64_t step) { return mixed(mixed(seed) + step) | 1u; }

using Tensors = std::vector<Tensor>;

// What the arguments ask for, once they are checked.
struct Call {
  AdamwMode mode;
  Dtype gradient;
  std::vector<AdamwTensor> rows;
  int64_t chunks;
  Tensor sums;  // double [tensors, 3], or [0, 3]
};

AdamwMode mode_of(const Tensors& weights, const Tensors& lows) {
  const bool master = weights[0].scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(master || weights[0].scalar_type() == ScalarType::BFloat16, kOp,
                  ": weights must be float32 or bfloat16");
  for (const Tensor& weight : weights) check_same_dtype(weight, weights[0], "weights", kOp);
  if (lows.empty()) return master ? AdamwMode::master : AdamwMode::stochastic;
  check_list(lows, weights, "lows", kOp);
  if (master) {
    check_list_dtype(lows, ScalarType::BFloat16, "lows, copies of fp32 weights,", "bfloat16", kOp);
    return AdamwMode::master_and_copy;
  }
  check_list_dtype(lows, ScalarType::Short, "lows, remainders of bf16 weights,", "int16", kOp);
  return AdamwMode::remainder;
}

Call call_of(const Tensors& weights, const Tensors& lows, const Tensors& gradients, const Tensors& exp_avgs,
             const Tensors& exp_avg_sqs, const Tensor& settings, const std::vector<int64_t>& group_sizes,
             const std::vector<int64_t>& bases, int64_t seed, bool sums) {
  STD_TORCH_CHECK(!weights.empty(), kOp, ": there is no weight");
  Call call{mode_of(weights, lows), dtype_of(gradients.empty() ? weights[0] : gradients[0], kOp), {}, 0,
            torch::stable::new_empty(weights[0], {sums ? static_cast<int64_t>(weights.size()) : 0, 3},
                                     ScalarType::Double)};
  check_list(weights, weights, "weights", kOp);
  check_list(gradients, weights, "gradients", kOp);
  for (const Tensor& gradient : gradients) check_same_dtype(gradient, gradients[0], "gradients", kOp);
  check_list(exp_avgs, weights, "exp_avgs", kOp);
  check_list(exp_avg_sqs, weights, "exp_avg_sqs", kOp);
  check_list_dtype(exp_avgs, ScalarType::Float, "exp_avgs", "float32", kOp);
  check_list_dtype(exp_avg_sqs, ScalarType::Float, "exp_avg_sqs", "float32", kOp);
  STD_TORCH_CHECK(bases.empty() || bases.size() == weights.size(), kOp, ": bases has ", bases.size(),
                  " numbers, not ", weights.size());
  const int64_t groups = static_cast<int64_t>(group_sizes.size());
  check_dtype(settings, ScalarType::Double, "settings", "float64", kOp);
  check_shape(settings, {groups, kSettings}, "settings", kOp);
  check_contiguous(settings, "settings", kOp);
  STD_TORCH_CHECK(settings.is_cpu(), kOp, ": settings must be on the CPU");
  const double* setting = static_cast<const double*>(settings.const_data_ptr());
  call.rows.reserve(weights.size());
  for (const int64_t size : group_sizes) {
    const AdamwFactors factors =
        factors_of(setting[0], setting[1], setting[2], setting[3], setting[4], setting[5]);
    const uint64_t key = key_of(static_cast<uint64_t>(seed), static_cast<uint64_t>(setting[5]));
    setting += kSettings;
    for (int64_t number = 0; number < size; ++number) {
      const size_t i = call.rows.size();
      STD_TORCH_CHECK(i < weights.size(), kOp, ": group_sizes do not add up to ", weights.size());
      AdamwTensor row;
      row.weight = weights[i].mutable_data_ptr();
      row.low = lows.empty() ? nullptr : lows[i].mutable_data_ptr();
      row.gradient = gradients[i].const_data_ptr();
      row.exp_avg = static_cast<float*>(exp_avgs[i].mutable_data_ptr());
      row.exp_avg_sq = static_cast<float*>(exp_avg_sqs[i].mutable_data_ptr());
      row.size = weights[i].numel();
      row.first_chunk = 0;
      row.base = bases.empty() ? 0 : static_cast<uint64_t>(bases[i]);
      row.key = key;
      const auto all = reinterpret_cast<uintptr_t>(row.weight) | reinterpret_cast<uintptr_t>(row.low) |
                       reinterpret_cast<uintptr_t>(row.gradient) | reinterpret_cast<uintptr_t>(row.exp_avg) |
                       reinterpret_cast<uintptr_t>(row.exp_avg_sq);
      row.packed = all % 16 == 0;
      row.factors = factors;
      call.rows.push_back(row);
    }
  }
  STD_TORCH_CHECK(call.rows.size() == weights.size(), kOp, ": group_sizes do not add up to ", weights.size());
  call.chunks = number_chunks(call.rows);
  return call;
}

void check_norm(const std::optional<Tensor>& grad_norm, const Tensor& weight) {
  if (!grad_norm) return;
  check_dtype(*grad_norm, ScalarType::Double, "grad_norm", "float64", kOp);
  STD_TORCH_CHECK(grad_norm->numel() == 1, kOp, ": grad_norm must be one number");
  check_same_device(*grad_norm, weight, "grad_norm and weights", kOp);
}

Tensor adamw_cpu(Tensors weights, Tensors lows, Tensors gradients, Tensors exp_avgs, Tensors exp_avg_sqs,
                 Tensor settings, std::vector<int64_t> group_sizes, std::vector<int64_t> bases,
                 std::optional<Tensor> grad_norm, double max_norm, int64_t seed, bool sums) {
  Call call = call_of(weights, lows, gradients, exp_avgs, exp_avg_sqs, settings, group_sizes, bases, seed, sums);
  check_norm(grad_norm, weights[0]);
  double* totals = static_cast<double*>(call.sums.mutable_data_ptr());
  if (sums) std::fill(totals, totals + 3 * call.rows.size(), 0.0);
  const double norm = grad_norm ? *static_cast<const double*>(grad_norm->const_data_ptr()) : 0.0;
  if (!std::isfinite(norm)) return call.sums;
  const float scale = clip_scale(norm, max_norm);
  std::vector<double> partial(sums ? static_cast<size_t>(3 * call.chunks) : 0);
  const int64_t count = static_cast<int64_t>(call.rows.size());
  torch::stable::parallel_for(0, call.chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    headrace::adamw_cpu(call.mode, call.gradient, call.rows.data(), count, scale, sums ? partial.data() : nullptr,
                        begin, end);
  });
  if (!sums) return call.sums;
  for (const AdamwTensor& row : call.rows) {
    for (int64_t at = 3 * row.first_chunk; at < 3 * (row.first_chunk + chunks_of(row.size)); ++at)
      totals[at % 3] += partial[static_cast<size_t>(at)];
    totals += 3;
  }
  return call.sums;
}

#ifdef HEADRACE_CUDA
Tensor adamw_cuda(Tensors weights, Tensors lows, Tensors gradients, Tensors exp_avgs, Tensors exp_avg_sqs,
                  Tensor settings, std::vector<int64_t> group_sizes, std::vector<int64_t> bases,
                  std::optional<Tensor> grad_norm, double max_norm, int64_t seed, bool sums) {
  Call call = call_of(weights, lows, gradients, exp_avgs, exp_avg_sqs, settings, group_sizes, bases, seed, sums);
  check_norm(grad_norm, weights[0]);
  STD_TORCH_CHECK(call.chunks <= kMaxChunks, kOp, ": there are too many weights for one launch");
  const OnDeviceOf guard(weights[0]);
  void* stream = stream_of(weights[0]);
  const Tensor table = on_device(call.rows, weights[0], stream, kOp);
  Tensor partial = torch::stable::new_empty(weights[0], {sums ? 3 * call.chunks : 0}, ScalarType::Float);
  check_cuda(headrace::adamw_cuda(call.mode, call.gradient, static_cast<const AdamwTensor*>(table.const_data_ptr()),
                                  static_cast<int64_t>(call.rows.size()), call.chunks,
                                  grad_norm ? static_cast<const double*>(grad_norm->const_data_ptr()) : nullptr,
                                  max_norm, static_cast<float*>(partial.mutable_data_ptr()),
                                  sums ? static_cast<double*>(call.sums.mutable_data_ptr()) : nullptr, stream),
             kOp);
  return call.sums;
}
#endif

HEADRACE_OPERATORS(library) {
  library.def(
      "adamw_(Tensor(a!)[] weights, Tensor(b!)[] lows, Tensor[] gradients, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor settings, int[] group_sizes, int[] bases, Tensor? grad_norm, float max_norm, "
      "int seed, bool sums) -> Tensor");
}

HEADRACE_CPU_KERNELS(library) { library.impl("adamw_", TORCH_BOX(&adamw_cpu)); }

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) { library.impl("adamw_", TORCH_BOX(&adamw_cuda)); }
#endif

}  // namespace
}  // namespace headrace
