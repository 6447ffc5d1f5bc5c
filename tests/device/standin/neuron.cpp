// A device called `neuron` on this machine's memory: every operator runs on the CPU and is noted, and what Trainium is
// said to lack (shared/TRAINIUM.md, after AWS's documentation) is refused. Its c10d backend wraps gloo.
//
// After PyTorch's own description of out-of-tree devices (PrivateUse1) and its test device, openreg.

#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
constexpr auto NEURON = c10::DeviceType::PrivateUse1;

// What the tests ask about.
std::mutex lock;
int64_t held = 0, peak = 0, reads = 0;
std::map<std::string, std::set<std::string>> ran;  // operator -> types of its tensors
bool strict = true;
thread_local bool falling_back = false;

void note(const std::string& name, const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != NEURON) return;
  std::lock_guard<std::mutex> guard(lock);
  ran[name].insert(c10::toString(tensor.scalar_type()));
}

void check_type(ScalarType type) {
  TORCH_CHECK(
      !strict || (type != ScalarType::Double && !c10::isComplexType(type)),
      "neuron stand-in: a ", type, " tensor; Trainium makes it 32 bits without saying so, or takes it apart");
}

// Trainium holds an int64 in 32 bits.
void check_range(const std::string& name, const Tensor& on_host) {
  if (!strict || on_host.scalar_type() != ScalarType::Long || on_host.numel() == 0) return;
  auto [low, high] = at::aminmax(on_host);
  auto fits = [](const Tensor& x) { return x.item<int64_t>() == static_cast<int32_t>(x.item<int64_t>()); };
  TORCH_CHECK(fits(low) && fits(high), "neuron stand-in: ", name, " gives an int64 that 32 bits do not hold");
}

// Memory: the host's, counted.

struct Block {
  void* data;
  int64_t size;
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override;
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static thread_local c10::DeviceIndex current;
  c10::DeviceType type() const override { return NEURON; }
  c10::Device exchangeDevice(c10::Device to) const override {
    auto before = getDevice();
    setDevice(to);
    return before;
  }
  c10::Device getDevice() const override { return {NEURON, current}; }
  void setDevice(c10::Device to) const override {
    TORCH_CHECK(to.index() < deviceCount(), "neuron stand-in: no device ", static_cast<int>(to.index()));
    uncheckedSetDevice(to);
  }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.index() >= 0) current = to.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  // All work is done when a call returns: there is nothing to wait for.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  c10::DeviceIndex deviceCount() const noexcept override {
    const char* count = std::getenv("STANDIN_DEVICES");
    return static_cast<c10::DeviceIndex>(count ? std::atoi(count) : 8);
  }
};
thread_local c10::DeviceIndex Guard::current = 0;
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

