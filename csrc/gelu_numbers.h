// GELU (arXiv 1606.08415), both forms, for CPU and CUDA kernels: gelu(z) = z * factor(z), and its slope.
//
//   exact   factor(z) = Phi(z), the normal distribution's
//   tanh    factor(z) = sigmoid(2 u), u = sqrt(2/pi) * (z + 0.044715 z^3), which is (1 + tanh(u)) / 2
//
// One exponential and one division each, no branch and no call, so that CPU compilers vectorise them. `exp` is the
// caller's: expf on the GPU, cpu_numbers.h's on the CPU. Infinities and NaN go where torch sends them.
#pragma once

#ifdef __CUDACC__
#define HEADRACE_GELU_INLINE __device__ __forceinline__
#else
#define HEADRACE_GELU_INLINE inline __attribute__((always_inline))
#endif

namespace headrace {
namespace {

struct FactorAndSlope {
  float factor, slope;
};

struct ExactGelu {
  // Phi(z) and its derivative. Phi(-|z|) = exp(-z^2/2) * p(|z|) / q(|z|): a minimax fit over [0, 14], off by 5.5e-9
  // relative. All coefficients are positive, so nothing cancels and tails keep their digits, which 1 + erf loses.
  // Past 14 the exponential is 0 in fp32.
  template <typename Exp>
  HEADRACE_GELU_INLINE static void normal(float z, float& distribution, float& density, const Exp& exp) {
    const float bell = exp(-0.5f * z * z);
    float a = z < 0.0f ? -z : z;
    a = a > 14.0f ? 14.0f : a;
    const float p =
        (((4.07753865634e-3f * a + 4.03722752031e-2f) * a + 0.182461306077f) * a + 0.437250679746f) * a + 0.5f;
    const float q = ((((1.02207449789e-2f * a + 0.101205094992f) * a + 0.46742762683f) * a + 1.19928932084f) * a +
                     1.67238631347f) * a + 1.0f;
    const float tail = bell * (p / q);
    distribution = z < 0.0f ? tail : 1.0f - tail;
    density = bell * 0.398942280401f;  // 1 / sqrt(2 pi)
  }

  template <typename Exp>
  HEADRACE_GELU_INLINE static float factor(float z, const Exp& exp) {
    float distribution, density;
    normal(z, distribution, density, exp);
    return distribution;
  }

  template <typename Exp>
  HEADRACE_GELU_INLINE static FactorAndSlope factor_and_slope(float z, const Exp& exp) {
    float distribution, density;
    normal(z, distribution, density, exp);
    return {distribution, distribution + z * density};
  }
};

struct TanhGelu {
  static constexpr float kTwice = 1.59576912161f;  // 2 sqrt(2/pi)
  static constexpr float kCubic = 0.044715f;

  template <typename Exp>
  HEADRACE_GELU_INLINE static float factor(float z, const Exp& exp) {
    return 1.0f / (1.0f + exp(-(kTwice * z) * (1.0f + kCubic * z * z)));
  }

  template <typename Exp>
  HEADRACE_GELU_INLINE static FactorAndSlope factor_and_slope(float z, const Exp& exp) {
    const float s = factor(z, exp);
    return {s, s + z * s * (1.0f - s) * (kTwice * (1.0f + 3.0f * kCubic * z * z))};
  }
};

}  // namespace
}  // namespace headrace
