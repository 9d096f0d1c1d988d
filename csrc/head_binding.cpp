// Operators headrace::head_statistics, head_gradient_ and head_chunk_. Mathematics and layout: head.h.
#include "binding.h"
#include "head.h"

namespace headrace {
namespace {

HeadLogits logits_of(const Tensor& logits, const Tensor& labels, int64_t first_column, int64_t ranks, int64_t parts,
                     int64_t ignore_index, const char* op) {
  const Dtype dtype = dtype_of(logits, op);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, ": logits must be [rows, columns], with columns");
  check_contiguous(logits, "logits", op);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check_dtype(labels, ScalarType::Long, "labels", "int64", op);
  check_shape(labels, {rows}, "labels", op);
  check_contiguous(labels, "labels", op);
  check_same_device(labels, logits, "labels and logits", op);
  STD_TORCH_CHECK(ranks >= 1 && parts >= 1 && ranks <= kMostHeadParts && parts * ranks <= kMostHeadParts, op,
                  ": a vocabulary has 1 to 32 parts");
  STD_TORCH_CHECK(columns <= kMostHeadColumns / ranks, op, ": a vocabulary has at most 2^24 columns");
  STD_TORCH_CHECK(first_column >= 0 && first_column % columns == 0 && first_column < columns * ranks, op,
                  ": first_column is the rank's number times its columns");
  // const_data_ptr: head_statistics only reads
  return {dtype,        const_cast<void*>(logits.const_data_ptr()),
          rows,         columns,
          first_column, columns * ranks,
          static_cast<const int64_t*>(labels.const_data_ptr()),
          ignore_index, static_cast<int>(parts),
          head_part_width(columns, static_cast<int>(parts))};
}

HeadLoss loss_of(const Tensor& logits, const Tensor& weights, const Tensor& sources, Tensor& counters, Tensor& losses,
                 double z_loss, double max_z_loss, double loss_unit, bool gradient, const char* op) {
  const int64_t rows = logits.size(0);
  check_dtype(weights, ScalarType::Float, "weights", "float32", op);
  check_shape(weights, {rows}, "weights", op);
  check_contiguous(weights, "weights", op);
  check_same_device(weights, logits, "weights and logits", op);
  check_dtype(sources, ScalarType::Long, "sources", "int64", op);
  check_shape(sources, {rows}, "sources", op);
  check_contiguous(sources, "sources", op);
  check_same_device(sources, logits, "sources and logits", op);
  check_dtype(counters, ScalarType::Long, "counters", "int64", op);
  STD_TORCH_CHECK(counters.dim() == 2 && counters.size(1) == kHeadCounters, op, ": counters must be [sources, 5]");
  check_contiguous(counters, "counters", op);
  check_same_device(counters, logits, "counters and logits", op);
  STD_TORCH_CHECK(loss_unit > 0.0 && loss_unit <= kHeadZUnit, op, ": loss_unit must be above 0 and at most 2^32");
  return {static_cast<const float*>(weights.const_data_ptr()),
          static_cast<const int64_t*>(sources.const_data_ptr()),
          counters.size(0),
          static_cast<int64_t*>(counters.mutable_data_ptr()),
          static_cast<float>(z_loss),
          static_cast<float>(max_z_loss),
          loss_unit,
          gradient,
          static_cast<float*>(losses.mutable_data_ptr())};
}

Tensor empty_losses(const Tensor& logits) {
  return torch::stable::new_empty(logits, {3, logits.dim() > 0 ? logits.size(0) : 0}, ScalarType::Float);
}

Tensor empty_statistics(const Tensor& logits, int64_t parts, const char* op) {
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits must be [rows, columns], with columns");
  STD_TORCH_CHECK(parts >= 1 && parts <= kMostHeadParts, op, ": a vocabulary has 1 to 32 parts");
  return torch::stable::new_empty(logits, {logits.size(0), 2 * parts + 3}, ScalarType::Float);
}

// How many parts the gathered statistics have from each rank.
int64_t parts_of(const Tensor& gathered, const Tensor& logits, const char* op) {
  check_dtype(gathered, ScalarType::Float, "gathered", "float32", op);
  STD_TORCH_CHECK(gathered.dim() == 3 && logits.dim() == 2 && gathered.size(1) == logits.size(0) &&
                      gathered.size(2) >= 5 && gathered.size(2) % 2 == 1,
                  op, ": gathered must be [ranks, rows, 2 * parts + 3]");
  check_contiguous(gathered, "gathered", op);
  check_same_device(gathered, logits, "gathered and logits", op);
  return (gathered.size(2) - 3) / 2;
}

int64_t grain(const HeadLogits& at) { return kGrain / at.columns + 1; }

Tensor head_statistics_cpu_op(const Tensor& logits, const Tensor& labels, int64_t first_column, int64_t ranks,
                              int64_t parts, int64_t ignore_index) {
  const char* op = "headrace::head_statistics";
  const HeadLogits at = logits_of(logits, labels, first_column, ranks, parts, ignore_index, op);
  Tensor statistics = empty_statistics(logits, parts, op);
  float* out = static_cast<float*>(statistics.mutable_data_ptr());
  torch::stable::parallel_for(0, at.rows, grain(at),
                              [&](int64_t begin, int64_t end) { head_statistics_cpu(at, out, begin, end); });
  return statistics;
}

Tensor head_gradient_cpu_op(Tensor logits, const Tensor& gathered, const Tensor& labels, const Tensor& weights,
                            const Tensor& sources, Tensor counters, int64_t first_column, double z_loss,
                            double max_z_loss, double loss_unit, int64_t ignore_index, bool gradient) {
  const char* op = "headrace::head_gradient_";
  const int64_t parts = parts_of(gathered, logits, op), ranks = gathered.size(0);
  const HeadLogits at = logits_of(logits, labels, first_column, ranks, parts, ignore_index, op);
  Tensor losses = empty_losses(logits);
  const HeadLoss loss =
      loss_of(logits, weights, sources, counters, losses, z_loss, max_z_loss, loss_unit, gradient, op);
  const float* statistics = static_cast<const float*>(gathered.const_data_ptr());
  torch::stable::parallel_for(0, at.rows, grain(at), [&](int64_t begin, int64_t end) {
    head_gradient_cpu(at, loss, statistics, static_cast<int>(ranks), begin, end);
  });
  return losses;
}

Tensor head_chunk_cpu_op(Tensor logits, const Tensor& labels, const Tensor& weights, const Tensor& sources,
                         Tensor counters, double z_loss, double max_z_loss, double loss_unit, int64_t ignore_index,
                         bool gradient) {
  const char* op = "headrace::head_chunk_";
  const HeadLogits at = logits_of(logits, labels, 0, 1, kHeadParts, ignore_index, op);
  Tensor losses = empty_losses(logits);
  const HeadLoss loss =
      loss_of(logits, weights, sources, counters, losses, z_loss, max_z_loss, loss_unit, gradient, op);
  torch::stable::parallel_for(0, at.rows, grain(at),
                              [&](int64_t begin, int64_t end) { head_chunk_cpu(at, loss, begin, end); });
  return losses;
}

#ifdef HEADRACE_CUDA
void check_rows(const HeadLogits& at, const char* op) {
  STD_TORCH_CHECK(at.rows <= INT32_MAX, op, ": more rows than one launch has blocks");
}

Tensor head_statistics_cuda_op(const Tensor& logits, const Tensor& labels, int64_t first_column, int64_t ranks,
                               int64_t parts, int64_t ignore_index) {
  const char* op = "headrace::head_statistics";
  const HeadLogits at = logits_of(logits, labels, first_column, ranks, parts, ignore_index, op);
  check_rows(at, op);
  Tensor statistics = empty_statistics(logits, parts, op);
  if (at.rows == 0) return statistics;
  const OnDeviceOf guard(logits);
  check_cuda(head_statistics_cuda(at, static_cast<float*>(statistics.mutable_data_ptr()), stream_of(logits)), op);
  return statistics;
}

Tensor head_gradient_cuda_op(Tensor logits, const Tensor& gathered, const Tensor& labels, const Tensor& weights,
                             const Tensor& sources, Tensor counters, int64_t first_column, double z_loss,
                             double max_z_loss, double loss_unit, int64_t ignore_index, bool gradient) {
  const char* op = "headrace::head_gradient_";
  const int64_t parts = parts_of(gathered, logits, op), ranks = gathered.size(0);
  const HeadLogits at = logits_of(logits, labels, first_column, ranks, parts, ignore_index, op);
  check_rows(at, op);
  Tensor losses = empty_losses(logits);
  const HeadLoss loss =
      loss_of(logits, weights, sources, counters, losses, z_loss, max_z_loss, loss_unit, gradient, op);
  if (at.rows == 0) return losses;
  const OnDeviceOf guard(logits);
  check_cuda(head_gradient_cuda(at, loss, static_cast<const float*>(gathered.const_data_ptr()),
                                static_cast<int>(ranks), stream_of(logits)),
             op);
  return losses;
}

Tensor head_chunk_cuda_op(Tensor logits, const Tensor& labels, const Tensor& weights, const Tensor& sources,
                          Tensor counters, double z_loss, double max_z_loss, double loss_unit, int64_t ignore_index,
                          bool gradient) {
  const char* op = "headrace::head_chunk_";
  const HeadLogits at = logits_of(logits, labels, 0, 1, kHeadParts, ignore_index, op);
  check_rows(at, op);
  Tensor losses = empty_losses(logits);
  const HeadLoss loss =
      loss_of(logits, weights, sources, counters, losses, z_loss, max_z_loss, loss_unit, gradient, op);
  if (at.rows == 0) return losses;
  const OnDeviceOf guard(logits);
  check_cuda(head_chunk_cuda(at, loss, stream_of(logits)), op);
  return losses;
}
#endif

HEADRACE_OPERATORS(library) {
  library.def(
      "head_statistics(Tensor logits, Tensor labels, int first_column, int ranks, int parts, int ignore_index)"
      " -> Tensor");
  library.def(
      "head_gradient_(Tensor(a!) logits, Tensor gathered, Tensor labels, Tensor weights, Tensor sources,"
      " Tensor(b!) counters, int first_column, float z_loss, float max_z_loss, float loss_unit, int ignore_index,"
      " bool gradient) -> Tensor");
  library.def(
      "head_chunk_(Tensor(a!) logits, Tensor labels, Tensor weights, Tensor sources, Tensor(b!) counters, float z_loss,"
      " float max_z_loss, float loss_unit, int ignore_index, bool gradient) -> Tensor");
}

HEADRACE_CPU_KERNELS(library) {
  library.impl("head_statistics", TORCH_BOX(&head_statistics_cpu_op));
  library.impl("head_gradient_", TORCH_BOX(&head_gradient_cpu_op));
  library.impl("head_chunk_", TORCH_BOX(&head_chunk_cpu_op));
}

#ifdef HEADRACE_CUDA
HEADRACE_CUDA_KERNELS(library) {
  library.impl("head_statistics", TORCH_BOX(&head_statistics_cuda_op));
  library.impl("head_gradient_", TORCH_BOX(&head_gradient_cuda_op));
  library.impl("head_chunk_", TORCH_BOX(&head_chunk_cuda_op));
}
#endif

}  // namespace
}  // namespace headrace
