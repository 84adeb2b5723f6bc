// A stand-alone check of every instruction set against the plain twins, for sanitizers and for other machines'
// emulators: cmake -DEDGELLM_CHECK=ON [-DEDGELLM_SANITIZE=ON]. Buffers have exactly the size that the contracts say, so
// that a kernel that reads or writes past one is caught. Prints one line per failure, and exits with their number.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention_plan.hpp"
#include "half.hpp"
#include "isa.hpp"
#include "thread_pool.hpp"

namespace edgellm {
namespace {

using Bytes = std::vector<std::uint8_t>;
using Floats = std::vector<float>;

int failures = 0;

Floats random_floats(std::size_t count, unsigned seed) {
  std::mt19937 chance(seed);
  std::normal_distribution<float> normal;
  Floats values(count);
  // Exact in bf16 and fp16, so that instruction sets which round activations get the same inputs.
  for (float& value : values) value = std::nearbyint(normal(chance) * 32.0F) / 32.0F;
  return values;
}

Bytes random_bytes(std::size_t count, unsigned seed) {
  std::mt19937 chance(seed);
  Bytes bytes(count);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(std::max<unsigned>(1, chance() & 255U));
  return bytes;
}

template <std::uint16_t (*Round)(float)>
std::vector<std::uint16_t> random_halves(std::size_t count, unsigned seed) {
  std::vector<std::uint16_t> halves(count);
  const Floats values = random_floats(count, seed);
  std::transform(values.begin(), values.end(), halves.begin(), Round);
  return halves;
}

void compare(const std::string& what, const Floats& found, const Floats& expected, float tolerance = 1e-4F) {
  float error = 0.0F;
  float largest = 1e-6F;
  for (std::size_t i = 0; i < found.size(); ++i) {
    error = std::isfinite(found[i]) ? std::fmax(error, std::fabs(found[i] - expected[i])) : INFINITY;
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  if (!(error <= tolerance * largest)) {
    std::printf("%s: error %g of %g\n", what.c_str(), static_cast<double>(error), static_cast<double>(largest));
    ++failures;
  }
}

enum class Form { kHalf, kInt8, kInt8x16, kInt4, kInt4Float };

struct LinearCase {
  Form form;
  std::int64_t rows, columns, channels;
  std::int64_t outliers = 4;

  bool is_int8_input() const { return form == Form::kInt8 || form == Form::kInt4; }
  bool is_int4() const { return form == Form::kInt4 || form == Form::kInt4Float; }
  std::int64_t group() const { return is_int4() ? 16 : channels; }
  std::int64_t panels() const { return (columns + 15) / 16; }
};

Floats run_linear(const KernelTable& kernels, const LinearCase& c) {
  const std::int64_t sums_at = c.channels * (c.is_int8_input() ? 1 : 4);
  const std::int64_t outliers_at = sums_at + 4 * std::max<std::int64_t>(2, c.channels / c.group());
  const std::int64_t row_bytes = outliers_at + 4 * c.outliers + 4;
  Bytes records(c.rows * row_bytes);
  Floats x = random_floats(c.rows * c.channels, 1);
  const Floats input_scale(c.channels, 0.5F);
  const std::vector<std::int32_t> outlier_columns = {0, 1, 2, static_cast<std::int32_t>(c.channels - 1)};
  const Records prepared{records.data(), row_bytes, sums_at, outliers_at, outliers_at + 4 * c.outliers};
  const PrepareArgs prepare{{x.data(), c.channels},
                            prepared,
                            input_scale.data(),
                            outlier_columns.data(),
                            c.channels,
                            c.channels,
                            c.outliers,
                            c.outliers,
                            c.group(),
                            c.form == Form::kInt8x16 ? 16256.0F : 127.0F,
                            c.rows};
  const auto weight_halves = random_halves<float_to_bf16>(c.panels() * 16 * c.channels, 2);
  const Bytes weight_bytes = random_bytes(c.panels() * 16 * c.channels, 3);
  const auto group_scale = random_halves<float_to_fp16>(c.panels() * 16 * (c.channels / c.group()), 4);
  const auto outlier_weight = random_halves<float_to_bf16>(c.panels() * 16 * c.outliers, 5);
  const Floats column_scale = random_floats(c.panels() * 16, 6);
  const Floats bias = random_floats(c.panels() * 16, 7);
  const Floats residual = random_floats(c.rows * c.columns, 8);
  Floats out(c.rows * c.columns);
  const bool is_half = c.form == Form::kHalf;
  const int weight_bits = is_half ? 16 : c.is_int4() ? 4 : 8;
  LinearArgs args{.x = prepared,
                  .rows = c.rows,
                  .weight = is_half ? reinterpret_cast<const std::uint8_t*>(weight_halves.data()) : weight_bytes.data(),
                  .group_scale = group_scale.data(),
                  .column_scale = column_scale.data(),
                  .outlier_weight = reinterpret_cast<const std::uint8_t*>(outlier_weight.data()),
                  .bias = bias.data(),
                  .channels = c.channels,
                  .group_size = c.group(),
                  .outliers = c.outliers,
                  .columns = c.columns,
                  .residual = residual.data(),
                  .residual_stride = c.columns,
                  .out = {out.data(), c.columns},
                  .panel_bytes = panel_bytes(c.channels, weight_bits),
                  .ahead = {}};
  args.ahead = panel_memory(args, 0);
  (is_half                    ? kernels.prepare_half
   : c.is_int8_input()        ? kernels.prepare_int8
   : c.form == Form::kInt8x16 ? kernels.prepare_int16
                              : kernels.prepare_float)(prepare, 0, c.rows);
  const Kernel<LinearArgs> linears[] = {kernels.linear_half, kernels.linear_int8, kernels.linear_int8x16,
                                        kernels.linear_int4, kernels.linear_int4_float};
  linears[static_cast<int>(c.form)](args, 0, c.panels());
  return out;
}

struct CacheCase {
  bool is_int8;
  std::int64_t rows, first_position, head_dim;
  std::int64_t kv_heads = 2, num_heads = 6;

  std::int64_t block_bytes() const {
    const std::int64_t values = 2 * kBlockTokens * kv_heads * head_dim;
    return is_int8 ? values + 4 * kBlockTokens * kv_heads : 2 * values;
  }
};

// Stores rows at all positions from 0, then attends from the last `rows` of them. Slots past the end stay NaN.
Floats run_cache(const KernelTable& kernels, const CacheCase& c) {
  const std::int64_t total = c.first_position + c.rows;
  const std::int64_t heads = c.num_heads * c.head_dim;
  const std::int64_t kv_width = c.kv_heads * c.head_dim;
  Floats q = random_floats(total * heads, 1);
  Floats k = random_floats(total * kv_width, 2);
  Floats v = random_floats(total * kv_width, 3);
  Floats out(total * heads);
  const AlignedFloats scratch = aligned_floats(attend_scratch_floats(c.head_dim));
  Bytes pool((total + kBlockTokens - 1) / kBlockTokens * c.block_bytes(), 0xff);
  const Floats rotation = random_floats(total * 4, 4);
  std::vector<std::int32_t> positions(total), blocks(total), table;
  for (std::int64_t position = 0; position < total; ++position) {
    positions[position] = static_cast<std::int32_t>(position);
    blocks[position] = static_cast<std::int32_t>(position / kBlockTokens);
    if (position % kBlockTokens == 0) table.push_back(blocks[position]);
  }
  const KvLayer kv{pool.data(), c.block_bytes(), c.kv_heads, c.head_dim};
  const StoreKvArgs store{{q.data(), heads},
                          {k.data(), kv_width},
                          {v.data(), kv_width},
                          rotation.data(),
                          rotation.data(),
                          4,
                          4,
                          c.num_heads,
                          {positions.data(), blocks.data()},
                          kv};
  (c.is_int8 ? kernels.store_kv_int8 : kernels.store_kv_fp16)(store, 0, total);
  AttentionPlan plan(c.kv_heads, c.num_heads / c.kv_heads, c.head_dim, c.rows);
  const auto first = static_cast<std::int32_t>(c.first_position);
  plan.add({0, 0, first, nullptr});  // a sequence without rows
  plan.add({first, static_cast<std::int32_t>(c.rows), first, table.data()});
  const AttendArgs attend{
      {q.data(), heads}, {out.data(), heads}, plan.pieces().data(), plan.split().data(), c.num_heads, 0.3F, kv};
  const auto pieces = static_cast<std::int64_t>(plan.pieces().size());
  const auto split = static_cast<std::int64_t>(plan.split().size());
  (c.is_int8 ? kernels.attend_int8 : kernels.attend_fp16)(attend, 0, pieces * c.kv_heads, scratch.get());
  kernels.merge_segments(attend, 0, split * c.kv_heads, scratch.get());
  return out;
}

Floats run_elementwise(const KernelTable& kernels, std::int64_t size) {
  constexpr std::int64_t rows = 3;
  Floats x = random_floats(rows * size, 1);
  Floats up = random_floats(rows * size, 2);
  const Floats weight = random_floats(size, 3);
  const Floats bias = random_floats(size, 4);
  Floats out;
  const auto keep = [&](const auto& kernel, auto args) {
    Floats result(rows * size);
    args.out = {result.data(), size};
    kernel(args, 0, rows);
    out.insert(out.end(), result.begin(), result.end());
  };
  const Rows xs{x.data(), size};
  const Rows ups{up.data(), size};
  const NormArgs norm{xs, {}, weight.data(), bias.data(), size, 1e-5F};
  keep(kernels.norm_rms, norm);
  keep(kernels.norm_layer, norm);
  for (const auto kernel : {kernels.silu, kernels.gelu, kernels.gelu_tanh}) {
    keep(kernel, ActivateArgs{xs, ups, {}, size});
    keep(kernel, ActivateArgs{xs, {nullptr, 0}, {}, size});
  }
  keep(kernels.add, AddArgs{xs, ups, {}, size});
  return out;
}

void check_isa(const std::string& isa) {
  const KernelTable& kernels = kernels_of(isa);
  const KernelTable& twins = kernels_of("reference");
  for (const std::int64_t size : {2, 16, 37, 64}) {
    compare(isa + " elementwise", run_elementwise(kernels, size), run_elementwise(twins, size));
  }
  for (const Form form : {Form::kHalf, Form::kInt8, Form::kInt8x16, Form::kInt4, Form::kInt4Float}) {
    for (const std::int64_t rows : {1, 2, 3, 5, 9, 16, 17, 35}) {
      const LinearCase c{form, rows, 230, 64};
      compare(isa + " linear " + std::to_string(static_cast<int>(form)) + " rows " + std::to_string(rows),
              run_linear(kernels, c), run_linear(twins, c));
    }
  }
  for (const bool is_int8 : {false, true}) {
    for (const CacheCase& c :
         {CacheCase{is_int8, 1, 0, 8}, CacheCase{is_int8, 21, 30, 20}, CacheCase{is_int8, 2, 570, 64},
          CacheCase{is_int8, 101, 200, 36}, CacheCase{is_int8, 1, 600, 128}, CacheCase{is_int8, 1, 300, 64, 5, 5},
          CacheCase{is_int8, 1, 290, 32, 2, 4}, CacheCase{is_int8, 4, 60, 96, 2, 8},
          CacheCase{is_int8, 1, 40, 32, 17, 17}}) {
      // AMX multiplies in bf16.
      compare(isa + " cache of " + std::to_string(c.head_dim), run_cache(kernels, c), run_cache(twins, c),
              isa == "amx" ? 2e-2F : 1e-4F);
    }
  }
}

// Every chunk of every job exactly once.
void check_thread_pool(int threads) {
  ThreadPool pool(threads);
  for (int job = 0; job < 2000; ++job) {
    const int chunks = job % 97;
    std::vector<std::atomic<int>> done(chunks);
    pool.run(chunks, [&](int, std::int64_t begin, std::int64_t end) {
      for (std::int64_t chunk = begin; chunk < end; ++chunk) done[chunk].fetch_add(1);
    });
    if (!std::all_of(done.begin(), done.end(), [](const std::atomic<int>& count) { return count == 1; })) {
      std::printf("thread pool of %d: job %d lost or repeated a chunk\n", threads, job);
      ++failures;
    }
  }
}

}  // namespace
}  // namespace edgellm

int main() {
  for (const int threads : {1, 2, 4, 16}) edgellm::check_thread_pool(threads);
  for (const std::string& isa : edgellm::available_isas()) {
    edgellm::check_isa(isa);
    std::printf("%s checked\n", isa.c_str());
  }
  return edgellm::failures;
}
