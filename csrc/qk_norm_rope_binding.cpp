// Registers `headrace::qk_norm_rope_forward` and `_backward`. Shapes and mathematics: qk_norm_rope.h; gradients:
// parallel/kernels/qk_norm_rope.py.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"
#include "qk_norm_rope.h"

namespace headrace {
namespace {

using Shape = std::initializer_list<int64_t>;

// A contiguous tensor of `shape` beside qkv, of its dtype unless `type` says otherwise.
const void* checked(const Tensor& tensor, const Tensor& qkv, Shape shape, const char* op, const char* name,
                    std::optional<ScalarType> type = std::nullopt) {
  STD_TORCH_CHECK(tensor.scalar_type() == type.value_or(qkv.scalar_type()), op, ": ", name, " has the wrong dtype");
  check_shape(tensor, shape, name, op);
  check_same_device(tensor, qkv, name, op);
  check_contiguous(tensor, name, op);
  return tensor.const_data_ptr();
}

const void* checked(const std::optional<Tensor>& tensor, const Tensor& qkv, Shape shape, const char* op,
                    const char* name) {
  return tensor ? checked(*tensor, qkv, shape, op, name) : nullptr;
}

QkvShape shape_of(const Tensor& qkv, const char* op) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(2) >= 3 && qkv.size(3) > 0 && qkv.size(3) % 2 == 0, op,
                  ": qkv must be [tokens, groups, queries per group + 2, head size] with an even head size");
  check_contiguous(qkv, "qkv", op);
  return {qkv.size(0), qkv.size(1), qkv.size(2) - 2, qkv.size(3)};
}

QkInput input_of(const Tensor& qkv, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                 const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                 int statistics_per_head, const char* op) {
  QkInput input{};
  input.dtype = dtype_of(qkv, op);
  input.shape = shape_of(qkv, op);
  input.statistics_per_head = statistics_per_head;
  input.qkv = qkv.const_data_ptr();
  input.positions_are_int64 = positions.scalar_type() == ScalarType::Long;
  const ScalarType integer = input.positions_are_int64 ? ScalarType::Long : ScalarType::Int;
  input.positions = checked(positions, qkv, {input.shape.tokens}, op, "positions", integer);
  STD_TORCH_CHECK(cos.dim() == 2, op, ": cos must be [positions, head size / 2]");
  input.table_rows = cos.size(0);
  const int64_t size = input.shape.head_size;
  input.cos = checked(cos, qkv, {input.table_rows, size / 2}, op, "cos");
  input.sin = checked(sin, qkv, {input.table_rows, size / 2}, op, "sin");
  input.query_weight = checked(query_weight, qkv, {size}, op, "query_weight");
  input.key_weight = checked(key_weight, qkv, {size}, op, "key_weight");
  STD_TORCH_CHECK(query_weight.has_value() == key_weight.has_value() &&
                      query_weight.has_value() == (statistics_per_head > 0),
                  op, ": give weights for queries and keys, or for neither");
  return input;
}

template <typename Integer>
void check_positions(const QkInput& input, const char* op) {
  const auto* positions = static_cast<const Integer*>(input.positions);
  for (int64_t token = 0; token < input.shape.tokens; ++token)
    STD_TORCH_CHECK(positions[token] >= 0 && positions[token] < input.table_rows, op, ": position ",
                    static_cast<int64_t>(positions[token]), " of token ", token, " is not in cos and sin, which have ",
                    input.table_rows, " rows");
}

void check_positions_on_cpu(const QkInput& input, const char* op) {
  input.positions_are_int64 ? check_positions<int64_t>(input, op) : check_positions<int32_t>(input, op);
}

