// The dtypes that our kernels take for tensors of numbers; what a kernel sums in is its own affair, mostly fp32.
#pragma once

namespace headrace {

enum class Dtype { float32, bfloat16 };

}  // namespace headrace
