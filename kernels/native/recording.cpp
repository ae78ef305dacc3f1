// Recording of operator calls, which are then repeated without Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>

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
  std::vector<IValue> arguments;
  std::vector<Read> reads;
  size_t first_value;  // of the results, which are numbered across all calls
  size_t values;
  std::vector<size_t> unused_after;  // values that no later call reads
};

// Call use(tensor, element) for a tensor, or for each tensor of a list. Returns false for other values but None.
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

// The operators that one thread calls, in order, without those that operators call. A repetition calls them with the same
// numbers and the same tensors, except that results of earlier calls are those of the repetition.
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

  // Complete the recording of a function that returned `result`. Returns why it cannot be repeated, or an empty string.
  std::string finish(const Tensor& result) {
    const auto found = value_of_.find(result.unsafeGetTensorImpl());
    if (found == value_of_.end()) refuse("the result is not computed by an operator");
    result_ = found == value_of_.end() ? 0 : found->second;
    kept_.clear();
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
    return refusal_;
  }

  // Repeat the calls and return the new result.
  Tensor replay() {
    std::vector<Tensor> values(values_);
    std::vector<IValue> stack;
    const Team::Scope team;
    for (Call& call : calls_) {
      stack.assign(call.arguments.begin(), call.arguments.end());
      for (const Read& read : call.reads) {
        if (read.element) {
          stack[read.argument].toList().set(*read.element, values[read.value]);
        } else {
          stack[read.argument] = values[read.value];
        }
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

  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

 private:
  struct Frame : at::ObserverContext {};

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
    bool selects = false;
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = call.op.schema().arguments()[i].alias_info();
      const bool writes = alias && alias->isWrite();
      each_tensor(call.arguments[i], [&](const Tensor& x, std::optional<size_t> element) {
        if (!x.defined()) return;
        // Python writes the values of a new tensor without operators.
        if (unwritten_.erase(x.unsafeGetTensorImpl()) && !writes) refuse(name.name + " reads a tensor that Python made meanwhile");
        selects |= element && (x.scalar_type() == at::kBool || x.scalar_type() == at::kByte);
        const auto found = value_of_.find(x.unsafeGetTensorImpl());
        if (found != value_of_.end()) call.reads.push_back({i, element, found->second});
      });
    }
    // An index without masks has a fixed shape.
    const bool is_index = name.name == "aten::index" && !selects;
    if (call.op.hasTag(at::Tag::dynamic_output_shape) && !is_index) refuse(name.name + ": the shape of its result depends on values");
    calls_.push_back(std::move(call));
  }

  void add_results(const std::vector<IValue>& results) {
    Call& call = calls_.back();
    for (const IValue& result : results) {
      const bool is_tensor = each_tensor(result, [&](const Tensor& x, std::optional<size_t>) {
        value_of_[x.unsafeGetTensorImpl()] = values_++;
        kept_.push_back(x);  // so that no later tensor has its address
        if (call.op.operator_name().name.starts_with("aten::empty")) unwritten_.insert(x.unsafeGetTensorImpl());
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
  std::unordered_set<const c10::TensorImpl*> unwritten_;  // made by an operator that leaves them empty
  std::vector<Tensor> kept_;
  std::string refusal_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.class_<RecordedCalls>("RecordedCalls")
      .def(torch::init<>())
      .def("begin", &RecordedCalls::begin)
      .def("end", &RecordedCalls::end)
      .def("finish", &RecordedCalls::finish)
      .def("replay", &RecordedCalls::replay)
      .def("__len__", &RecordedCalls::size);
}

}  // namespace fiftyfold
