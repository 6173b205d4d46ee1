// The ops under PyTorch's CPU key: arguments checked as the reference checks them, unpacked for the kernels. Calls that
// no kernel takes (other dtypes, unusual strides in what is written) go to the reference, once their arguments are known
// to be good: of an error in there only its type would come back.
#include <algorithm>
#include <vector>

#include "checks.h"

namespace memkernel {
namespace {

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

int32_t* int32_data(const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); }

const float* float_data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// The last dimension of `name`, which has one.
int64_t last_size(const char* name, const Tensor& t) {
  if (t.dim() == 0) fail(std::string(name) + ": expected at least one dimension, got []");
  return t.size(-1);
}

void expect_even(const char* name, const Tensor& t) {
  if (last_size(name, t) % 2)
    fail(std::string(name) + ": expected an even last dimension (two halves), got " + to_string(t.sizes()));
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t E = last_size("x", x);
  const auto dtype = kernel_dtype("x", x);
  expect("weight", weight, {E}, x.scalar_type());
  if (!dtype) return call<Tensor>("memkernel_reference::rms_norm", x, weight, eps);
  const Rows rows = rows_of(x, 1);
  const Tensor scale = packed(weight, 1), out = empty(x.sizes(), x.scalar_type());
  kernels().rms_norm({*dtype, nullptr, rows.tensor.const_data_ptr(), scale.const_data_ptr(), out.data_ptr(), rows.count,
                      E, 0, rows.stride, static_cast<float>(eps)},
                     threads_for(bytes_of(x)));
  return out;
}

Tensor add_rms_norm_(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps) {
  const int64_t E = last_size("residual", residual);
  const auto dtype = kernel_dtype("residual", residual);
  expect_distinct("residual", residual);
  expect("x", x, residual.sizes(), residual.scalar_type());
  expect("weight", weight, {E}, residual.scalar_type());
  const auto written = rows_in_place(residual, 1);
  if (!dtype || !written || !is_distinct(residual))
    return call<Tensor>("memkernel_reference::add_rms_norm_", residual, x, weight, eps);
  const Rows rows = rows_of(x, 1);
  const Tensor scale = packed(weight, 1), out = empty(residual.sizes(), residual.scalar_type());
  kernels().rms_norm({*dtype, residual.data_ptr(), rows.tensor.const_data_ptr(), scale.const_data_ptr(), out.data_ptr(),
                      rows.count, E, written->stride, rows.stride, static_cast<float>(eps)},
                     threads_for(bytes_of(x)));
  return out;
}

Tensor swiglu(const Tensor& gate_up) {
  const auto dtype = kernel_dtype("gate_up", gate_up);
  expect_even("gate_up", gate_up);
  if (!dtype) return call<Tensor>("memkernel_reference::swiglu", gate_up);
  const Rows rows = rows_of(gate_up, 1);
  std::vector<int64_t> half(gate_up.sizes().begin(), gate_up.sizes().end());
  half.back() /= 2;
  const Tensor out = empty(half, gate_up.scalar_type());
  kernels().swiglu({*dtype, rows.tensor.const_data_ptr(), out.data_ptr(), rows.count, half.back(), rows.stride},
                   threads_for(bytes_of(gate_up)));
  return out;
}

Tensor rope_write_(const Tensor& cache_key, const Tensor& cache_value, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& cos, const Tensor& sin, const Tensor& start, int64_t offset) {
  expect_dims("cache_key", cache_key, 4);
  expect_dims("query", query, 4);
  expect_dims("key", key, 4);
  const int64_t B = cache_key.size(0), S = cache_key.size(1), G = cache_key.size(2), D = cache_key.size(3);
  const int64_t T = key.size(1), Tq = query.size(1), H = query.size(2);
  const ScalarType type = cache_key.scalar_type();
  const auto dtype = kernel_dtype("cache_key", cache_key);
  expect_even("cache_key", cache_key);
  expect("cache_value", cache_value, {B, S, G, D}, type);
  expect("query", query, {B, std::min(Tq, T), H, D}, type);
  expect("key", key, {B, std::min(T, S), G, D}, type);
  expect("value", value, {B, T, G, D}, type);
  expect("cos", cos, {-1, D / 2}, ScalarType::Float);
  expect("sin", sin, cos.sizes(), ScalarType::Float);
  expect("start", start, {B}, ScalarType::Int);
  expect_at_least_0("offset", offset);
  expect_distinct("cache_key", cache_key);
  expect_distinct("cache_value", cache_value);
  const Tensor starts = packed(start, 1);
  expect_below("start", starts, std::min(S, std::max<int64_t>(0, cos.size(0) - offset)) - T + 1);
  if (!dtype || !is_packed(cache_key, 2) || !is_packed(cache_value, 2) || !is_distinct(cache_key) ||
      !is_distinct(cache_value))
    return call<Tensor>("memkernel_reference::rope_write_", cache_key, cache_value, query, key, value, cos, sin, start,
                        offset);
  const Tensor q = packed(query, 2), k = packed(key, 2), v = packed(value, 2);
  const Tensor cosines = packed(cos, 2), sines = packed(sin, 2);
  const Tensor out = empty(query.sizes(), type);
  kernels().rope_write({*dtype, cache_key.data_ptr(), cache_value.data_ptr(), q.const_data_ptr(), k.const_data_ptr(),
                        v.const_data_ptr(), float_data(cosines), float_data(sines), int32_data(starts), out.data_ptr(),
                        B, T, Tq, H, G, D, offset, cache_key.stride(0), cache_key.stride(1), cache_value.stride(0),
                        cache_value.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0),
                        v.stride(1)},
                       threads_for(bytes_of(query) + bytes_of(key) + bytes_of(value)));
  return out;
}

