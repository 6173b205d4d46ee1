// The extension memkernel._cuda: importing it registers the CUDA kernel with PyTorch, on the stable ABI. Arguments are
// checked by memkernel/cuda.py; what is decided here is whether the kernel takes them.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "memory_write.h"

namespace memkernel {
namespace {

using torch::stable::Tensor;

// Whether the dimensions from `first` on lie contiguously.
bool is_packed(const Tensor& t, int64_t first) {
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= first; stride *= t.size(i--))
    if (t.size(i) != 1 && t.stride(i) != stride) return false;
  return true;
}

// memkernel.cuda.draw_and_write_; false, and nothing done, where the kernel does not take the arguments.
bool draw_and_write(const std::vector<Tensor>& pools, const Tensor& rank, const std::vector<Tensor>& rows,
                    const Tensor& state, bool shared) {
  if (pools.size() > DrawAndWrite::max_pools || !is_packed(rank, 1)) return false;
  DrawAndWrite args{};
  for (size_t i = 0; i < pools.size(); ++i) {
    const Tensor &pool = pools[i], &news = rows[i];
    if (!is_packed(pool, 2) || !is_packed(news, 2)) return false;
    const int64_t size = pool.element_size();
    int64_t row_bytes = size;
    for (int64_t d = 2; d < pool.dim(); ++d) row_bytes *= pool.size(d);
    args.pools[i] = {static_cast<char*>(pool.data_ptr()), static_cast<const char*>(news.const_data_ptr()), row_bytes,
                     pool.stride(0) * size, pool.stride(1) * size, news.stride(0) * size, news.stride(1) * size};
  }
  args.count = static_cast<int>(pools.size());
  args.rank = static_cast<int32_t*>(rank.data_ptr());
  args.state = static_cast<const int64_t*>(state.const_data_ptr());
  args.rank_L = rank.stride(0), args.state_stride = state.stride(0);
  args.L = static_cast<int>(rank.size(0)), args.M = static_cast<int>(rank.size(1));
  args.W = rows.empty() ? 0 : static_cast<int>(rows[0].size(1));
  args.shared = shared;

  const auto device = rank.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = memkernel_draw_and_write(&args, stream);
  STD_TORCH_CHECK(error <= 0, "draw_and_write_: CUDA error " + std::to_string(error));
  return error == 0;
}

STABLE_TORCH_LIBRARY(memkernel_cuda, m) {
  m.def("draw_and_write_(Tensor(a!)[] pools, Tensor(b!) rank, Tensor[] rows, Tensor state, bool shared) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(memkernel_cuda, CUDA, m) { m.impl("draw_and_write_", TORCH_BOX(&draw_and_write)); }

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace memkernel

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&memkernel::module); }