c10::DataPtr Memory::allocate(size_t size) {
  auto* block = new Block{std::aligned_alloc(64, (size + 63) / 64 * 64), static_cast<int64_t>(size)};
  {
    std::lock_guard<std::mutex> guard(lock);
    held += block->size;
    peak = std::max(peak, held);
  }
  auto free = [](void* context) {
    auto* block = static_cast<Block*>(context);
    std::free(block->data);
    std::lock_guard<std::mutex> guard(lock);
    held -= block->size;
    delete block;
  };
  return {block->data, block, free, c10::Device(NEURON, Guard::current)};
}
Memory memory;
REGISTER_ALLOCATOR(NEURON, &memory)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return Guard().deviceCount(); }
  c10::DeviceIndex getCurrentDevice() const override { return Guard::current; }
  void setCurrentDevice(c10::DeviceIndex to) const override { Guard().setDevice({NEURON, to}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex to) const override {
    return Guard().exchangeDevice({NEURON, to}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex to) const override { return exchangeDevice(to); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Device getDeviceFromPtr(void*) const override { return {NEURON, Guard::current}; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto fresh = memory.allocate(size);
    auto kept = std::min(size, storage.nbytes());
    if (kept) memory.copy_data(fresh.mutable_get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// The same numbers as a tensor of the CPU, without a copy.
Tensor host(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != NEURON) return tensor;
  return at::for_blob(tensor.data_ptr(), tensor.sizes())
      .strides(tensor.strides())
      .deleter([tensor](void*) {})
      .options(tensor.options().device(c10::kCPU))
      .make_tensor();
}

// What a device must bring itself; all else falls back.

Tensor empty(
    IntArrayRef size, std::optional<ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device> device,
    std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  check_type(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device> device, std::optional<bool>) {
  check_type(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (!falling_back && to.device().is_cpu()) {
    std::lock_guard<std::mutex> guard(lock);
    ++reads;
  }
  host(to).copy_(host(from));
  if (!falling_back) check_range("a copy", host(to));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  note("aten::_local_scalar_dense", tensor);
  {
    std::lock_guard<std::mutex> guard(lock);
    ++reads;
  }
  return at::native::_local_scalar_dense_cpu(host(tensor));
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  auto count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

// Results whose shape depends on values: each would be compiled anew.
const std::set<std::string> DYNAMIC{
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount"};

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto name = op.schema().name();
  TORCH_CHECK(!strict || name.rfind("aten::_fused_", 0) != 0, "neuron stand-in: ", name, " has no kernel on Trainium");
  TORCH_CHECK(!strict || !DYNAMIC.count(name), "neuron stand-in: the shape of what ", name, " gives depends on values");
  auto look = [&](const torch::jit::Stack& values) {
    for (const auto& value : values) {
      if (value.isTensor()) note(name, value.toTensor());
      if (value.isTensorList())
        for (const Tensor& tensor : value.toTensorVector()) note(name, tensor);
      if (value.isList())
        for (const c10::IValue& part : value.toListRef())
          if (part.isTensor()) note(name, part.toTensor());
    }
  };
  look(torch::jit::Stack(stack->end() - op.schema().arguments().size(), stack->end()));
  struct Inside {
    bool before = falling_back;
    Inside() { falling_back = true; }
    ~Inside() { falling_back = before; }
  } inside;
  at::native::cpu_fallback(op, stack);
  const torch::jit::Stack results(stack->end() - op.schema().returns().size(), stack->end());
  look(results);
  for (const auto& result : results)
    if (result.isTensor() && result.toTensor().device().type() == NEURON) check_range(name, host(result.toTensor()));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_", at::native::set_cpu_);
  m.impl("record_stream", [](Tensor&, c10::Stream) {});
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) { KERNEL_PRIVATEUSEONE(linear, lower_precision_fp) }

// Collectives: gloo's, on the same memory. What is not here the base class refuses.

struct Neuron final : c10d::Backend {
  using Tensors = std::vector<Tensor>;
  using Lists = std::vector<std::vector<Tensor>>;
  using Started = c10::intrusive_ptr<c10d::Work>;
  c10::intrusive_ptr<c10d::Backend> gloo;

  explicit Neuron(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo(std::move(gloo)) {}

  const std::string getBackendName() const override { return "neuron"; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { gloo->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo->getSequenceNumberForGroup(); }

  static Tensors on_host(const char* name, const Tensors& tensors) {
    Tensors out;
    for (const auto& tensor : tensors) {
      note(std::string("c10d::") + name, tensor);
      out.push_back(host(tensor));
    }
    return out;
  }
  static Lists on_host(const char* name, const Lists& lists) {
    Lists out;
    for (const auto& list : lists) out.push_back(on_host(name, list));
    return out;
  }

  Started broadcast(Tensors& x, const c10d::BroadcastOptions& o) override {
    auto h = on_host("broadcast", x);
    return gloo->broadcast(h, o);
  }
  Started allreduce(Tensors& x, const c10d::AllreduceOptions& o) override {
    auto h = on_host("allreduce", x);
    return gloo->allreduce(h, o);
  }
  Started allgather(Lists& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    auto to = on_host("allgather", out);
    auto from = on_host("allgather", in);
    return gloo->allgather(to, from, o);
  }
  Started _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& o) override {
    auto h = on_host("allgather", Tensors{out, in});
    return gloo->_allgather_base(h[0], h[1], o);
  }
  Started allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    auto to = on_host("allgather", out);
    auto from = on_host("allgather", in);
    return gloo->allgather_into_tensor_coalesced(to, from, o);
  }
  Started reduce_scatter(Tensors& out, Lists& in, const c10d::ReduceScatterOptions& o) override {
    auto to = on_host("reduce_scatter", out);
    auto from = on_host("reduce_scatter", in);
    return gloo->reduce_scatter(to, from, o);
  }
  Started _reduce_scatter_base(Tensor& out, Tensor& in, const c10d::ReduceScatterOptions& o) override {
    auto h = on_host("reduce_scatter", Tensors{out, in});
    return gloo->_reduce_scatter_base(h[0], h[1], o);
  }
  Started reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& o) override {
    auto to = on_host("reduce_scatter", out);
    auto from = on_host("reduce_scatter", in);
    return gloo->reduce_scatter_tensor_coalesced(to, from, o);
  }
  Started alltoall_base(
      Tensor& out, Tensor& in, std::vector<int64_t>& to, std::vector<int64_t>& from,
      const c10d::AllToAllOptions& o) override {
    for (const auto& sizes : {to, from})
      for (auto size : sizes)
        TORCH_CHECK(size == sizes[0], "neuron stand-in: all_to_all of uneven parts; Trainium takes even ones alone");
    auto h = on_host("alltoall", Tensors{out, in});
    return gloo->alltoall_base(h[0], h[1], to, from, o);
  }
  Started barrier(const c10d::BarrierOptions& o) override { return gloo->barrier(o); }
  Started send(Tensors&, int, int) override { return refuse("send"); }
  Started recv(Tensors&, int, int) override { return refuse("recv"); }
  Started recvAnysource(Tensors&, int) override { return refuse("recv"); }
  static Started refuse(const char* what) {
    TORCH_CHECK(false, "neuron stand-in: ", what, ", which nobody has shown on Trainium");
  }
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::module_::import("torch.distributed");
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("backend", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Neuron>(std::move(gloo));
  });
  m.def("held", [] { return held; });
  m.def("peak", [] { return peak; });
  m.def("reset_peak", [] { peak = held; });
  m.def("reads", [] { return reads; });
  m.def("ran", [] {
    std::lock_guard<std::mutex> guard(lock);
    return ran;
  });
  m.def("forget", [] {
    std::lock_guard<std::mutex> guard(lock);
    ran.clear();
    reads = 0;
  });
  m.def("set_strict", [](bool on) { strict = on; });
  m.def("current", [] { return static_cast<int>(Guard::current); });
  m.def("set_current", [](int to) { Guard().setDevice({NEURON, static_cast<c10::DeviceIndex>(to)}); });
  m.def("count", [] { return static_cast<int>(Guard().deviceCount()); });
}