void rotate_memory_(const Tensor& rotated, const Tensor& key, const Tensor& rank, const Tensor& cos, const Tensor& sin,
                    int64_t offset) {
  const auto shape = rotated.sizes();
  if (shape.size() < 3) fail("rotated: expected [..., M, G, D], got " + to_string(shape));
  const int64_t G = rotated.size(-2), D = rotated.size(-1);
  const auto dtype = kernel_dtype("rotated", rotated);
  expect_even("rotated", rotated);
  expect("key", key, shape, rotated.scalar_type());
  expect("rank", rank, IntHeaderOnlyArrayRef(shape.data(), shape.size() - 2), ScalarType::Int);
  expect("cos", cos, {-1, D / 2}, ScalarType::Float);
  expect("sin", sin, cos.sizes(), ScalarType::Float);
  expect_at_least_0("offset", offset);
  expect_distinct("rotated", rotated);
  const Tensor ranks = packed(rank, rank.dim());
  expect_below("rank", ranks, std::max<int64_t>(0, cos.size(0) - offset));
  const auto written = rows_in_place(rotated, 2);
  if (!dtype || !written || !is_distinct(rotated))
    return call<void>("memkernel_reference::rotate_memory_", rotated, key, rank, cos, sin, offset);
  const Rows rows = rows_of(key, 2);
  const Tensor cosines = packed(cos, 2), sines = packed(sin, 2);
  kernels().rotate_memory({*dtype, rotated.data_ptr(), rows.tensor.const_data_ptr(), int32_data(ranks),
                           float_data(cosines), float_data(sines), rows.count, G, D, offset, written->stride,
                           rows.stride},
                          threads_for(bytes_of(key)));
}

Tensor memory_attention(const Tensor& query, const Tensor& memory_key, const Tensor& memory_value, const Tensor& key,
                        const Tensor& value, const Tensor& start) {
  expect_dims("query", query, 4);
  expect_dims("memory_key", memory_key, 4);
  expect_dims("key", key, 4);
  const int64_t B = query.size(0), T = query.size(1), H = query.size(2), D = query.size(3);
  const int64_t P = memory_key.size(0), M = memory_key.size(1), G = memory_key.size(2), S = key.size(1);
  if (P == 0 || G == 0 || B % P || H % G)
    fail("query: expected a batch divisible by " + std::to_string(P) + " pools and heads by " + std::to_string(G) +
         ", got " + to_string(query.sizes()));
  const ScalarType type = query.scalar_type();
  const auto dtype = kernel_dtype("query", query);
  expect("memory_key", memory_key, {P, M, G, D}, type);
  expect("memory_value", memory_value, {P, M, G, D}, type);
  expect("key", key, {B, std::max(S, T), G, D}, type);
  expect("value", value, {B, S, G, D}, type);
  expect("start", start, {B}, ScalarType::Int);
  const Tensor starts = packed(start, 1);
  expect_below("start", starts, S - T + 1);
  if (query.numel() == 0) return empty(query.sizes(), type);
  if (!dtype || D % 2)
    return call<Tensor>("memkernel_reference::memory_attention", query, memory_key, memory_value, key, value, start);
  const Tensor q = packed(query, 2), mk = packed(memory_key, 2), mv = packed(memory_value, 2);
  const Tensor k = packed(key, 2), v = packed(value, 2);
  const Tensor out = empty(query.sizes(), type);
  kernels().memory_attention(
      {*dtype, q.const_data_ptr(), mk.const_data_ptr(), mv.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(),
       int32_data(starts), out.data_ptr(), B, T, H, D, P, M, G, S, q.stride(0), q.stride(1), mk.stride(0), mk.stride(1),
       mv.stride(0), mv.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)},
      threads_for(bytes_of(q) + bytes_of(mk) + bytes_of(mv) + bytes_of(k) + bytes_of(v)));
  return out;
}

