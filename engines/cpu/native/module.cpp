// Python binding: a plan is replayed op by op onto memory that Python owns. Offsets are in bytes; strides of rows in
// floats. See engines/cpu/plan.py for what each op means.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>

#include "executor.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgellm {
namespace {

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntTable = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

using RowsAt = std::tuple<std::int64_t, std::int64_t>;  // offset, stride
using RecordsAt = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using Segment = std::optional<std::int64_t>;

class Native {
 public:
  Native(const std::string& isa, int threads, std::int64_t max_rows, std::int64_t max_sequences, Bytes arena,
         ConstBytes weights, Bytes pool, std::int64_t num_blocks, std::int64_t block_bytes, std::int64_t kv_heads,
         std::int64_t head_dim, std::int64_t group)
      : arena_(arena),
        weights_(weights),
        pool_(pool),
        executor_(isa, threads, {max_rows, max_sequences},
                  {pool.data(), num_blocks, block_bytes, kv_heads, head_dim, group}) {}

  void input(RowsAt out, std::int64_t size) { executor_.add(InputOp{rows(out), size}); }

  void embed(const std::string& form, RowsAt out, std::int64_t table, Segment scale, std::int64_t channels,
             std::int64_t padded_channels) {
    const KernelTable& k = executor_.kernels();
    const EmbedArgs args{nullptr, bytes(table), floats(scale), channels, padded_channels, rows(out)};
    executor_.add(EmbedOp{form == "half" ? k.embed_half : k.embed_int8, args});
  }

  void norm(const std::string& kind, RowsAt x, RowsAt out, std::int64_t weight, Segment bias, std::int64_t size,
            float eps) {
    const KernelTable& k = executor_.kernels();
    const NormArgs args{rows(x), rows(out), floats(weight), floats(bias), size, eps};
    executor_.add(RowOp<NormArgs>{kind == "rms" ? k.norm_rms : k.norm_layer, args, 4 * size});
  }

  void prepare(const std::string& form, RowsAt x, RecordsAt out, Segment input_scale, Segment outlier_columns,
               std::int64_t channels, std::int64_t padded_channels, std::int64_t outliers, std::int64_t padded_outliers,
               std::int64_t group_size, float quant_max) {
    const PrepareArgs args{rows(x),
                           records(out),
                           floats(input_scale),
                           ints(outlier_columns),
                           channels,
                           padded_channels,
                           outliers,
                           padded_outliers,
                           group_size,
                           quant_max};
    executor_.add(RowOp<PrepareArgs>{prepare_kernel(form), args, 4 * channels});
  }

  void linear(const std::string& form, RecordsAt x, RowsAt out, std::int64_t weight, Segment group_scale,
              Segment column_scale, Segment outlier_weight, Segment bias, std::int64_t padded_channels,
              std::int64_t group_size, std::int64_t padded_outliers, std::int64_t columns,
              std::optional<RowsAt> residual) {
    const Rows added = residual ? rows(*residual) : Rows{nullptr, 0};
    const LinearArgs args{
        .x = records(x),
        .rows = 0,
        .weight = bytes(weight),
        .group_scale = group_scale ? reinterpret_cast<const std::uint16_t*>(bytes(*group_scale)) : nullptr,
        .column_scale = floats(column_scale),
        .outlier_weight = outlier_weight ? bytes(*outlier_weight) : nullptr,
        .bias = floats(bias),
        .channels = padded_channels,
        .group_size = group_size,
        .outliers = padded_outliers,
        .columns = columns,
        .residual = added.data,
        .residual_stride = added.stride,
        .out = rows(out),
        .panel_bytes = edgellm::panel_bytes(padded_channels, weight_bits(form)),
        .ahead = {}};
    executor_.add(LinearOp{.kernel = linear_kernel(form), .args = args});
  }

