// Recording of operator calls and their replay without Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "common.h"

namespace fiftyfold {
namespace {

using c10::IValue;

// A tensor argument, or a tensor in a list argument, that is a result of an earlier call.
struct Read {
  size_t argument;
  std::optional<size_t> element;
  size_t value;
};

struct Call {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;  // without those that are read
  std::vector<Read> reads;
  size_t first_value;  // of the results, which are numbered across all calls
  size_t values;
  std::vector<size_t> unused_after;  // values that no later call reads
};

// Call use(tensor, element) for a tensor, or for each tensor of a list. Returns false for any other value except None.
template <typename F>
bool each_tensor(const IValue& value, F use) {
  if (value.isTensor()) {
    use(value.toTensor(), std::nullopt);
  } else if (value.isList()) {
    const auto list = value.toListRef();
    for (size_t i = 0; i < list.size(); ++i) {
      if (list[i].isTensor()) {
        use(list[i].toTensor(), std::optional<size_t>(i));
      } else if (!list[i].isNone()) {
        return false;
      }
    }
  } else {
    return value.isNone();
  }
  return true;
}

// The operators that one thread calls directly, in order. A replay calls them with the same numbers and tensors, but with
// its own results in place of the recorded ones.
class RecordedCalls : public torch::CustomClassHolder {
 public:
  void begin() {
    TORCH_CHECK(active_ == nullptr, "another recording is active in this thread");
    active_ = this;
    handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(&started, &ended).needsInputs(true).needsOutputs(true).scopes({at::RecordScope::FUNCTION}));
  }

  void end() {
    at::removeCallback(handle_);
    active_ = nullptr;
  }

  // Complete the recording of a function that returned `result`. Returns why it cannot be replayed, or an empty string.
  std::string finish(const Tensor& result) {
    const auto found = value_of_.find(result.unsafeGetTensorImpl());
    if (found == value_of_.end()) {
      refuse("the result is not computed by an operator");
    } else {
      result_ = found->second;
    }
    results_.clear();
    value_of_.clear();
    if (!refusal_.empty()) return refusal_;
    std::vector<bool> is_read(values_);
    is_read[result_] = true;
    for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
      for (const Read& read : call->reads) {
        if (!is_read[read.value]) call->unused_after.push_back(read.value);
        is_read[read.value] = true;
      }
      for (size_t value = call->first_value; value < call->first_value + call->values; ++value) {
        if (!is_read[value]) call->unused_after.push_back(value);
      }
    }
    return "";
  }

  // Call the operators again and return the new result.
  Tensor replay() {
    std::vector<Tensor> values(values_);
    std::vector<IValue> stack;
    const Team::Scope team;
    for (const Call& call : calls_) {
      stack.assign(call.arguments.begin(), call.arguments.end());
      std::optional<size_t> copied;
      for (const Read& read : call.reads) {
        if (!read.element) {
          stack[read.argument] = values[read.value];
          continue;
        }
        if (copied != read.argument) stack[read.argument] = stack[read.argument].toList().copy();
        copied = read.argument;
        stack[read.argument].toList().set(*read.element, values[read.value]);
      }
      call.op.callBoxed(&stack);
      size_t next = call.first_value;
      for (const IValue& result : stack) {
        each_tensor(result, [&](const Tensor& x, std::optional<size_t>) {
          if (next < call.first_value + call.values) values[next] = x;
          ++next;
        });
      }
      TORCH_CHECK(next == call.first_value + call.values, call.op.operator_name().name, ": another number of results");
      for (const size_t value : call.unused_after) values[value].reset();
    }
    return values[result_];
  }

 private:
  struct Frame : at::ObserverContext {};

  // A call that began before the recording has no frame.
  static std::unique_ptr<at::ObserverContext> started(const at::RecordFunction& function) {
    if (active_ == nullptr || !function.operator_name()) return nullptr;
    if (active_->depth_++ == 0) active_->add_call(*function.operator_name(), function.inputs());
    return std::make_unique<Frame>();
  }

  static void ended(const at::RecordFunction& function, at::ObserverContext* frame) {
    if (active_ == nullptr || frame == nullptr) return;
    if (--active_->depth_ == 0) active_->add_results(function.outputs());
  }

  void add_call(const c10::OperatorName& name, c10::ArrayRef<const IValue> arguments) {
    Call call{c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str()),
              std::vector<IValue>(arguments.begin(), arguments.end()), {}, values_, 0, {}};
    bool has_masks = false;
    for (size_t i = 0; i < arguments.size(); ++i) {
      const size_t before = call.reads.size();
      each_tensor(arguments[i], [&](const Tensor& x, std::optional<size_t> element) {
        if (!x.defined()) return;
        has_masks |= element && (x.scalar_type() == at::kBool || x.scalar_type() == at::kByte);
        const auto found = value_of_.find(x.unsafeGetTensorImpl());
        if (found != value_of_.end()) call.reads.push_back({i, element, found->second});
      });
      // Keep no recorded results in memory.
      if (call.reads.size() > before && !call.reads.back().element) call.arguments[i] = IValue();
      if (call.reads.size() > before && call.reads.back().element) {
        call.arguments[i] = arguments[i].toList().copy();
        for (size_t r = before; r < call.reads.size(); ++r) call.arguments[i].toList().set(*call.reads[r].element, Tensor());
      }
    }
    // An index without masks has a fixed shape.
    const bool has_dynamic_shape = call.op.hasTag(at::Tag::dynamic_output_shape) && (name.name != "aten::index" || has_masks);
    if (has_dynamic_shape) refuse(name.name + ": the shape of its result depends on values");
    // torch.tensor and torch.from_numpy call the first, Tensor.tolist and Tensor.numpy the second.
    if (name.name == "aten::lift_fresh") refuse("a tensor is made from values of Python");
    if (name.name == "aten::resolve_neg") refuse("Python reads the values of a tensor");
    calls_.push_back(std::move(call));
  }

  void add_results(const std::vector<IValue>& results) {
    Call& call = calls_.back();
    for (const IValue& result : results) {
      const bool is_tensor = each_tensor(result, [&](const Tensor& x, std::optional<size_t>) {
        value_of_[x.unsafeGetTensorImpl()] = values_++;
        results_.emplace_back(x.getIntrusivePtr());
        ++call.values;
      });
      if (!is_tensor) refuse(call.op.operator_name().name + " returns a value to Python");
    }
  }

  void refuse(const std::string& reason) {
    if (refusal_.empty()) refusal_ = reason;
  }

  static inline thread_local RecordedCalls* active_ = nullptr;
  at::CallbackHandle handle_ = 0;
  int64_t depth_ = 0;
  std::vector<Call> calls_;
  size_t values_ = 0, result_ = 0;
  std::unordered_map<const c10::TensorImpl*, size_t> value_of_;
  // Keep the addresses of results from being used again. Strong references would make Python copy some of them.
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> results_;
  std::string refusal_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.class_<RecordedCalls>("RecordedCalls")
      .def(torch::init<>())
      .def("begin", &RecordedCalls::begin)
      .def("end", &RecordedCalls::end)
      .def("finish", &RecordedCalls::finish)
      .def("replay", &RecordedCalls::replay);
}

}  // namespace fiftyfold