Tensor draw_ranks(const Tensor& state, int64_t layers, int64_t rows, int64_t count, bool shared) {
  expect("state", state, {2}, ScalarType::Long);
  expect_at_least_0("layers", layers);
  if (count < 0 || count > rows || rows > int64_t{1} << 31)
    fail("count: expected 0 to " + std::to_string(rows) + " of " + std::to_string(rows) + " rows, got " +
         std::to_string(count));
  const auto* words = static_cast<const int64_t*>(state.const_data_ptr());
  const Tensor out = empty(std::vector<int64_t>{layers, count}, ScalarType::Int);
  kernels().draw_ranks({words[0], words[state.stride(0)], int32_data(out), layers, rows, count, shared},
                       threads_for(bytes_of(out) * 16));
  return out;
}

void memory_write_(const std::vector<Tensor>& pools, const Tensor& rank, const std::vector<Tensor>& rows,
                   const Tensor& dropped) {
  expect_dims("rank", rank, 2);
  expect_dims("dropped", dropped, 2);
  const int64_t L = rank.size(0), M = rank.size(1), W = dropped.size(1);
  expect("rank", rank, {L, M}, ScalarType::Int);
  expect("dropped", dropped, {L, std::min(W, M)}, ScalarType::Int);
  if (pools.size() != rows.size())
    fail("rows: expected one tensor for each of " + std::to_string(pools.size()) + " pools, got " +
         std::to_string(rows.size()));
  bool in_place = rank.is_contiguous();
  int64_t bytes = bytes_of(rank);
  std::vector<Tensor> packed_rows;  // outlive the pointers into them
  std::vector<MemoryWrite::Pool> unpacked;
  for (size_t i = 0; i < pools.size(); ++i) {
    const Tensor& pool = pools[i];
    const std::string index = "[" + std::to_string(i) + "]";
    std::vector<int64_t> shape(pool.sizes().begin(), pool.sizes().end());
    shape.resize(std::max<size_t>(shape.size(), 2));
    shape[0] = L, shape[1] = M;
    expect(("pools" + index).c_str(), pool, shape, pool.scalar_type());
    shape[1] = W;
    expect(("rows" + index).c_str(), rows[i], shape, pool.scalar_type());
    expect_distinct(("pools" + index).c_str(), pool);
    const int64_t inner = pool.dim() - 2, size = pool.element_size();
    in_place = in_place && is_packed(pool, inner) && is_distinct(pool);
    const Tensor& news = packed_rows.emplace_back(packed(rows[i], inner));
    int64_t row_bytes = size;
    for (int64_t d = 2; d < pool.dim(); ++d) row_bytes *= pool.size(d);
    bytes += 2 * L * W * row_bytes;
    unpacked.push_back({static_cast<char*>(pool.data_ptr()), static_cast<const char*>(news.const_data_ptr()), row_bytes,
                        pool.stride(0) * size, pool.stride(1) * size, news.stride(0) * size, news.stride(1) * size});
  }
  expect_distinct("rank", rank);
  expect_below("rank", packed(rank, 2), M);
  const Tensor drops = packed(dropped, 2);
  expect_below("dropped", drops, M);
  if (!in_place) return call<void>("memkernel_reference::memory_write_", pools, rank, rows, dropped);
  kernels().memory_write({unpacked.data(), static_cast<int64_t>(unpacked.size()), int32_data(rank), int32_data(drops), L,
                          M, W},
                         threads_for(bytes));
}

// Whether PyTorch's product may be faster.
bool is_for_pytorch(DType dtype, int64_t rows, int64_t in, int64_t out, const Threads& threads) {
  constexpr int64_t few = 32;     // of which reading the weights takes the time, or nearly
  constexpr int64_t share = 192;  // of `out` a thread: with less, some wait for others in the end
  return rows > few && (rows > kernels().linear_rows(dtype, in) || out < share * threads.count ||
                        (dtype == DType::bfloat16 && has_matrix_tiles()));
}

Tensor linear(const Tensor& x, const Tensor& weight) {
  const int64_t in = last_size("x", x);
  const auto dtype = kernel_dtype("x", x);
  expect("weight", weight, {-1, in}, x.scalar_type());
  const int64_t out = weight.size(0);
  const Threads threads = threads_for(bytes_of(weight));
  if (!dtype || in == 0 || !is_packed(weight, 1) || is_for_pytorch(*dtype, x.numel() / in, in, out, threads))
    return call<Tensor>("aten::linear", x, weight, std::nullopt);
  const Rows rows = rows_of(x, 1);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out;
  const Tensor y = empty(shape, x.scalar_type());
  kernels().linear({*dtype, rows.tensor.const_data_ptr(), weight.const_data_ptr(), y.data_ptr(), rows.count, in, out,
                    rows.stride, weight.stride(0)},
                   threads);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(memkernel, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("rope_write_", TORCH_BOX(&rope_write_));
  m.impl("rotate_memory_", TORCH_BOX(&rotate_memory_));
  m.impl("memory_attention", TORCH_BOX(&memory_attention));
  m.impl("draw_ranks", TORCH_BOX(&draw_ranks));
  m.impl("memory_write_", TORCH_BOX(&memory_write_));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace
}  // namespace memkernel
