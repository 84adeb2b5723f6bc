#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>

#include <utility>

#include "sampler.hpp"

namespace nb = nanobind;

namespace edgellm::sampler {
namespace {

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
std::span<const T> span_of(const Vector<T>& array) {
  return {array.data(), array.size()};
}

std::pair<int32_t, float> sample(Sampler& sampler, const Vector<float>& logits, const Params& params,
                                 const Vector<int32_t>& history, const Vector<int32_t>& bias_tokens,
                                 const Vector<float>& bias_values, uint64_t index) {
  const Choice choice =
      sampler.sample(span_of(logits), params, span_of(history), {span_of(bias_tokens), span_of(bias_values)}, index);
  return {choice.token, choice.logprob};
}

}  // namespace
}  // namespace edgellm::sampler

NB_MODULE(_sampler, module) {
  using namespace edgellm::sampler;
  module.doc() = "Native token sampler.";
  nb::class_<Params>(module, "Params")
      .def(
          "__init__",
          [](Params* self, double temperature, int64_t top_k, double top_p, double min_p, float repetition_penalty,
             uint64_t seed) { new (self) Params{temperature, top_k, top_p, min_p, repetition_penalty, seed}; },
          nb::kw_only(), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
          nb::arg("repetition_penalty"), nb::arg("seed"));
  nb::class_<Sampler>(module, "Sampler")
      .def(nb::init<size_t>(), nb::arg("vocab_size"))
      .def("sample", &sample, nb::arg("logits"), nb::arg("params"), nb::arg("history"), nb::arg("bias_tokens"),
           nb::arg("bias_values"), nb::arg("index"), nb::call_guard<nb::gil_scoped_release>());
}
