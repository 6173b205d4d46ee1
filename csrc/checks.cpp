#include "checks.h"

#include <pthread.h>

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

namespace memkernel {

void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string to_string(IntHeaderOnlyArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

static std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    default: return "another dtype";
  }
}

void expect(const char* name, const Tensor& t, IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  const auto came = t.sizes();
  bool fits = came.size() == shape.size() && t.scalar_type() == dtype;
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == -1 || shape[i] == came[i];
  if (!fits)
    fail(std::string(name) + ": expected " + to_string(shape) + " " + to_string(dtype) + " on cpu, got " +
         to_string(came) + " " + to_string(t.scalar_type()) + " on cpu");
}

void expect(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  expect(name, t, IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

void expect_dims(const char* name, const Tensor& t, int64_t dims) {
  if (t.dim() != dims)
    fail(std::string(name) + ": expected " + std::to_string(dims) + " dimensions, got " + to_string(t.sizes()));
}

void expect_at_least_0(const char* name, int64_t value) {
  if (value < 0) fail(std::string(name) + ": expected at least 0, got " + std::to_string(value));
}

void expect_distinct(const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  const auto sizes = t.sizes(), strides = t.strides();
  for (int64_t i = 0; i < t.dim(); ++i)
    if (sizes[i] > 1 && strides[i] == 0)
      fail(std::string(name) + ": expected elements that share no memory, got strides " + to_string(strides));
}

void expect_below(const char* name, const Tensor& t, int64_t limit) {
  if (t.numel() == 0) return;
  const auto* values = static_cast<const int32_t*>(t.const_data_ptr());
  int32_t least = 0, most = -1;
  for (int64_t i = 0, n = t.numel(); i < n; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  if (least < 0 || most >= limit)
    fail(std::string(name) + ": expected values from 0 to " + std::to_string(limit - 1) + ", got " +
         std::to_string(least < 0 ? least : most));
}

std::optional<DType> kernel_dtype(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Double:
    case ScalarType::Half: return std::nullopt;
    default:
      fail(std::string(name) + ": expected one of ['torch.float64', 'torch.float32', 'torch.bfloat16', " +
           "'torch.float16'], got " + to_string(t.scalar_type()));
  }
}

bool is_packed(const Tensor& t, int64_t dims) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= t.dim() - dims; --i) {
    if (sizes[i] != 1 && strides[i] != stride) return false;
    stride *= sizes[i];
  }
  return true;
}

Tensor packed(const Tensor& t, int64_t dims) { return is_packed(t, dims) ? t : torch::stable::contiguous(t); }

bool is_distinct(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size, the narrowest first
  for (int64_t i = 0; i < t.dim(); ++i)
    if (sizes[i] > 1) dims.emplace_back(strides[i], sizes[i]);
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // from the first element of the dimensions so far to their last
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

std::optional<Rows> rows_in_place(const Tensor& t, int64_t dims) {
  if (t.numel() == 0) return Rows{t, 0, 0};
  if (!is_packed(t, dims)) return std::nullopt;
  const auto sizes = t.sizes(), strides = t.strides();
  Rows rows{t, 1, 0};
  for (int64_t i = t.dim() - dims - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (rows.count == 1) rows.stride = strides[i];
    if (rows.count != 1 && strides[i] != rows.stride * rows.count) return std::nullopt;
    rows.count *= sizes[i];
  }
  return rows;
}

Rows rows_of(const Tensor& t, int64_t dims) {
  const auto rows = rows_in_place(t, dims);
  return rows ? *rows : *rows_in_place(torch::stable::contiguous(t), dims);
}

Tensor empty(IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i] > 1 ? shape[i] : 1) strides[i] = stride;
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.size(), shape.data(), strides.data(), shim_dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// The threads of OpenMP do not survive a fork: a child that calls them waits forever.
static bool forked = false;
static const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

static void serial(int64_t tasks, void (*task)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < tasks; ++i) task(context, i);
}

static void parallel(int64_t tasks, void (*task)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

Threads threads_for(int64_t bytes) {
  constexpr int64_t worth_a_thread = 1 << 16;
  const int count = forked || bytes < 2 * worth_a_thread ? 1 : static_cast<int>(torch::stable::get_num_threads());
  return {count, count == 1 ? serial : parallel};
}

}  // namespace memkernel