  void store_kv(const std::string& dtype, std::int64_t layer, RowsAt q, RowsAt k, RowsAt v, std::int64_t num_heads,
                Segment q_rotation, std::int64_t q_rotary_dim, Segment k_rotation, std::int64_t k_rotary_dim) {
    const KernelTable& kernels = executor_.kernels();
    const StoreKvArgs args{.q = rows(q),
                           .k = rows(k),
                           .v = rows(v),
                           .q_rotation = floats(q_rotation),
                           .k_rotation = floats(k_rotation),
                           .q_rotary_dim = q_rotary_dim,
                           .k_rotary_dim = k_rotary_dim,
                           .num_heads = num_heads,
                           .at = {},
                           .kv = executor_.kv_layer(layer)};
    executor_.add(StoreKvOp{dtype == "fp16" ? kernels.store_kv_fp16 : kernels.store_kv_int8, args});
  }

  void attend(const std::string& dtype, std::int64_t layer, RowsAt q, RowsAt out, std::int64_t num_heads, float scale) {
    const KernelTable& k = executor_.kernels();
    const AttendArgs args{rows(q), rows(out), nullptr, nullptr, num_heads, scale, executor_.kv_layer(layer)};
    executor_.add(AttendOp{dtype == "fp16" ? k.attend_fp16 : k.attend_int8, k.merge_segments, args});
  }

  void activate(const std::string& kind, RowsAt x, std::optional<RowsAt> up, RowsAt out, std::int64_t size) {
    const KernelTable& k = executor_.kernels();
    const Kernel<ActivateArgs> kernel = kind == "silu" ? k.silu : kind == "gelu" ? k.gelu : k.gelu_tanh;
    const ActivateArgs args{rows(x), up ? rows(*up) : Rows{nullptr, 0}, rows(out), size};
    executor_.add(RowOp<ActivateArgs>{kernel, args, 4 * size});
  }

  void add(RowsAt a, RowsAt b, RowsAt out, std::int64_t size) {
    executor_.add(RowOp<AddArgs>{executor_.kernels().add, AddArgs{rows(a), rows(b), rows(out), size}, size});
  }

  void select(RowsAt x, RowsAt out, std::int64_t size) { executor_.add(SelectOp{rows(x), rows(out), size}); }

  std::int64_t run(std::optional<Ints> tokens, std::optional<Floats> hidden, const Ints& row_starts,
                   const Ints& first_positions, const IntTable& block_tables, const Ints& logit_rows,
                   std::int64_t begin, std::optional<std::int64_t> end) {
    const BatchView batch{.rows = static_cast<std::int64_t>(tokens ? tokens->shape(0) : hidden->shape(0)),
                          .sequences = static_cast<std::int64_t>(first_positions.shape(0)),
                          .selected = static_cast<std::int64_t>(logit_rows.shape(0)),
                          .tokens = tokens ? tokens->data() : nullptr,
                          .hidden = hidden ? hidden->data() : nullptr,
                          .row_starts = row_starts.data(),
                          .first_positions = first_positions.data(),
                          .block_tables = block_tables.data(),
                          .table_width = static_cast<std::int64_t>(block_tables.shape(1)),
                          .logit_rows = logit_rows.data()};
    const nb::gil_scoped_release released;
    return executor_.run(batch, begin, end.value_or(executor_.size()));
  }

 private:
  Rows rows(RowsAt at) const { return {reinterpret_cast<float*>(arena_.data() + std::get<0>(at)), std::get<1>(at)}; }
  Records records(RecordsAt at) const {
    const auto [offset, row_bytes, sums_at, outliers_at, scale_at] = at;
    return {arena_.data() + offset, row_bytes, sums_at, outliers_at, scale_at};
  }
  const std::uint8_t* bytes(std::int64_t offset) const { return weights_.data() + offset; }
  const float* floats(Segment offset) const {
    return offset ? reinterpret_cast<const float*>(bytes(*offset)) : nullptr;
  }
  const std::int32_t* ints(Segment offset) const {
    return offset ? reinterpret_cast<const std::int32_t*>(bytes(*offset)) : nullptr;
  }