Tensor new_float32(const Tensor& beside, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(beside, sizes, ScalarType::Float);
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor>;

// What both devices check and allocate.
struct Forward {
  QkForward pass;
  ForwardResult result;
};

Forward prepare_forward(const Tensor& qkv, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                        const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                        const std::optional<Tensor>& query_bias, const std::optional<Tensor>& key_bias, double eps,
                        bool with_lengths, const char* op) {
  const int statistics = query_weight ? (query_bias ? 2 : 1) : 0;
  QkForward pass{};
  pass.input = input_of(qkv, positions, cos, sin, query_weight, key_weight, statistics, op);
  const auto [tokens, groups, queries, size] = pass.input.shape;
  STD_TORCH_CHECK(query_bias.has_value() == key_bias.has_value() && (!query_bias || query_weight), op,
                  ": give biases for queries and keys, beside weights, or for neither");
  pass.input.query_bias = checked(query_bias, qkv, {size}, op, "query_bias");
  pass.input.key_bias = checked(key_bias, qkv, {size}, op, "key_bias");
  pass.eps = static_cast<float>(eps);
  Tensor query = torch::stable::new_empty(qkv, {tokens, groups * queries, size});
  Tensor key = torch::stable::new_empty(qkv, {tokens, groups, size});
  Tensor kept = new_float32(qkv, {tokens, groups, queries + 1, statistics});
  Tensor lengths = with_lengths ? new_float32(qkv, {tokens, groups, queries + 1}) : new_float32(qkv, {0});
  pass.query = query.mutable_data_ptr();
  pass.key = key.mutable_data_ptr();
  pass.statistics = static_cast<float*>(kept.mutable_data_ptr());
  pass.lengths = with_lengths ? static_cast<float*>(lengths.mutable_data_ptr()) : nullptr;
  return {pass, {query, key, kept, lengths}};
}

struct Backward {
  QkBackward pass;
  BackwardResult result;
};

Backward prepare_backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value, const Tensor& qkv,
                          const Tensor& positions, const Tensor& cos, const Tensor& sin,
                          const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                          const Tensor& statistics, const char* op) {
  STD_TORCH_CHECK(statistics.dim() == 4 && statistics.size(3) <= 2, op, ": statistics are those of the forward pass");
  const int kinds = static_cast<int>(statistics.size(3));
  QkBackward pass{};
  pass.input = input_of(qkv, positions, cos, sin, query_weight, key_weight, kinds, op);
  const auto [tokens, groups, queries, size] = pass.input.shape;
  pass.statistics = static_cast<const float*>(
      checked(statistics, qkv, {tokens, groups, queries + 1, kinds}, op, "statistics", ScalarType::Float));
  pass.grad_query = checked(grad_query, qkv, {tokens, groups * queries, size}, op, "grad_query");
  pass.grad_key = checked(grad_key, qkv, {tokens, groups, size}, op, "grad_key");
  pass.grad_value = checked(grad_value, qkv, {tokens, groups, size}, op, "grad_value");
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  Tensor grad_weights = new_float32(qkv, {2, kinds, size});
  pass.grad_qkv = grad_qkv.mutable_data_ptr();
  pass.grad_weights = static_cast<float*>(grad_weights.mutable_data_ptr());
  return {pass, {grad_qkv, grad_weights}};
}

ForwardResult forward_cpu(const Tensor& qkv, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                          const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                          const std::optional<Tensor>& query_bias, const std::optional<Tensor>& key_bias, double eps,
                          bool with_lengths) {
  const char* op = "headrace::qk_norm_rope_forward";
  const auto [pass, result] = prepare_forward(qkv, positions, cos, sin, query_weight, key_weight, query_bias, key_bias,
                                              eps, with_lengths, op);
  check_positions_on_cpu(pass.input, op);
  const int64_t row = qkv.numel() / std::max<int64_t>(1, pass.input.shape.tokens);
  torch::stable::parallel_for(0, pass.input.shape.tokens, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row)),
                              [&pass = pass](int64_t begin, int64_t end) {
                                qk_norm_rope_forward_cpu(pass, begin, end);
                              });
  return result;
}

