// Lists of tensors in the bindings: their checks, and tables of them on the device that kernels run on.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "binding.h"
#include "chunks.h"

namespace headrace {

// Throws unless `tensors` has a tensor for each of `like`: contiguous, as long, and on the device of the first of all.
inline void check_list(const std::vector<Tensor>& tensors, const std::vector<Tensor>& like, const char* name,
                       const char* op) {
  STD_TORCH_CHECK(tensors.size() == like.size(), op, ": ", name, " has ", tensors.size(), " tensors, not ",
                  like.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].numel() == like[i].numel(), op, ": ", name, "[", i, "] has ", tensors[i].numel(),
                    " numbers, not ", like[i].numel());
    STD_TORCH_CHECK(tensors[i].is_contiguous(), op, ": ", name, "[", i, "] must be contiguous");
    STD_TORCH_CHECK(tensors[i].is_cuda() == like[0].is_cuda() && tensors[i].get_device() == like[0].get_device(), op,
                    ": ", name, "[", i, "] must be on the device of the others");
  }
}

inline void check_list_dtype(const std::vector<Tensor>& tensors, ScalarType type, const char* name,
                             const char* type_name, const char* op) {
  for (const Tensor& tensor : tensors) check_dtype(tensor, type, name, type_name, op);
}

// Fills in first_chunk of all rows; returns the number of chunks.
template <typename Row>
int64_t number_chunks(std::vector<Row>& rows) {
  int64_t chunks = 0;
  for (Row& row : rows) {
    row.first_chunk = chunks;
    chunks += chunks_of(row.size);
  }
  return chunks;
}

#ifdef HEADRACE_CUDA
// A copy of the rows in the device memory of `like`. No wait for the device: what is copied at once is at most 64 KiB,
// which CUDA takes along with the command.
template <typename Row>
Tensor on_device(const std::vector<Row>& rows, const Tensor& like, void* stream, const char* op) {
  const size_t bytes = rows.size() * sizeof(Row);
  Tensor table = torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  const char* from = reinterpret_cast<const char*>(rows.data());
  char* to = static_cast<char*>(table.mutable_data_ptr());
#ifdef HEADRACE_EMULATED
  static_cast<void>(stream);
  static_cast<void>(op);
  std::memcpy(to, from, bytes);
#else
  constexpr size_t kAtOnce = 64 << 10;
  for (size_t at = 0; at < bytes; at += kAtOnce)
    check_cuda(cudaMemcpyAsync(to + at, from + at, std::min(kAtOnce, bytes - at), cudaMemcpyHostToDevice,
                               static_cast<cudaStream_t>(stream)),
               op);
#endif
  return table;
}
#endif

}  // namespace headrace