  Kernel<PrepareArgs> prepare_kernel(const std::string& form) const {
    const KernelTable& k = executor_.kernels();
    if (form == "half") return k.prepare_half;
    if (form == "float") return k.prepare_float;
    if (form == "int8") return k.prepare_int8;
    if (form == "int16") return k.prepare_int16;
    throw nb::value_error(("unknown form of a linear's input: " + form).c_str());
  }

  Kernel<LinearArgs> linear_kernel(const std::string& form) const {
    const KernelTable& k = executor_.kernels();
    if (form == "half") return k.linear_half;
    if (form == "int8") return k.linear_int8;
    if (form == "int8x16") return k.linear_int8x16;
    if (form == "int4") return k.linear_int4;
    if (form == "int4_float") return k.linear_int4_float;
    throw nb::value_error(("unknown form of linear: " + form).c_str());
  }

  static int weight_bits(const std::string& form) {
    if (form == "half") return 16;
    return form == "int8" || form == "int8x16" ? 8 : 4;
  }

  Bytes arena_;
  ConstBytes weights_;
  Bytes pool_;
  Executor executor_;
};

}  // namespace
}  // namespace edgellm

NB_MODULE(_native, module) {
  using edgellm::Native;
  module.doc() = "Native CPU kernels and their executor.";
  module.def("available_isas", &edgellm::available_isas);
  nb::class_<Native>(module, "Executor")
      .def(nb::init<const std::string&, int, std::int64_t, std::int64_t, edgellm::Bytes, edgellm::ConstBytes,
                    edgellm::Bytes, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>(),
           nb::kw_only(), "isa"_a, "threads"_a, "max_rows"_a, "max_sequences"_a, "arena"_a, "weights"_a, "pool"_a,
           "num_blocks"_a, "block_bytes"_a, "kv_heads"_a, "head_dim"_a, "group"_a)
      .def("input", &Native::input, nb::kw_only(), "out"_a, "size"_a)
      .def("embed", &Native::embed, nb::kw_only(), "form"_a, "out"_a, "table"_a, "scale"_a.none(), "channels"_a,
           "padded_channels"_a)
      .def("norm", &Native::norm, nb::kw_only(), "kind"_a, "x"_a, "out"_a, "weight"_a, "bias"_a.none(), "size"_a,
           "eps"_a)
      .def("prepare", &Native::prepare, nb::kw_only(), "form"_a, "x"_a, "out"_a, "input_scale"_a.none(),
           "outlier_columns"_a.none(), "channels"_a, "padded_channels"_a, "outliers"_a, "padded_outliers"_a,
           "group_size"_a, "quant_max"_a)
      .def("linear", &Native::linear, nb::kw_only(), "form"_a, "x"_a, "out"_a, "weight"_a, "group_scale"_a.none(),
           "column_scale"_a.none(), "outlier_weight"_a.none(), "bias"_a.none(), "padded_channels"_a, "group_size"_a,
           "padded_outliers"_a, "columns"_a, "residual"_a.none())
      .def("store_kv", &Native::store_kv, nb::kw_only(), "dtype"_a, "layer"_a, "q"_a, "k"_a, "v"_a, "num_heads"_a,
           "q_rotation"_a.none(), "q_rotary_dim"_a, "k_rotation"_a.none(), "k_rotary_dim"_a)
      .def("attend", &Native::attend, nb::kw_only(), "dtype"_a, "layer"_a, "q"_a, "out"_a, "num_heads"_a, "scale"_a)
      .def("activate", &Native::activate, nb::kw_only(), "kind"_a, "x"_a, "up"_a.none(), "out"_a, "size"_a)
      .def("add", &Native::add, nb::kw_only(), "a"_a, "b"_a, "out"_a, "size"_a)
      .def("select", &Native::select, nb::kw_only(), "x"_a, "out"_a, "size"_a)
      .def("run", &Native::run, nb::kw_only(), "tokens"_a.none(), "hidden"_a.none(), "row_starts"_a,
           "first_positions"_a, "block_tables"_a, "logit_rows"_a, "begin"_a = 0, "end"_a = nb::none());
}
