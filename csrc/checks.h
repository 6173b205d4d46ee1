// What the bindings share: argument checks with the messages of memkernel/_check.py, layouts, outputs, the way back to
// the reference.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>

#include "cpu/kernels.h"

namespace memkernel {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python shows as a ValueError.
[[noreturn]] void fail(const std::string& message);
std::string to_string(IntHeaderOnlyArrayRef shape);

// Fails unless `t` has this shape (-1 matches any extent) and dtype. The dispatcher lets only CPU tensors come here.
void expect(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype);
void expect(const char* name, const Tensor& t, IntHeaderOnlyArrayRef shape, ScalarType dtype);
void expect_dims(const char* name, const Tensor& t, int64_t dims);
void expect_at_least_0(const char* name, int64_t value);

// Fails if elements of a tensor that is to be written share memory by a stride of 0.
void expect_distinct(const char* name, const Tensor& t);

// Fails unless 0 <= value < limit for all of a contiguous int32 tensor: these index memory.
void expect_below(const char* name, const Tensor& t, int64_t limit);

// The kernels' dtype for that of `t`, if they take it; fails unless the reference does.
std::optional<DType> kernel_dtype(const char* name, const Tensor& t);

// Whether the last `dims` dimensions lie contiguously.
bool is_packed(const Tensor& t, int64_t dims);

// `t` where that holds, else a contiguous copy: results do not depend on the strides of what is read.
Tensor packed(const Tensor& t, int64_t dims);

// Whether no two elements share memory, as far as sizes and strides easily tell: kernels write to no other tensors.
bool is_distinct(const Tensor& t);

// All but the last `dims` dimensions as one, those being packed: of `t` itself, or nothing where it cannot be seen so;
// and of a contiguous copy then.
struct Rows {
  Tensor tensor;
  int64_t count, stride;
};
std::optional<Rows> rows_in_place(const Tensor& t, int64_t dims);
Rows rows_of(const Tensor& t, int64_t dims);

// An uninitialised contiguous tensor.
Tensor empty(IntHeaderOnlyArrayRef shape, ScalarType dtype);

// PyTorch's threads for a job that moves so many bytes; the caller's alone where starting the others would cost more.
Threads threads_for(int64_t bytes);

// Calls another registered op. Its errors arrive without their message, so arguments are checked before.
// (TORCH_ERROR_CODE_CHECK: of the names that newer headers have for it, the one that those of torch 2.10 have too.)
template <class Result, class... Args>
Result call(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  if constexpr (!std::is_void_v<Result>) return torch::stable::detail::to<Result>(stack[0]);
}

}  // namespace memkernel