BackwardResult backward_cpu(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                            const Tensor& qkv, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                            const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                            const Tensor& statistics) {
  const char* op = "headrace::qk_norm_rope_backward";
  auto [pass, result] = prepare_backward(grad_query, grad_key, grad_value, qkv, positions, cos, sin, query_weight,
                                         key_weight, statistics, op);
  check_positions_on_cpu(pass.input, op);
  const auto& shape = pass.input.shape;
  const int64_t parts = (shape.tokens + kQkTokensOfPart - 1) / kQkTokensOfPart;
  Tensor partials = new_float32(qkv, {parts, 2, pass.input.statistics_per_head, shape.head_size});
  pass.partials = static_cast<float*>(partials.mutable_data_ptr());
  const int64_t numbers = kQkTokensOfPart * shape.groups * (shape.queries_per_group + 2) * shape.head_size;
  torch::stable::parallel_for(0, parts, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers)),
                              [&pass = pass](int64_t begin, int64_t end) {
                                qk_norm_rope_backward_cpu(pass, begin, end);
                              });
  qk_norm_rope_sum_parts_cpu(pass, parts);
  return result;
}

#ifdef HEADRACE_CUDA
void check_size(const QkvShape& shape, const char* op) {
  STD_TORCH_CHECK(shape.head_size <= kQkMaxCudaHeadSize, op, ": the head size is more than ", kQkMaxCudaHeadSize);
  const int64_t heads = shape.groups * (shape.queries_per_group + 2);
  STD_TORCH_CHECK(heads == 0 || shape.tokens <= kQkMaxCudaHeads / heads, op, ": too many tokens and heads");
}

ForwardResult forward_cuda(const Tensor& qkv, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                           const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                           const std::optional<Tensor>& query_bias, const std::optional<Tensor>& key_bias, double eps,
                           bool with_lengths) {
  const char* op = "headrace::qk_norm_rope_forward";
  const OnDeviceOf guard(qkv);
  const auto [pass, result] = prepare_forward(qkv, positions, cos, sin, query_weight, key_weight, query_bias, key_bias,
                                              eps, with_lengths, op);
  check_size(pass.input.shape, op);
  check_cuda(qk_norm_rope_forward_cuda(pass, stream_of(qkv)), op);
  return result;
}

BackwardResult backward_cuda(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                             const Tensor& qkv, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                             const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                             const Tensor& statistics) {
  const char* op = "headrace::qk_norm_rope_backward";
  const OnDeviceOf guard(qkv);
  auto [pass, result] = prepare_backward(grad_query, grad_key, grad_value, qkv, positions, cos, sin, query_weight,
                                         key_weight, statistics, op);
  check_size(pass.input.shape, op);
  const int64_t parts = qk_norm_rope_parts_cuda(pass.input.shape);
  Tensor partials = new_float32(qkv, {parts, pass.input.statistics_per_head, pass.input.shape.head_size});
  pass.partials = static_cast<float*>(partials.mutable_data_ptr());
  check_cuda(qk_norm_rope_backward_cuda(pass, stream_of(qkv)), op);
  return result;
}
#endif

HEADRACE_OPERATORS(library) {
  library.def(
      "qk_norm_rope_forward(Tensor qkv, Tensor positions, Tensor cos, Tensor sin, Tensor? query_weight, "
      "Tensor? key_weight, Tensor? query_bias, Tensor? key_bias, float eps, bool with_lengths) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "qk_norm_rope_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor qkv, Tensor positions, "
      "Tensor cos, Tensor sin, Tensor? query_weight, Tensor? key_weight, Tensor statistics) -> (Tensor, Tensor)");
}

HEADRACE_CPU_KERNELS(library) {
  library.impl("qk_norm_rope_forward", TORCH_BOX(&forward_cpu));
  library.impl("qk_norm_rope_backward", TORCH_BOX(&backward_cpu));
}

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) {
  library.impl("qk_norm_rope_forward", TORCH_BOX(&forward_cuda));
  library.impl("qk_norm_rope_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace headrace
